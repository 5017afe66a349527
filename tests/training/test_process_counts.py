"""A run goes on with another number of processes than it was interrupted with: 2 to 1, and 1 to 2."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bamoe.training import train
from tests.training.test_processes import run_two
from tests.training.test_resume import StopAt, StopError
from tests.training.test_train import log_of
from tests.training.tiny import mixture, run_config

WORKER = """
import contextlib, json, sys
import torch
from bamoe.training import train
from tests.training.test_resume import StopAt, StopError
torch.set_num_threads(1)
interrupted, resumed = json.load(open(sys.argv[1]))
with contextlib.suppress(StopError):
    train(interrupted, callbacks=[StopAt(5)])
train(resumed)
"""


def test_checkpoints_of_two_processes_and_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(tmp_path / "model")
    stages = [{"trainable": ["routers", "experts"], "until_tokens": 896}, {"trainable": "all"}]
    settings: dict[str, Any] = {"batch_tokens": 128, "tokens": 1280, "save_every_tokens": 512, "stages": stages}
    settings |= {"keep_optimizer": True}
    names = ("whole", "two-then-one", "one-then-two")
    whole, from_two, from_one = (run_config(tmp_path, model, output=str(tmp_path / name), **settings) for name in names)
    expected = log_of(train(whole).log)
    with pytest.raises(StopError):
        train(from_one, callbacks=[StopAt(5)])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=":")
    run_two(WORKER, tmp_path, [from_two, from_one])
    assert (tmp_path / "two-then-one" / "checkpoints" / "checkpoint-4" / "rng_state_1.pth").exists()
    train(from_two)
    for name in names[1:]:
        log = log_of(tmp_path / name / "training_log.jsonl")
        assert [entry["tokens"] for entry in log] == [entry["tokens"] for entry in expected]
        for one, other in zip(expected, log, strict=True):
            assert one.keys() == other.keys()
            keys = [key for key in one if key != "grad_norm"]
            np.testing.assert_allclose([other[key] for key in keys], [one[key] for key in keys], rtol=1e-4, atol=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            path.name for path in (tmp_path / "whole").iterdir()
        }
