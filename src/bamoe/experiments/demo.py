"""The demo: Branch-Attend-Mix from nothing to a table, on text that any Python installation carries.

A seed, three experts branched from it (BAM, section 3), three ways to mix the four, and two dense models that go on
with the same text instead. Every step is one of the commands a user has: its recipe or training config lies beside its
result, and `bamoe upcycle` or `bamoe train` repeats it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from bamoe.data.builtin import DOMAINS
from bamoe.errors import ConfigError
from bamoe.experiments.demo_steps import (
    generate_sample,
    make_untrained,
    measure,
    take_corpora,
    train_from,
    upcycle_from,
    write_corpora,
)
from bamoe.experiments.steps import Listener, Step, run_steps

GENERAL, *BRANCHES = DOMAINS
_SETTINGS_FILE = "demo.json"
_STEPS = "steps"
_PHASES = 3


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains, and for how long; tokens are rounded down to whole steps.

    Learning rates are peaks. Branches, mixtures and the dense baselines all start from a trained model, and share
    half the seed's peak (the paper's choice for branches).
    """

    seed: int = 0
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 128
    vocab_size: int = 512
    sequence_length: int = 128
    corpus_characters: int = 4_000_000
    seed_tokens: int = 6_000_000
    branch_tokens: int = 1_500_000
    mixture_tokens: int = 1_500_000
    batch_tokens: int = 4096
    learning_rate: float = 4e-3
    continued_learning_rate: float = 2e-3
    validations: int = 6
    quick: bool = False


def quick_settings(seed: int = 0) -> DemoSettings:
    """The same steps on an eighteenth of the tokens: shows that everything runs, and measures nothing."""
    return DemoSettings(
        seed=seed,
        corpus_characters=400_000,
        seed_tokens=330_000,
        branch_tokens=82_000,
        mixture_tokens=82_000,
        batch_tokens=2048,
        validations=2,
        quick=True,
    )


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    read: tokens of each domain in its own training. inherited: the rows whose training it builds on.
    recipe: of its upcycling, if it is a mixture.
    """

    key: str
    name: str
    read: dict[str, float]
    learning_rate: float
    inherited: tuple[str, ...] = ()
    recipe: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of its own training."""
        return round(sum(self.read.values()))

    @property
    def start(self) -> tuple[str, str]:
        """The step that makes the model it starts from, and that model's folder."""
        if self.recipe is not None:
            return f"upcycle {self.key}", f"{self.key}/untrained"
        return ("train seed", "seed/model") if self.inherited else ("untrained", "untrained")

    @property
    def same_batches(self) -> bool:
        """Whether its training is that of the mixtures: the dense baseline on the mixture tokens is, too."""
        return self.recipe is not None or self.key == "dense-mixture"

    @property
    def phase(self) -> int:
        """0: seed; 1: branches, and the dense model on all tokens; 2: mixture."""
        return 2 if self.same_batches else min(len(self.inherited), 1)


def demo_rows(settings: DemoSettings) -> list[Row]:
    """The rows of the comparison, in the order of the table."""
    seed_mix = {GENERAL: 0.7, **dict.fromkeys(BRANCHES, 0.1)}
    even_mix = dict.fromkeys(DOMAINS, 0.25)
    branch_mixes = {branch: {GENERAL: 0.1, branch: 0.9} for branch in BRANCHES}
    mixture, rate = _times(even_mix, settings.mixture_tokens), settings.continued_learning_rate
    branches = {branch: _times(mix, settings.branch_tokens) for branch, mix in branch_mixes.items()}
    everything = {domain: sum(read.get(domain, 0.0) for read in (*branches.values(), mixture)) for domain in DOMAINS}
    seeded = ("seed",)
    mixed = ("seed", *BRANCHES)
    return [
        Row("seed", "seed", _times(seed_mix, settings.seed_tokens), settings.learning_rate),
        *(Row(branch, f"expert: {branch}", read, rate, seeded) for branch, read in branches.items()),
        Row("dense-mixture", "dense, mixture tokens", mixture, rate, seeded),
        Row("dense-all", "dense, all tokens", everything, rate, seeded),
        Row("btx", "BTX", mixture, rate, mixed, {"recipe": "btx"}),
        Row("bam-kv-sharing", "BAM, KV sharing", mixture, rate, mixed, _bam("shared")),
        Row("bam-kv-experts", "BAM, KV experts", mixture, rate, mixed, _bam("experts")),
    ]


