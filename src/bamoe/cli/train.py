"""`bamoe train`: continue the pre-training of a dense model or a mixture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The training config; see docs/training.md.")],
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run found in the output.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Delete what an earlier run left in the output.")] = False,
) -> None:
    """Train a dense model or a mixture on weighted corpora; the same command resumes an interrupted run."""
    from bamoe.training import TrainConfig
    from bamoe.training import train as run_training

    result = run_training(TrainConfig.read(config), resume=resume, force=force)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        took = f"{result.tokens:,} tokens in {result.steps:,} steps"
        dropped = result.dropped_assignments
        end = "" if dropped is None else f", {dropped:.1%} of the assignments over capacity and dropped"
        typer.echo(f"{result.output}: {took}, last loss {result.final_loss:.4f}{end}")
