"""The demo: an experiment that comes with the package and needs nothing but a Python installation."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml

from bamoe.experiments.schema import Experiment, merged

# The same steps on an eighteenth of the tokens: shows that everything runs, and measures nothing.
_QUICK: dict[str, Any] = {
    "name": "Branch-Attend-Mix, the quick demo",
    "description": "Far too few tokens to learn from: the numbers mean nothing, only that every step runs.",
    "builtin_characters": 400_000,
    "batch_tokens": 2048,
    "validations": 2,
    "seed": {"tokens": 330_000},
    "branches": {"tokens": 82_000},
    "mixture": {"tokens": 82_000},
}


def demo_experiment(seed: int = 0, quick: bool = False) -> Experiment:
    """The demo with a random seed of its own, or in its quick form."""
    content = yaml.safe_load(files("bamoe.experiments").joinpath("demo.yaml").read_text(encoding="utf-8"))
    return Experiment.read(merged(content, {**(_QUICK if quick else {}), "seeds": [seed]}))
