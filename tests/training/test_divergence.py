"""A run that diverges leaves its last good checkpoint, whatever the intervals of logging, saving and evaluating."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from bamoe.errors import BamoeError
from bamoe.training import train
from tests.training.tiny import dense, mixture, run_config


class NanGradient(TrainerCallback):
    """The gradient of one step is not a number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            model.get_input_embeddings().weight.grad[7] = torch.nan


def finite(path: Path) -> bool:
    return all(bool(weight.isfinite().all()) for weight in load_file(path).values())


@pytest.mark.parametrize("make", [dense, mixture])
def test_no_checkpoint_of_broken_weights_is_written(tmp_path: Path, make: Any) -> None:
    model = make(tmp_path / "model")
    settings = {"log_every_steps": 100, "save_every_tokens": 128}
    whole = train(run_config(tmp_path, model, output=str(tmp_path / "whole"), **settings))
    config = run_config(tmp_path, model, **settings)
    with pytest.raises(BamoeError, match=r"the weights hold NaN or Inf at step 6: training diverged.*learning_rate"):
        train(config, callbacks=[NanGradient(5)])
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    assert finite(checkpoints / "checkpoint-4" / "model.safetensors")
    resumed = train(config)
    expected, found = (load_file(run.output / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_a_last_step_that_fails_is_not_the_model(tmp_path: Path) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"), save_every_tokens=192)
    with pytest.raises(BamoeError, match="the weights hold NaN or Inf at step 10"):
        train(config, callbacks=[NanGradient(10)])
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-9"]
    assert finite(tmp_path / "run" / "checkpoints" / "checkpoint-9" / "model.safetensors")


def test_weights_another_callback_breaks_are_not_saved(tmp_path: Path) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 4:
                with torch.no_grad():
                    model.get_input_embeddings().weight[7] = torch.inf

    config = run_config(tmp_path, dense(tmp_path / "model"), log_every_steps=100, save_every_tokens=256)
    with pytest.raises(BamoeError, match="the weights hold NaN or Inf at step 4"):
        train(config, callbacks=[Break()])
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_broken_weights_are_a_divergence_before_they_are_evaluated(tmp_path: Path) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"), log_every_steps=100, save_every_tokens=640)
    validation = [{"name": "sea", "path": str(tmp_path / "sea.jsonl")}]
    with pytest.raises(BamoeError, match="the weights hold NaN or Inf at step 3: training diverged"):
        train(config | {"validation": validation, "evaluate_every_tokens": 192}, callbacks=[NanGradient(2)])
