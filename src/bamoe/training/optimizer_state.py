"""AdamW's state as a file beside a model, by parameter name: `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bamoe.errors import CheckpointError, CompatibilityError

# In a folder of its own: serving engines read every safetensors file that lies beside a config.json as weights.
OPTIMIZER_STATE = Path("optimizer", "adamw.safetensors")


def save_optimizer_state(path: Path, model: nn.Module, optimizer: Optimizer, write: bool) -> None:
    """Write the state of every parameter that was trained; of several processes all call this and one writes."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if write:
                state[f"{kind}/{name}"] = whole.detach().cpu().contiguous()
    if write:
        path.parent.mkdir(exist_ok=True)
        save_file(state, path)


def load_optimizer_state(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Give an optimizer the state in `path`, in parts where its parameters are; what is not there gets none."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    content: dict[str, Any] = optimizer.state_dict()
    with safe_open(path, "pt") as file:
        kept = set(file.keys())
        for number, parameter in enumerate(parameters):
            values = {
                kind: _like(parameter, file.get_tensor(key))
                for kind in ("step", "exp_avg", "exp_avg_sq")
                if (key := f"{kind}/{names[parameter]}") in kept
            }
            if values:
                content["state"][number] = values
    # Puts every value on its parameter's device, in its dtype.
    optimizer.load_state_dict(content)


class KeptOptimizerState(TrainerCallback):
    """Starts a run, but not a resumed one, from the state in `path`; a parameter that is not there starts with none.

    Raises:
        CheckpointError: nothing there, or nothing that can be read.
        CompatibilityError: the state is of parameters that `model` does not have, or has in another shape.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        _check(path, model)
        self.path = path

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step == 0 and model is not None and optimizer is not None:
            load_optimizer_state(self.path, model, optimizer)


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` sharded as its parameter is; the step count, a scalar, is whole everywhere."""
    if value.dim() == 0 or not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _check(path: Path, model: nn.Module) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"there is no optimizer state in {path}; train that model with keep_optimizer: true, or use "
            "optimizer_state: reset"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = []
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no mapping
                kind, _, name = key.partition("/")
                shape = tuple(file.get_slice(key).get_shape())
                if name not in shapes:
                    problems.append(f"{name} is not in the model")
                elif kind != "step" and shape != shapes[name]:
                    problems.append(f"{name} has the shape {shape} there and {shapes[name]} in the model")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}; use optimizer_state: reset") from error
    if problems:
        raise CompatibilityError(
            f"the optimizer state in {path} belongs to another model, use optimizer_state: reset. Of {len(problems)} "
            f"tensors that do not fit, the first: {min(problems)}"
        )
