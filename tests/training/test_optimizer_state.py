"""AdamW's state kept from one run to the next, by parameter name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from bamoe.errors import BamoeError, CheckpointError, CompatibilityError
from bamoe.training import train
from tests.training.tiny import dense, mixture, run_config

STATE = Path("optimizer", "adamw.safetensors")
CONSTANT = {"schedule": {"decay": "constant"}, "max_grad_norm": 0.0}


class FirstStep(TrainerCallback):
    """Weights, gradients and step counts around the first step."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.after: dict[str, torch.Tensor] = {}
        self.steps: dict[str, int] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            for name, weight in model.named_parameters():
                self.before[name], self.gradients[name] = weight.detach().clone(), weight.grad.clone()

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if state.global_step == 0:
            for name, weight in model.named_parameters():
                self.after[name], self.steps[name] = weight.detach().clone(), int(optimizer.state[weight]["step"])


@pytest.mark.parametrize("make", [dense, mixture])
def test_a_run_goes_on_with_the_moments_of_another(tmp_path: Path, make: Any) -> None:
    first = train(run_config(tmp_path, make(tmp_path / "model"), keep_optimizer=True, **CONSTANT)).output
    kept = load_file(first / STATE)
    watch = FirstStep()
    second = run_config(tmp_path, first, output=str(tmp_path / "second"), optimizer_state="keep", **CONSTANT)
    train(second, callbacks=[watch])
    assert {name.partition("/")[2] for name in kept} == watch.before.keys()
    for name, gradient in watch.gradients.items():
        assert kept[f"step/{name}"] == 10
        assert watch.steps[name] == 11
        mean = 0.9 * kept[f"exp_avg/{name}"] + 0.1 * gradient
        square = 0.95 * kept[f"exp_avg_sq/{name}"] + 0.05 * gradient.square()
        decay = 0.0 if "norm" in name else 0.1
        update = mean / (1 - 0.9**11) / ((square / (1 - 0.95**11)).sqrt() + 1e-8)
        expected = watch.before[name] * (1 - 1e-2 * decay) - 1e-2 * update
        torch.testing.assert_close(watch.after[name], expected, rtol=1e-4, atol=1e-6)


def test_without_asking_a_run_starts_afresh(tmp_path: Path) -> None:
    first = train(run_config(tmp_path, dense(tmp_path / "model"), keep_optimizer=True)).output
    watch = FirstStep()
    train(run_config(tmp_path, first, output=str(tmp_path / "second")), callbacks=[watch])
    assert set(watch.steps.values()) == {1}
    assert not (tmp_path / "second" / "optimizer").exists()


def test_what_was_frozen_starts_without_state(tmp_path: Path) -> None:
    settings = {"trainable": "routers", "keep_optimizer": True}
    first = train(run_config(tmp_path, mixture(tmp_path / "model"), **settings)).output
    assert all(name.endswith("gate.weight") for name in load_file(first / STATE))
    watch = FirstStep()
    train(run_config(tmp_path, first, output=str(tmp_path / "second"), optimizer_state="keep"), callbacks=[watch])
    assert {steps for name, steps in watch.steps.items() if "gate.weight" in name} == {11}
    assert {steps for name, steps in watch.steps.items() if "gate.weight" not in name} == {1}


@pytest.mark.parametrize(
    ("make", "changes", "error", "message"),
    [
        (mixture, {}, CompatibilityError, r"belongs to another model.*mlp\.down_proj.* is not in the model"),
        (dense, {"intermediate_size": 64}, CompatibilityError, r"shape \(32, 48\) there and \(32, 64\) in the model"),
        (dense, {"num_hidden_layers": 1}, CompatibilityError, r"layers\.1\..* is not in the model"),
        (dense, None, CheckpointError, "no optimizer state in .*keep_optimizer: true"),
        (dense, b"half", CheckpointError, "truncated or corrupt"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    tmp_path: Path, make: Any, changes: Any, error: type[BamoeError], message: str
) -> None:
    first = train(run_config(tmp_path, dense(tmp_path / "model"), keep_optimizer=True)).output
    other = make(tmp_path / "other", **(changes if isinstance(changes, dict) else {}))
    content = (first / STATE).read_bytes() if isinstance(changes, dict) else changes
    if content is not None:
        (other / STATE).parent.mkdir()
        (other / STATE).write_bytes(content)
    with pytest.raises(error, match=message):
        train(run_config(tmp_path, other, output=str(tmp_path / "second"), optimizer_state="keep"))
    assert not (tmp_path / "second").exists()
