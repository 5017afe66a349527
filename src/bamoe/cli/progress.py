"""What the command line shows while steps run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from bamoe.experiments.steps import Event, Step


class StepProgress:
    """A line for every finished step and, on a terminal, what is running."""

    def __init__(self, console: Console) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.display = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
        )
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> StepProgress:
        self.display.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.display.stop()

    def tell(self, event: Event, step: Step, seconds: float) -> None:
        """Show one event of the run."""
        if event == "started":
            self.tasks[step.name] = self.display.add_task(step.name)
            return
        if event == "finished":
            self.display.remove_task(self.tasks.pop(step.name))
        note = "done before" if event == "kept" else f"{seconds:.0f} s"
        self.display.console.print(f"{step.name:<36} {note}")
