"""What the demo found: its table, its plot, and one sentence, all computed from the steps' results."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bamoe.data.builtin import DOMAINS
from bamoe.reports.plots import Curve, Panel, training_curves
from bamoe.reports.table import Column, Table

if TYPE_CHECKING:
    from bamoe.experiments.demo import DemoSettings, Row

QUICK_NOTICE = (
    "This is the quick demo: every model is far too young for its numbers to mean anything. It shows that all steps "
    "run; `bamoe demo` without --quick measures."
)
CAPTION = (
    "Params: parameters in all; active: those used per token. Tokens and FLOPs: all the training behind a row, its own "
    "and that of the models it started from (an expert: seed and branch; a mixture: seed, three branches, mixture; "
    "dense, all tokens: the seed, then the same text as the branches and the mixture). FLOPs: three times a forward "
    "pass per token, 2 per multiply-accumulate. Perplexity per token on held-out text, and the mean over the domains; "
    "best in bold."
)
OWN_EXPERT = "each text by its own expert"
_TRAINING_PASSES = 3  # forward, and twice as much backward


def results_table(results: dict[str, Any]) -> Table:
    """The comparison, one row per model; the last row is no model and does not compete."""
    columns = [
        Column("name", "model", "text"),
        Column("total_parameters", "params", "amount"),
        Column("active_parameters", "active", "amount"),
        Column("tokens", "tokens", "amount"),
        Column("flops", "FLOPs", "amount"),
        *(Column(domain, domain, best="min") for domain in DOMAINS),
        Column("average", "average", best="min"),
    ]
    records = [{**row, **row["perplexity"]} for row in results["rows"]]
    aside = results["own_expert"]
    return Table(
        columns, [*records, {"name": OWN_EXPERT, "aside": True, **aside["perplexity"], "average": aside["average"]}]
    )


def corpora_table(results: dict[str, Any]) -> Table:
    """The text that was read; it differs with what is installed, so sizes and hashes say what it was."""
    columns = [
        Column("name", "text", "text"),
        Column("documents", "documents", "amount"),
        Column("characters", "characters", "amount"),
        Column("sha256", "sha256", "text"),
    ]
    parts = {"train": "training", "valid": "held out"}
    return Table(
        columns,
        [
            {**file, "name": f"{domain}, {parts[part]}", "sha256": file["sha256"][:16]}
            for domain, files in results["corpora"].items()
            for part, file in files.items()
        ],
    )


def write_results(out: Path, settings: DemoSettings, rows: list[Row], found: dict[str, Any]) -> dict[str, Any]:
    """Put the steps' results together; writes results.json, results.md and training.png to `out`."""
    records = [_record(row, rows, settings, found) for row in rows]
    own = {domain: _row(records, "seed" if domain == "general" else domain)["perplexity"][domain] for domain in DOMAINS}
    results = {
        "settings": asdict(settings),
        "versions": {name: importlib.metadata.version(name) for name in ("bamoe", "torch", "transformers")},
        "corpora": found["data"],
        "rows": records,
        "own_expert": {"perplexity": own, "average": sum(own.values()) / len(own)},
        "sample": found["sample"],
        "curves": {row.key: found[f"train {row.key}"] for row in rows},
    }
    results["verdict"] = verdict(results)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(_markdown(results), encoding="utf-8")
    _plot(out / "training.png", rows, results)
    return results


def verdict(results: dict[str, Any]) -> str:
    """One sentence: the better BAM beside BTX on the same tokens, and beside the dense model given all of them."""
    average = {row["key"]: row["average"] for row in results["rows"]}
    name = {row["key"]: row["name"] for row in results["rows"]}
    best = min(("bam-kv-experts", "bam-kv-sharing"), key=average.__getitem__)
    against = [
        f"{_compared(average[best], average[other])} {name[other]} ({average[other]:.2f})"
        for other in ("btx", "dense-mixture", "dense-all")
    ]
    return (
        f"{name[best]} has an average perplexity of {average[best]:.2f}: {', '.join(against[:-1])}, and {against[-1]}."
    )


def _compared(value: float, other: float) -> str:
    change = 100 * (value / other - 1)
    if abs(change) < 0.05:
        return "the same as"
    return f"{abs(change):.1f}% {'below' if change < 0 else 'above'}"


def _record(row: Row, rows: list[Row], settings: DemoSettings, found: dict[str, Any]) -> dict[str, Any]:
    measured = found[f"measure {row.key}"]
    evaluation = measured["evaluation"]
    history = [other for other in rows if other.key in row.inherited] + [row]
    tokens = {part.key: found[f"train {part.key}"]["tokens"] for part in history}
    flops = {key: _TRAINING_PASSES * _flops_per_token(found, key) * count for key, count in tokens.items()}
    return {
        "key": row.key,
        "name": row.name,
        "total_parameters": measured["parameters"]["total"],
        "active_parameters": measured["parameters"]["active"],
        "own_tokens": tokens[row.key],
        "tokens": sum(tokens.values()),
        "own_flops": flops[row.key],
        "flops": sum(flops.values()),
        "perplexity": {domain: evaluation["domains"][domain]["perplexity"] for domain in DOMAINS},
        "average": evaluation["average_perplexity"],
        "average_log_perplexity": evaluation["average_log_perplexity"],
        "routing": evaluation["routing"],
    }


def _flops_per_token(found: dict[str, Any], key: str) -> int:
    return int(found[f"measure {key}"]["flops_per_token"]["total"])


def _row(records: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next(record for record in records if record["key"] == key)


def _markdown(results: dict[str, Any]) -> str:
    notice = [f"**{QUICK_NOTICE}**"] if results["settings"]["quick"] else []
    sample = [f"```text\n{text}\n```" for text in results["sample"].values()]
    parts = [
        "# Branch-Attend-Mix, the demo",
        *notice,
        results_table(results).markdown(),
        CAPTION,
        results["verdict"],
        "![Training curves](training.png)",
        "## Generated by BAM, KV experts",
        *sample,
        "## The text",
        corpora_table(results).markdown(),
        f"Seed {results['settings']['seed']}; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ".",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _plot(path: Path, rows: list[Row], results: dict[str, Any]) -> None:
    """Held-out perplexity over all tokens behind a model, and the loss of the rows that read the same batches."""
    everything, mixture_phase = [], []
    seed_average = _row(results["rows"], "seed")["average"]
    for row in rows:
        record, curves = _row(results["rows"], row.key), results["curves"][row.key]
        before = record["tokens"] - record["own_tokens"]
        points = [(before + tokens, average) for tokens, average in curves["validation"]]
        if row.inherited == ("seed",):
            points.insert(0, (before, seed_average))
        faint = row.key == "seed" or row.name.startswith("expert")
        everything.append(Curve(row.name, *_columns(points), faint=faint))
        if row.same_batches:
            mixture_phase.append(Curve(row.name, *_columns(_smoothed(curves["loss"]))))
    training_curves(
        [
            Panel(
                "Average over all four kinds of held-out text",
                "million tokens behind the model",
                "perplexity",
                everything,
                log_scale=True,
            ),
            Panel(
                "The rows that read the same batches",
                "million tokens of the mixture phase",
                "training loss",
                mixture_phase,
            ),
        ],
        path,
    )


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [tokens / 1e6 for tokens, _ in points], [value for _, value in points]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a tenth of the points: one batch differs more from the next than the models do."""
    width = max(1, len(points) // 10)
    windows = [points[end - width : end] for end in range(width, len(points) + 1)]
    return [(window[-1][0], sum(value for _, value in window) / width) for window in windows]
