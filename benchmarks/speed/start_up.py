"""Start-up: how long `bamoe` takes before it does anything, beside Python's own start and an import of torch."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from child_process import run
from harness import Bench, Part, Result
from shapes import Shape, dense_config, model_of

from bamoe.reports.table import Column

TINY = Shape(width=64, depth=2, heads=4, inner=128, vocabulary=64, batch=1, context=64)
PYTHON = "python -c pass"


@dataclass(frozen=True)
class Command:
    """Arguments of Python, and the exit code that they must end with."""

    arguments: tuple[str, ...]
    threads: int
    code: int = 0

    def __call__(self) -> None:
        run([sys.executable, *self.arguments], self.threads, self.code)

    def modules(self) -> set[str]:
        """Names of all that Python imports on the way."""
        told = run([sys.executable, "-X", "importtime", *self.arguments], self.threads, self.code)
        return set(re.findall(r"^import time:\s*\d+ \|\s*\d+ \|\s*(\S+)$", told, re.MULTILINE))


def commands(bench: Bench) -> dict[str, Command]:
    """What is started."""
    recipe, model = bench.work / "recipe.yaml", bench.work / "model"
    recipe.write_text("recipe: bam\nsede: misspelt\n", encoding="utf-8")
    model_of(dense_config(TINY), bench).save_pretrained(model)
    return {
        PYTHON: Command(("-c", "pass"), bench.threads),
        "import bamoe": Command(("-c", "import bamoe"), bench.threads),
        "bamoe --help": Command(("-m", "bamoe", "--help"), bench.threads),
        "bamoe upcycle, recipe refused": Command(("-m", "bamoe", "upcycle", str(recipe), "out"), bench.threads, 1),
        "bamoe inspect, tiny Llama": Command(("-m", "bamoe", "inspect", str(model)), bench.threads),
        "import torch": Command(("-c", "import torch"), bench.threads),
    }


def measure(bench: Bench) -> list[Result]:
    """Seconds of each command, over those of Python alone."""
    started = commands(bench)
    modules = {name: command.modules() for name, command in started.items()}
    turns = bench.turns(started, turns=None if bench.full else 3)
    records = [
        {
            "name": name,
            "seconds": turns.median(name),
            **turns.ratio(name, PYTHON),
            "modules": len(modules[name]),
            "torch": "yes" if "torch" in modules[name] else "no",
        }
        for name in started
    ]
    columns = [
        Column("name", "command", "text"),
        Column("seconds", "s", "fine"),
        Column("ratio", "over Python alone"),
        Column("quartiles", "quartiles", "text"),
        Column("modules", "modules imported", "amount"),
        Column("torch", "torch among them", "text"),
    ]
    reading = "Whole processes; less is better. To reach: `bamoe --help` in at most 0.5 s, without torch."
    settings = {"Python": sys.version.split()[0], "files": "in the page cache", **TINY.settings()}
    return [Result("Start-up", columns, records, settings, reading)]


PART = Part("start_up", measure, needs_cpu=True)
