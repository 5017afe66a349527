"""`bamoe run`: an experiment from its file to its report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bamoe.cli.progress import StepProgress

if TYPE_CHECKING:
    from bamoe.reports.record import ExperimentRecord


def run(
    experiment: Annotated[
        Path,
        typer.Argument(metavar="EXPERIMENT.yaml", help="The three phases and the variants; see docs/experiments.md."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for everything.")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="STEP",
            help='Run these steps alone, such as "branch/code" or "run-1/*"; "report" for the report. May be repeated.',
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the rows, their budgets and the steps; run nothing.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Steps side by side [default: one per GPU, or per core].")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Do the steps again, all or those of --only, deleting what they had left.")
    ] = False,
) -> None:
    """Branch, mix, train, evaluate and report, whatever of it is not done yet.

    The same command goes on with an interrupted experiment, and does again what depends on a change in EXPERIMENT.yaml.
    """
    if dry_run:
        _show_plan(experiment, out)
        return
    from bamoe.experiments.run import REPORT, run_experiment

    record = run_with_progress(run_experiment, experiment, out, only=only or (), workers=workers, force=force)
    if record is None:
        typer.echo(f"done; other steps are left: `bamoe run {experiment} {out}` runs them and writes the {REPORT}")


def run_with_progress(run_experiment: Any, experiment: Any, out: Path, **options: Any) -> ExperimentRecord | None:
    """Run an experiment with a line per finished step, and print its tables."""
    from rich.console import Console

    from bamoe.reports.content import terminal_tables

    console = Console(highlight=False)
    start = time.monotonic()
    try:
        with StepProgress(console) as progress:
            record: ExperimentRecord | None = run_experiment(experiment, out, listener=progress.tell, **options)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise typer.Exit(1) from None
    if record is not None:
        for title, table in terminal_tables(record):
            console.print()
            console.print(table.rich(title))
        minutes, seconds = divmod(round(time.monotonic() - start), 60)
        console.print(
            f"\n{minutes} min {seconds} s. The report: {out / 'report.html'}, {out / 'report.md'}; "
            f"the numbers: {out / 'results.json'}.",
            markup=False,
            soft_wrap=True,
        )
    return record


def _show_plan(path: Path, out: Path) -> None:
    from rich.console import Console

    from bamoe.experiments.run import plan
    from bamoe.experiments.schema import Experiment
    from bamoe.reports.table import Column, Table

    experiment = Experiment.read(path)
    rows, states = plan(experiment, out)
    columns = [
        Column("key", "row", "text"),
        Column("budget", "budget", "text"),
        Column("total", "params", "amount"),
        Column("active", "active", "amount"),
        Column("tokens", "own tokens", "amount"),
        Column("flops", "own FLOPs", "amount"),
    ]
    records = [
        {
            "key": row.key,
            "budget": row.budget,
            "total": row.costs.parameters.total,
            "active": row.costs.parameters.active,
            "tokens": row.tokens,
            "flops": None if row.tokens is None else row.flops_per_token * row.tokens,
        }
        for row in rows
    ]
    console = Console(highlight=False)
    console.print(Table(columns, records).rich(f"{experiment.name}: what each row gets, per random seed"))
    for state, meaning in (("done", ""), ("to do", ""), ("changed", ", which would be deleted and done again")):
        if names := [name for name, found in states.items() if found == state]:
            console.print(f"\n{len(names)} steps {state}{meaning}: {', '.join(names)}", markup=False)
