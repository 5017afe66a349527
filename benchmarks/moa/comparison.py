"""What the benchmarks of this folder do alike: rows that train once, models of a wanted size, and tables of results."""

from __future__ import annotations

import copy
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bamoe.evaluation.attention_heads import attention_heads
from bamoe.experiments.environment import code_version, environment
from bamoe.experiments.statistics import interval_over_seeds
from bamoe.modeling import BamoeEncoderConfig, BamoeForConditionalGeneration, BamoeForMaskedLM
from bamoe.reports.curves import Points
from bamoe.reports.document import Block, Code, Document, Figure, Paragraph, Section, Subheading, TableBlock
from bamoe.reports.page import write_document
from bamoe.reports.plots import Curve, Panel, curve_looks, panel_svg
from bamoe.reports.routing_section import RoutedRow
from bamoe.reports.table import Column, Table, signed

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<mask>"]
IGNORED = -100  # the label of what is not scored

Run = Mapping[str, Any]  # what a row's training with one seed left in its file


@dataclass(frozen=True)
class Row:
    """A model of the comparison; macs: multiply-accumulates per token."""

    key: str
    name: str
    config: PreTrainedConfig
    parameters: int
    macs: float


def matched(
    config_of: Callable[[int], PreTrainedConfig], size: Callable[[PreTrainedConfig], float], goal: float
) -> Any:
    """The config of `config_of(intermediate_size)` whose size, which grows with the width evenly, is nearest to `goal`.

    Raises:
        ValueError: none is within 1%.
    """
    smallest, step = size(config_of(1)), size(config_of(2)) - size(config_of(1))
    config = config_of(max(1, 1 + round((goal - smallest) / step)))
    if abs(size(config) / goal - 1) > 0.01:
        raise ValueError(f"no width comes within 1% of {goal:g}: {config.intermediate_size} is {size(config):g}")
    return config


def dense_heads(heads: int, hidden_size: int) -> dict[str, Any]:
    """Fields of a config with multi-head attention."""
    return {
        "num_attention_experts": 1,
        "attention_routing": "soft",
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden_size // heads,
    }


