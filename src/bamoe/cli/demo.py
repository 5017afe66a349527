"""`bamoe demo`: the experiment that comes with the package, on text that any Python installation carries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bamoe.cli.run import run_with_progress


def demo(
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="A folder for everything. [default: bamoe-demo, or bamoe-demo-quick]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="All steps on very little text, in two minutes.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=10**9, metavar="N", help="Of the text, the weights and the order of training.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Delete an earlier demo in OUT and start again.")] = False,
) -> None:
    """Branch, train, mix: a seed, three experts, BTX and BAM, trained here in about ten minutes and compared.

    It is an experiment as `bamoe run` runs them: OUT/experiment.yaml is its file. An interrupted demo goes on where it
    stopped when it is called again.
    """
    from bamoe.experiments.demo import demo_experiment
    from bamoe.experiments.run import run_experiment

    out = out or Path("bamoe-demo-quick" if quick else "bamoe-demo")
    record = run_with_progress(run_experiment, demo_experiment(seed, quick), out, force=force)
    if record is not None and quick:
        typer.echo(f"\n{record.description}")
    for domain, text in (record.samples if record is not None else {}).items():
        typer.echo(f"\n[{domain}] {text}")
