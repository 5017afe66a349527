"""The time that training steps take, over all parts of a resumed run."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class Stopwatch(TrainerCallback, ExportableState):
    """Wall-clock seconds of the steps, reading their data included, without evaluations and checkpoints.

    They are kept in the Trainer's state, so that steps which are lost with a killed process count once.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = state.stateful_callbacks or {}
        if state.global_step > 0 and type(self).__name__ in kept:
            self.seconds = kept[type(self).__name__]["attributes"]["seconds"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stops = control.should_save or control.should_evaluate or state.global_step >= state.max_steps
        if self._started is None or not stops:
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the device may still be at it
        self.seconds += time.perf_counter() - self._started
        self._started = None
