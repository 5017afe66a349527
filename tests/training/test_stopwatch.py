"""`TrainResult.seconds`: the time of the steps that made the model, each counted once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback

from bamoe.training import train
from tests.training.test_resume import StopError
from tests.training.tiny import dense, run_config


class FakeTime(TrainerCallback):
    """A clock that a step moves by one second, an evaluation or a checkpoint by 1000."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.now = 0.0
        self.stop_at = stop_at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now += 1
        if state.global_step == self.stop_at:
            raise StopError

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now += 1000

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now += 1000


def test_seconds_are_those_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"), save_every_tokens=128)
    config |= {"validation": [{"name": "sea", "path": str(tmp_path / "sea.jsonl")}], "evaluate_every_tokens": 192}

    def timed(clock: FakeTime, **changes: Any) -> float:
        monkeypatch.setattr("bamoe.training.stopwatch.time", SimpleNamespace(perf_counter=lambda: clock.now))
        return train(config | changes, callbacks=[clock]).seconds

    assert timed(FakeTime(), output=str(tmp_path / "whole")) == 10
    for step in (5, 6, 7):  # from checkpoints 4, 4 (it stops before 6 is saved) and 6
        with pytest.raises(StopError):
            timed(FakeTime(stop_at=step))
    assert timed(FakeTime()) == 10


def test_seconds_of_a_real_clock(tmp_path: Path) -> None:
    assert train(run_config(tmp_path, dense(tmp_path / "model"))).seconds > 0