def sparse_heads(selected: int, experts: int, head_dim: int, scaling_factor: float) -> dict[str, Any]:
    """Fields of a config with a mixture of attention heads, as in the paper over one key and value head."""
    return {
        "num_attention_experts": experts,
        "num_attention_heads": experts,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "attention_key_value": "shared",
        "attention_routing": "top_k",
        "num_attention_experts_per_tok": selected,
        "attention_scaling_factor": scaling_factor,
    }


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a text ends in <eos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    eos = ("<eos>", tokenizer.token_to_id("<eos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[eos])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def training_arguments(kind: type[TrainingArguments], folder: Path, **settings: Any) -> Any:
    """The original Transformer's optimizer (Vaswani et al., 2017, section 5.3), on the CPU; only logs are kept."""
    return kind(
        output_dir=str(folder),
        use_cpu=True,
        adam_beta1=0.9,
        adam_beta2=0.98,
        adam_epsilon=1e-9,
        logging_strategy="steps",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )


def token_nats(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (B, T) of labels (B, T) under logits (B, T, V), 0 where there is none."""
    first = logits[0] if isinstance(logits, tuple) else logits
    return torch.nn.functional.cross_entropy(
        first.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    ).view_as(labels)


def mean_nats(prediction: Any) -> dict[str, float]:
    """The mean of `token_nats` over the scored tokens, for `Trainer(compute_metrics=)`."""
    scored = prediction.label_ids != IGNORED
    return {"nats": float(prediction.predictions[scored].astype("float64").mean())}


class Comparison:
    """Rows × seeds; a run whose file is in `out`, made with the same settings, is not trained again.

    train: trains and scores one model; returns plain data for the run's file.
    """

    def __init__(
        self,
        out: Path,
        rows: Sequence[Row],
        settings: Mapping[str, Any],
        train: Callable[[Row, PreTrainedModel, int], dict[str, Any]],
    ) -> None:
        self.out, self.rows, self.settings, self.train = out, rows, settings, train

    def runs(self, seeds: Sequence[int]) -> dict[str, list[Run]]:
        """Train what is left, seed by seed, so that an interrupted comparison is one of fewer seeds."""
        found: dict[str, list[Run]] = {row.key: [] for row in self.rows}
        for seed in seeds:
            for row in self.rows:
                found[row.key].append(self._run(row, seed))
        return found

    def _run(self, row: Row, seed: int) -> Run:
        path = self.out / "runs" / f"{row.key}-seed-{seed}.json"
        config = {name: value for name, value in row.config.to_dict().items() if name != "transformers_version"}
        settings = json.loads(json.dumps({**self.settings, "config": config, "seed": seed}))
        if path.is_file():
            run: Run = json.loads(path.read_text(encoding="utf-8"))
            if run["settings"] == settings:
                return run
        set_seed(seed)
        model = model_of(copy.deepcopy(row.config))  # a model writes into its config
        if (counted := model.num_parameters()) != row.parameters:
            raise AssertionError(f"{row.name} has {counted} parameters, and {row.parameters} by its config")
        start = time.perf_counter()
        result = self.train(row, model, seed)
        whole = {"settings": settings, "environment": environment(), "code": code_version(), **result}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(whole, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        told = " ".join(f"{name}={whole[name]:.4g}" for name in ("nats", "bleu") if name in whole)
        print(f"{row.name}, seed {seed}: {told} {time.perf_counter() - start:.0f} s", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights."""
    model_class = BamoeForMaskedLM if isinstance(config, BamoeEncoderConfig) else BamoeForConditionalGeneration
    return model_class(config)


def curves(trainer: Trainer) -> dict[str, Any]:
    """Points (step, value) of the training loss and of the held-out nats, and the seconds of training."""
    history = trainer.state.log_history
    return {
        "loss_curve": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "validation_curve": [(entry["step"], entry["eval_nats"]) for entry in history if "eval_nats" in entry],
        "steps": trainer.state.global_step,
        "seconds": next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
        - sum(entry.get("eval_runtime", 0.0) for entry in history),
    }


def heads_of(
    model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Load and token information of a mixture's routers on held-out text, as plain data."""
    if model.config.num_attention_experts == 1:
        return {}
    found = asdict(attention_heads(model, batches, tokenizer))
    return {
        "routing": {kind: {"held-out text": layers} for kind, layers in found["routing"].items()},
        "specialization": found["specialization"],
    }


def routed_rows(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], seeds: Sequence[int]) -> list[RoutedRow]:
    """The rows that choose among heads: all but the dense ones, and those that use every head for every token."""
    return [
        RoutedRow(
            row.name, seeds, [run["routing"] for run in runs[row.key]], [run["specialization"] for run in runs[row.key]]
        )
        for row in rows
        if 1
        < row.config.num_attention_experts
        > (row.config.num_attention_experts_per_tok or row.config.num_attention_experts)
    ]


def sizes_table(rows: Sequence[Row], runs: Mapping[str, Sequence[Run]], against: Row) -> Table:
    """Parameters, cost, and what training took."""
    columns = [
        Column("name", "model", "text"),
        Column("parameters", "parameters", "amount"),
        Column("parameters_change", "change", "change"),
        Column("macs", "MACs per token", "amount"),
        Column("macs_change", "change", "change"),
        Column("width", "feed-forward width", "text"),
        Column("steps", "steps", "text"),
        Column("seconds", "training", "duration"),
    ]
    return Table(
        columns,
        [
            {
                "name": row.name,
                "parameters": row.parameters,
                "parameters_change": row.parameters / against.parameters - 1,
                "macs": row.macs,
                "macs_change": row.macs / against.macs - 1,
                "width": row.config.intermediate_size,
                "steps": runs[row.key][0]["steps"],
                "seconds": fmean(run["seconds"] for run in runs[row.key]),
            }
            for row in rows
        ],
    )


def difference(row: Sequence[Run], against: Sequence[Run], measure: str) -> tuple[float, tuple[float, float] | None]:
    """The mean difference of a measure, paired over seeds, with its 95% interval where there are two seeds."""
    values = [mine[measure] - other[measure] for mine, other in zip(row, against, strict=True)]
    found = interval_over_seeds(values)
    return fmean(values), (found.low, found.high) if found else None


def over_seeds(bounds: tuple[float, float] | None, digits: int) -> str:
    """In words, the interval of a `difference`."""
    if bounds is None:
        return "one seed"
    return f"95% interval over seeds {signed(bounds[0], digits)} to {signed(bounds[1], digits)}"


def curve_figure(name: str, title: str, y_label: str, curves_of: Mapping[str, Sequence[Points]]) -> Figure:
    """Values over steps, by row: the mean over the seeds, with their range."""
    lines = []
    for row, runs in curves_of.items():
        values = [[value for _, value in points] for points in runs]
        spread = (
            {
                "low": [min(at) for at in zip(*values, strict=True)],
                "high": [max(at) for at in zip(*values, strict=True)],
            }
            if len(runs) > 1
            else {}
        )
        mean = [fmean(at) for at in zip(*values, strict=True)]
        lines.append(Curve(row, [step for step, _ in runs[0]], mean, **spread))
    panel = Panel(title, "step", y_label, lines, log_scale=True)
    ends = "; ".join(f"{line.name} {line.y[-1]:.3g}" for line in lines)
    alt = f"Line plot of {y_label} over steps. At the end of each line: {ends}."
    caption = (
        "The shaded range is from the lowest to the highest seed." if len(next(iter(curves_of.values()))) > 1 else ""
    )
    return Figure(name, panel_svg(panel, curve_looks(curves_of)), alt, caption)


def reproduction(settings: Mapping[str, Any], run: Run) -> Section:
    """The command, the settings and what ran it."""
    facts = {**run["environment"], **run["code"]}
    table = Table(
        [Column("name", "what", "text"), Column("value", "value", "text")],
        [{"name": name, "value": str(value)} for name, value in facts.items()],
    )
    blocks: list[Block] = [
        Paragraph("Made, or taken up where it stopped, by:"),
        Code(shlex.join(["python", *sys.argv]), "sh", wrap=True),
        Subheading("Settings"),
        Code(json.dumps(settings, indent=1), "json"),
        Subheading("Environment"),
        TableBlock(table, "Environment"),
    ]
    return Section("Reproduction", blocks)


def write(document: Document, out: Path) -> None:
    """Write the report and say where."""
    print(write_document(document, out).html)
