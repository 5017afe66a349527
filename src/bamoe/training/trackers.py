"""Where the log also goes while a run goes on: TensorBoard by default, any tracker of transformers by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from bamoe.errors import ConfigError


class EventFiles(TensorBoardCallback):
    """TensorBoard's event files in `directory`; what an earlier part wrote past the checkpoint is not shown."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(log_dir=str(self.directory), purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


@contextmanager
def closed(callbacks: Sequence[TrainerCallback]) -> Iterator[None]:
    """Close event files at the end of the block, also where training does not come to its own end."""
    try:
        yield
    finally:
        for callback in callbacks:
            if isinstance(callback, EventFiles) and callback.tb_writer is not None:
                callback.tb_writer.close()


def trackers(names: Sequence[str], event_files: Path) -> list[TrainerCallback]:
    """One callback for each name. Raises ConfigError for a name that is unknown or a package that is missing."""
    callbacks: list[TrainerCallback] = []
    for name in names:
        try:
            (kind,) = get_reporting_integration_callbacks([name])
            callbacks.append(EventFiles(event_files) if kind is TensorBoardCallback else kind())
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(f"report_to: {error} Write report_to: [] for none.") from error
    return callbacks
