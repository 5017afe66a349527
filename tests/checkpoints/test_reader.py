"""Checkpoints are read row by row, and every fault of a directory is one message that says what to do."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bamoe.checkpoints.reader import CheckpointReader, resolve
from bamoe.errors import CheckpointError
from tests.dense_models import dense_model, save_dense


@pytest.fixture(params=["5GB", "8KB"], ids=["one-file", "sharded"])
def saved(request, tmp_path):
    return save_dense(tmp_path / "model", shards=request.param)


@pytest.fixture
def sharded(tmp_path):
    return save_dense(tmp_path / "model", shards="8KB")


def message_of(path):
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(path)
    return str(caught.value)


def test_headers_and_rows_are_those_that_transformers_saved(saved):
    expected = dense_model("llama").state_dict()
    with CheckpointReader(saved) as reader:
        assert reader.config["model_type"] == "llama"
        assert {name: (info.shape, info.dtype) for name, info in reader.tensors.items()} == {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()
        }
        for name, tensor in expected.items():
            assert torch.equal(reader.read(name), tensor)
            assert torch.equal(reader.read(name, 3, 7), tensor[3:7])


def test_half_precision_and_scalars(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tensors = {"half": torch.randn(3, 2).bfloat16(), "scalar": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert reader.tensors["half"].dtype == torch.bfloat16
        assert torch.equal(reader.read("half", 1), tensors["half"][1:])
        assert reader.tensors["scalar"].shape == ()
        assert reader.read("scalar") == 2.0


def test_hashes_are_sha256_of_weights_config_and_tokenizer(saved):
    with CheckpointReader(saved) as reader:
        hashes = reader.hashes()
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= hashes.keys()
    assert {path.name for path in saved.glob("*.safetensors")} <= hashes.keys()
    for name, digest in hashes.items():
        assert digest == hashlib.sha256((saved / name).read_bytes()).hexdigest()


def test_no_such_directory(tmp_path):
    assert "no such directory" in message_of(tmp_path / "nowhere")


def test_an_empty_directory_lacks_config_and_weights(tmp_path):
    message = message_of(tmp_path)
    assert "no config.json" in message
    assert "no weights" in message
    assert str(tmp_path) in message


def test_pickles_are_refused_with_a_remedy(sharded):
    for path in sharded.glob("*.safetensors*"):
        path.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"anything")
    message = message_of(sharded)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_an_adapter_alone_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in message_of(tmp_path)


def test_every_missing_and_truncated_shard_is_named(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[2].write_bytes(b"\x00" * 100)
    message = message_of(sharded)
    assert f"{shards[0]}: missing" in message
    assert f"{shards[1]}: truncated or corrupt" in message
    assert f"{shards[2]}: truncated or corrupt" in message
    assert len(message.splitlines()) == 3


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    shard = sharded / weight_map[name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    message = message_of(sharded)
    assert name in message
    assert shard.name in message


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", "{", "not readable JSON"),
        ("config.json", "[]", "holds a list"),
        ("model.safetensors.index.json", "{}", "no weight_map"),
        ("model.safetensors.index.json", "nonsense", "not readable JSON"),
    ],
)
def test_broken_json_is_named(sharded, file, content, expected):
    (sharded / file).write_text(content)
    message = message_of(sharded)
    assert expected in message
    assert file in message


def test_a_local_directory_is_its_own_source(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize("source", ["./models/none", "/models/none", "a/b/c", "~/none"])
def test_a_path_that_is_not_there_never_goes_to_the_hub(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve(source)


def test_the_hub_gives_weights_and_never_code(tmp_path, monkeypatch):
    asked = {}

    def download(source, allow_patterns, ignore_patterns):
        asked.update(source=source, allow=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("owner/model") == tmp_path
    assert asked["source"] == "owner/model"
    assert "*.safetensors" in asked["allow"]
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow"])


def test_the_hub_s_refusal_is_one_message(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no such repository")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="owner/model: neither a directory here nor") as caught:
        resolve("owner/model")
    assert "no such repository" in str(caught.value)


@pytest.mark.parametrize("source", ["a" * 300, "/" + "a/" * 3000, "~nobody-of-that-name/model"])
def test_a_path_that_cannot_be_looked_at(source):
    with pytest.raises(CheckpointError, match="give the directory of a saved model"):
        resolve(source)


def test_a_directory_name_too_long():
    assert "cannot be read (File name too long)" in message_of("a" * 300)


def test_an_index_that_names_a_file_too_long(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "b" * 300}}))
    assert "cannot be read (File name too long)" in message_of(sharded)


def test_json_too_deep_to_read(saved):
    (saved / "config.json").write_text("[" * 10**5)
    assert "config.json is not readable JSON" in message_of(saved)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
@pytest.mark.parametrize("closed", [".", "config.json", "model.safetensors"])
def test_a_closed_directory_or_file(tmp_path, closed):
    model = save_dense(tmp_path / "model")
    (model / closed).chmod(0)
    try:
        message = message_of(model)
    finally:
        (model / closed).chmod(0o700)
    assert "cannot be read (Permission denied)" in message
