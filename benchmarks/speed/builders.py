"""The commands that make mixtures of dense models: `bamoe upcycle`, and mergekit-moe in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from child_process import Program, python_program, run
from harness import Bench

MERGEKIT = "mergekit==0.1.5"
DTYPE = torch.bfloat16  # of all weights read and written

Recipe = Callable[[Sequence[Path]], dict[str, Any]]


@dataclass(frozen=True)
class Builder:
    """A program that makes a mixture: its arguments are `before`, the recipe, the output and `after`."""

    program: Program
    recipe: Recipe
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def arguments(self, inputs: Sequence[Path], out: Path) -> list[str | Path]:
        """Of the program; the recipe is written beside `out`."""
        recipe = out.with_suffix(".yaml")
        recipe.write_text(json.dumps(self.recipe(inputs)), encoding="utf-8")  # JSON is YAML
        return [*self.before, recipe, out, *self.after]

    def build(self, inputs: Sequence[Path], out: Path) -> None:
        """The mixture, by a process of its own."""
        self.program.run(self.arguments(inputs, out))


def bam_recipe(inputs: Sequence[Path], key_value: str) -> dict[str, Any]:
    """All models as experts, the first as the seed."""
    experts = [{"name": path.name, "model": str(path)} for path in inputs]
    return {"recipe": "bam", "seed": str(inputs[0]), "experts": experts, "attention": {"key_value": key_value}}


def mergekit_recipe(inputs: Sequence[Path]) -> dict[str, Any]:
    """mergekit-moe's own file, which `bamoe upcycle` reads too: the feed-forwards of all around the first model."""
    experts = [{"source_model": str(path)} for path in inputs]
    keys = {"gate_mode": "random", "experts_per_token": 2, "dtype": str(DTYPE).removeprefix("torch.")}
    return {"base_model": str(inputs[0]), "experts": experts, **keys}


def bamoe_builders(bench: Bench) -> dict[str, Builder]:
    """`bamoe upcycle` of each mixture; of BTX from mergekit-moe's file, so that both do the same."""
    recipes: dict[str, Recipe] = {
        "BAM, KV experts": partial(bam_recipe, key_value="experts"),
        "BAM, KV sharing": partial(bam_recipe, key_value="shared"),
        "BTX": mergekit_recipe,
    }
    program = python_program("bamoe", bench.threads)
    return {name: Builder(program, recipe, before=("upcycle",)) for name, recipe in recipes.items()}


def mergekit_builders(bench: Bench) -> dict[str, Builder]:
    """mergekit-moe as it comes, and with its options against holding up to 5 GB of weights before it writes them.

    Raises RuntimeError when it cannot be installed.
    """
    program, shards = installed_mergekit(bench), ("--out-shard-size", "256M")
    options: dict[str, tuple[str, ...]] = {
        "mergekit-moe": (),
        "mergekit-moe, small shards": shards,
    }
    if bench.full:
        options["mergekit-moe, small shards, two writers"] = (*shards, "--async-write", "--write-threads", "2")
    return {name: Builder(program, mergekit_recipe, after=after) for name, after in options.items()}


def installed_mergekit(bench: Bench) -> Program:
    """mergekit-moe in an environment of its own, made once and kept beside the results.

    What it finds here already, torch and transformers above all, it takes from here: the same versions, and nothing of
    gigabytes is fetched. Raises RuntimeError when the rest cannot be installed.
    """
    folder = bench.work.resolve().parent / MERGEKIT.replace("==", "-")
    python, installed = folder / "bin" / "python", folder / "installed"
    if not installed.is_file():
        bench.tell(f"installing {MERGEKIT} in {folder}")
        try:
            venv.create(folder, clear=True, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"no virtual environment: {error}") from error
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "here.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
        run([python, "-m", "pip", "install", "--quiet", MERGEKIT], bench.threads)
        installed.touch()
    return Program(python, "mergekit.scripts.moe", bench.threads)
