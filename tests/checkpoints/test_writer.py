"""What the writer writes is judged by safetensors' own reader."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from bamoe.checkpoints import writer as writer_module
from bamoe.checkpoints.writer import ShardedWriter, parse_size
from bamoe.errors import CheckpointError, ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layout_of(tensors):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def load_all(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_tensors_in_any_slices_are_read_back(tmp_path_factory, data):
    shapes = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=6))
    tensors = {f"t{i}": torch.randn(shape).to(data.draw(st.sampled_from(DTYPES))) for i, shape in enumerate(shapes)}
    limit, step = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 5))
    directory = tmp_path_factory.mktemp("written")
    with ShardedWriter(directory, layout_of(tensors), limit) as writer:
        for name, tensor in tensors.items():
            for piece in tensor.flatten().split(step):
                writer.append(name, piece)
    read = load_all(directory)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    for file in files:
        with safe_open(directory / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
        assert len(names) == 1 or sum(tensors[name].nbytes for name in names) <= limit
    if len(files) == 1:
        assert files == ["model.safetensors"]
    else:
        assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert set(index["weight_map"].values()) == set(files)
        for name, file in index["weight_map"].items():
            assert name in load_file(directory / file)


@pytest.mark.parametrize("finished", [[], ["a"], ["a", "b"]], ids=len)
def test_an_unfinished_file_is_no_safetensors_file(tmp_path, finished):
    tensors = {"a": torch.randn(4), "b": torch.randn(4)}

    def write_and_stop():
        with ShardedWriter(tmp_path, layout_of(tensors), 10**6) as writer:
            for name in finished:
                writer.append(name, tensors[name])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")


def test_a_tensor_that_is_not_whole_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not whole"), ShardedWriter(tmp_path, {"a": ((4,), torch.float32)}, 99) as w:
        w.append("a", torch.randn(3))


def test_too_many_values_or_another_dtype_are_errors(tmp_path):
    writer = ShardedWriter(tmp_path, {"a": ((4,), torch.float32)}, 99)
    with pytest.raises(ValueError, match="float32, found"):
        writer.append("a", torch.zeros(4).half())
    with pytest.raises(ValueError, match="more values"):
        writer.append("a", torch.zeros(5))
    writer.append("a", torch.zeros(4))
    writer.close()


def test_a_full_disk_is_found_before_the_first_value(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(CheckpointError, match="No space left on device; make room"):
        ShardedWriter(tmp_path, {"a": ((4,), torch.float32)}, 99)


def test_room_is_not_blamed_for_another_failure(tmp_path):
    with pytest.raises(CheckpointError, match="No such file or directory") as caught:
        ShardedWriter(tmp_path / "absent", {"a": ((4,), torch.float32)}, 99)
    assert "make room" not in str(caught.value)


MANY_SHARDS = """
import os, resource, sys
from pathlib import Path
import torch
from bamoe.checkpoints.writer import ShardedWriter

layout = {f"t{i}": ((3,), torch.float32) for i in range(30)}
room = len(os.listdir("/proc/self/fd")) + 2 if os.path.isdir("/proc/self/fd") else 24
resource.setrlimit(resource.RLIMIT_NOFILE, (room, room))
with ShardedWriter(Path(sys.argv[1]), layout, 1) as writer:
    for part in range(3):  # in turns, so that each file is opened again
        for i in range(30):
            writer.append(f"t{i}", torch.tensor([float(10 * i + part)]))
"""


def test_more_shards_than_files_may_be_open(tmp_path):
    done = subprocess.run([sys.executable, "-c", MANY_SHARDS, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = load_all(tmp_path)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        f"t{i}": [10 * i, 10 * i + 1, 10 * i + 2] for i in range(30)
    }


def test_a_file_system_that_cannot_reserve_still_works(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    with ShardedWriter(tmp_path, {"a": ((4,), torch.float32)}, 99) as writer:
        writer.append("a", torch.arange(4.0))
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("500 mb", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5kb", 1500),
        (4096, 4096),
        ("7B", 7),
        ("1K", 1000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-2GB", "two", "2XB", "0", "0.1B", "2 GB extra", "9" * 400])
def test_nonsense_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)


def test_an_error_of_a_flush_while_writing_is_not_lost(tmp_path, monkeypatch):
    flushed = []

    def fail_once(descriptor):
        flushed.append(descriptor)
        if len(flushed) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writer_module, "_FLUSHED_BYTES", 8)
    monkeypatch.setattr(os, "fsync", fail_once)
    writer = ShardedWriter(tmp_path, {"a": ((4,), torch.float32)}, 10**6)
    for _ in range(2):
        writer.append("a", torch.zeros(2))
    with pytest.raises(OSError, match="Input/output"):
        writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):  # it was closed
        os.fstat(flushed[0])
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")