def run_demo(
    out: str | Path,
    settings: DemoSettings | None = None,
    *,
    corpora: str | Path | None = None,
    workers: int | None = None,
    force: bool = False,
    listener: Listener = lambda event, step, seconds: None,
) -> dict[str, Any]:
    """Run whatever is not done yet in the folder `out` and return the results, which are also written there.

    `out` gets results.json, results.md and training.png, and for each row a folder with its recipe, training config
    and model. The same call goes on with an interrupted demo.

    Args:
        corpora: a folder of other text to read, with NAME.train.jsonl and NAME.valid.jsonl for each domain.
        workers: processes; by default one per core, at most as many as there are rows to train at once. 0 trains in
            this process.
        force: start again, deleting what an earlier demo left in `out`.
        listener: told of every step kept, started and finished.

    Raises:
        ConfigError: `out` holds something else, or a demo with other settings.
        BamoeError: a step failed.
    """
    from bamoe.experiments.demo_results import write_results

    # Absolute, so that the recipes and configs work from any folder.
    out, settings = Path(out).expanduser().absolute(), settings or DemoSettings()
    rows = demo_rows(settings)
    _claim(out, settings, rows, force)
    source = None if corpora is None else Path(corpora).expanduser().absolute()
    steps = [*_first_steps(out, settings, source), *_row_steps(out, settings, rows), _sample_step(out, settings)]
    workers = min(_cores(), len(BRANCHES) + 2) if workers is None else workers
    return write_results(out, settings, rows, run_steps(steps, out / _STEPS, workers=workers, listener=listener))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _claim(out: Path, settings: DemoSettings, rows: list[Row], force: bool) -> None:
    """Make `out` this demo's folder, or find that it already is."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose a folder")
    marker, wanted = out / _SETTINGS_FILE, asdict(settings)
    if marker.is_file():
        try:
            found = dict(json.loads(marker.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(f"{marker} does not hold a demo's settings; choose another folder") from error
        different = [
            f"{key} {found.get(key)!r}, now {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]
        ]
        if different and not force:
            raise ConfigError(
                f"{out} holds a demo with other settings ({'; '.join(different)}); choose another folder, or --force "
                "to start again there"
            )
        if force:
            for name in (_STEPS, "data", "untrained", *(row.key for row in rows)):
                shutil.rmtree(out / name, ignore_errors=True)
    elif out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} holds files that no demo wrote; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another folder") from error


def _first_steps(out: Path, settings: DemoSettings, source: Path | None) -> list[Step]:
    data, untrained = out / "data", out / "untrained"
    corpora: dict[str, Any] = {"directory": str(data)}
    if source is None:
        corpora |= {"seed": settings.seed, "max_characters": settings.corpus_characters}
    else:
        corpora |= {"source": str(source)}
    shape = {
        key: getattr(settings, key)
        for key in (
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
            *("sequence_length", "seed"),
        )
    }
    return [
        Step("data", write_corpora if source is None else take_corpora, corpora, makes=[data]),
        Step(
            "untrained",
            make_untrained,
            {
                "data": str(data),
                "shares": {GENERAL: 0.7, **dict.fromkeys(BRANCHES, 0.1)},
                "out": str(untrained),
                **shape,
            },
            needs=["data"],
            makes=[untrained / "config.json"],
        ),
    ]


def _row_steps(out: Path, settings: DemoSettings, rows: list[Row]) -> list[Step]:
    """Each row's upcycling, training and measuring; the longest training first where several can start."""
    builds, trainings, measurements = [], [], []
    for row in rows:
        folder = out / row.key
        folder.mkdir(exist_ok=True)
        start, start_folder = row.start
        if row.recipe is not None:
            file, text = _write_yaml(folder / "upcycle.yaml", _recipe(out, row.recipe, settings))
            builds.append(
                Step(
                    start,
                    upcycle_from,
                    {"recipe": str(file), "out": str(out / start_folder)},
                    needs=[f"train {name}" for name in row.inherited],
                    makes=[out / start_folder / "config.json"],
                    inputs=text,
                )
            )
        file, text = _write_yaml(folder / "train.yaml", _training(out, row, settings))
        model = folder / "model"
        trainings.append(
            Step(
                f"train {row.key}",
                train_from,
                {"config": str(file), "output": str(model)},
                needs=[start],
                makes=[model / "config.json"],
                inputs=text,
            )
        )
        measured = {"model": str(model), "data": _data(out, "valid"), "sequence_length": settings.sequence_length}
        measurements.append(Step(f"measure {row.key}", measure, measured, needs=[f"train {row.key}"]))
    by_name = {step.name: step for step in trainings}
    branches = [by_name.pop(f"train {name}") for name in ("seed", *BRANCHES)]
    longest = by_name.pop("train dense-all")
    # The branches hold up the mixtures; the measurements hold up nothing.
    return [*branches, *builds, longest, *reversed(by_name.values()), *measurements]


