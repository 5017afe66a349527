"""A full disk ends a run with one clear message; the last good checkpoint stays, and with more room the run goes on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bamoe.training import train
from tests.training.tiny import dense, run_config

# A disk of its own for one process and its children: no privileges needed where user namespaces are allowed.
OWN_DISK = ["unshare", "--user", "--map-root-user", "--mount"]

# Gives the command on a full disk, and again with a little more room each time, until it succeeds.
WORKER = """
import contextlib, io, json, os, subprocess, sys
from pathlib import Path

import torch
from bamoe.cli.main import main

torch.set_num_threads(1)
config, disk, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
filler = disk / "filler"
size = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
filler.write_bytes(bytes(size))


def is_whole(checkpoint):
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))


attempts, code = [], 1
while code != 0 and size > 0:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["train", str(config)])
    whole = [path.name for path in (disk / "run").glob("checkpoints/checkpoint-*") if is_whole(path)]
    attempts.append({"code": code, "said": said.getvalue(), "whole": whole})
    size = max(0, size - step)
    os.truncate(filler, size)
for name in ("model.safetensors", "training_log.jsonl", "optimizer/adamw.safetensors"):
    config.with_name(Path(name).name).write_bytes((disk / "run" / name).read_bytes())
config.with_name("attempts.json").write_text(json.dumps(attempts))
"""


def own_disk_or_skip() -> None:
    try:
        command = [*OWN_DISK, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        probe = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:
        pytest.skip(f"no unshare: {error}")
    if probe.returncode != 0:
        pytest.skip(f"no disk of one's own without privileges here: {probe.stderr.strip()}")


def test_a_full_disk_costs_nothing_but_time(tmp_path: Path) -> None:
    own_disk_or_skip()
    model = dense(tmp_path / "model")
    settings: dict[str, Any] = {"save_every_tokens": 128, "keep_optimizer": True}
    whole = train(run_config(tmp_path, model, **settings))
    (disk := tmp_path / "disk").mkdir()
    config = run_config(tmp_path, model, **settings) | {"output": str(disk / "run")}
    (tmp_path / "train.json").write_text(json.dumps(config))  # JSON is YAML
    (tmp_path / "worker.py").write_text(WORKER)
    worker = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "train.json"), str(disk), str(100 * 1024)]
    finished = subprocess.run(
        [*OWN_DISK, *worker],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    *failed, last = json.loads((tmp_path / "attempts.json").read_text())
    assert last["code"] == 0
    assert len(failed) > 5
    went_on_from = set()
    for attempt in failed:
        assert attempt["code"] == 1
        (said,) = attempt["said"].splitlines()
        if found := re.fullmatch(r"error: cannot write to .* disk is full,.* which goes on from (.*)\.", said):
            went_on_from.add(found[1])
            assert attempt["whole"] == ([] if found[1] == "the start" else [found[1]])
        else:
            assert re.match(r"error: cannot write output .*: No space left on device; make room", said)
    assert len(went_on_from) > 2
    for name in ("model.safetensors", "training_log.jsonl", "optimizer/adamw.safetensors"):
        assert (tmp_path / Path(name).name).read_bytes() == (whole.output / name).read_bytes()