def _sample_step(out: Path, settings: DemoSettings) -> Step:
    arguments = {"model": str(out / "bam-kv-experts" / "model"), "prompts": _PROMPTS, "seed": settings.seed}
    return Step("sample", generate_sample, arguments, needs=["train bam-kv-experts"])


_PROMPTS = {
    "general": "Return the",
    "code": "def __init__(self",
    "law": "The above copyright notice",
    "math": "Question: Noor has 24 apples.",
}


def _recipe(out: Path, recipe: dict[str, Any], settings: DemoSettings) -> dict[str, Any]:
    """Experts: the seed, which read general text, and the three branches. One feed-forward expert per token with its
    true probability: BAM's routing, for BTX too, so that the mixtures differ in attention only."""
    models = {GENERAL: "seed", **{branch: branch for branch in BRANCHES}}
    return {
        **recipe,
        "seed": str(out / "seed" / "model"),
        "experts": [{"name": name, "model": str(out / folder / "model")} for name, folder in models.items()],
        "feed_forward": {"num_experts_per_tok": 1, "norm_topk_prob": False},
        "router": {"init": "random", "std": 0.02, "seed": settings.seed},
    }


def _training(out: Path, row: Row, settings: DemoSettings) -> dict[str, Any]:
    paths = _data(out, "train")
    return {
        "model": str(out / row.start[1]),
        "output": str(out / row.key / "model"),
        "data": [
            {"name": name, "path": paths[name], "weight": tokens / row.tokens} for name, tokens in row.read.items()
        ],
        "sequence_length": settings.sequence_length,
        "tokens": row.tokens,
        "batch_tokens": settings.batch_tokens,
        "learning_rate": row.learning_rate,
        "schedule": {"warmup_tokens": row.tokens // 10, "decay": "cosine", "final": 0.1},
        # Each phase draws its text anew; with one seed the mixture would read again what a branch read first.
        "seed": _PHASES * settings.seed + row.phase,
        "validation": [{"name": name, "path": path} for name, path in _data(out, "valid").items()],
        "evaluate_every_tokens": row.tokens // settings.validations,
        "log_every_steps": 4,
        "save_every_tokens": max(settings.batch_tokens, row.tokens // 4),
    }


def _bam(key_value: str) -> dict[str, Any]:
    return {"recipe": "bam", "attention": {"key_value": key_value, "routing": "soft"}}


def _times(mix: dict[str, float], tokens: int) -> dict[str, float]:
    return {domain: share * tokens for domain, share in mix.items()}


def _data(out: Path, part: str) -> dict[str, str]:
    return {domain: str(out / "data" / f"{domain}.{part}.jsonl") for domain in DOMAINS}


def _write_yaml(path: Path, content: dict[str, Any]) -> tuple[Path, str]:
    text = yaml.safe_dump(content, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path, text
