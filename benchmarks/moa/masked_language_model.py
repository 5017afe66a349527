"""Masked language models of one width: perplexity falls with the number of attention heads to choose from.

    python benchmarks/moa/masked_language_model.py TRAIN VALID OUT [--steps N] [--seeds 0 1 2]

TRAIN and VALID are texts, JSON lines {"text": ...} (.jsonl or .jsonl.gz), each a file or a folder of them. Rows: a
dense Transformer, and mixtures of attention heads in which a token chooses 8 of 8, 16 or 32 heads (MoA, section 4.2).
All read the same blocks with the same masks; the mixtures cost the same but for the router. VALID is masked beforehand,
several times. OUT gets a file per row and seed (which is not trained again) and report.html.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from comparison import (
    IGNORED,
    Comparison,
    Row,
    Run,
    curve_figure,
    curves,
    dense_heads,
    difference,
    heads_of,
    mean_nats,
    over_seeds,
    reproduction,
    routed_rows,
    sizes_table,
    sparse_heads,
    token_nats,
    train_tokenizer,
    training_arguments,
    write,
)
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, Trainer, TrainingArguments

from bamoe.data.corpora import Corpus, local_files, read_documents
from bamoe.data.packing import PackedMixture
from bamoe.data.tokens import read_tokens
from bamoe.experiments.statistics import interval_over_text
from bamoe.modeling.configuration_bamoe_encoder import BamoeEncoderConfig
from bamoe.modeling.costs import count_parameters, flops_per_token
from bamoe.reports.attention_heads_section import attention_heads_section
from bamoe.reports.document import Block, Bullets, Document, Figures, Paragraph, Section, TableBlock
from bamoe.reports.table import Column, Table, signed

MASKED = 0.15
DRAWS = 4  # maskings of the held-out text
VALIDATIONS = 10  # over a run, on the first draw

_COMMON = ("hidden_size", "intermediate_size", "num_hidden_layers", "dropout", "norm_first")
SIZES: dict[str, Any] = {
    "vocabulary": 500,
    "sequence_length": 32,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "heads": 8,
    "head_dim": 16,  # of the mixtures: 2 / heads of the width, as in MoA 8K8E128D
    "experts": [8, 16, 32],
    "dropout": 0.0,  # every pass over the text has other masks
    "norm_first": True,
    "steps": 4000,
    "batch_blocks": 64,
    "warmup_steps": 300,
    "scaling_factor": 8.0,  # gates sum to the number of heads and add them up; the paper's 1 averages them
}
QUICK = SIZES | {
    "vocabulary": 300, "sequence_length": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "heads": 2, "head_dim": 8, "experts": [2, 4], "steps": 20, "batch_blocks": 8, "warmup_steps": 5,
}  # fmt: skip


def rows_of(sizes: Mapping[str, Any], vocabulary: int, pad_token_id: int) -> list[Row]:
    """The dense model, and a mixture for each number of experts; MACs at the length of a block."""
    common = {
        "vocab_size": vocabulary,
        "pad_token_id": pad_token_id,
        **{name: sizes[name] for name in _COMMON},
    }
    selected, width = sizes["heads"], sizes["head_dim"]
    dense = BamoeEncoderConfig(**dense_heads(selected, sizes["hidden_size"]), **common)
    configs = {"dense": ("Transformer", dense)} | {
        f"moa-{experts}": (
            f"MoA {selected}K{experts}E{width}D",
            BamoeEncoderConfig(**sparse_heads(selected, experts, width, sizes["scaling_factor"]), **common),
        )
        for experts in sizes["experts"]
    }
    return [
        Row(
            key,
            name,
            config,
            count_parameters(config).total,
            flops_per_token(config, sizes["sequence_length"]).total / 2,
        )
        for key, (name, config) in configs.items()
    ]


class MaskedText:
    """The data of the comparison, and how one model is trained and scored on it."""

    def __init__(self, given: argparse.Namespace, sizes: Mapping[str, Any]) -> None:
        self.given, self.sizes = given, sizes
        self.corpora = {part: Corpus(name=part, path=getattr(given, part)) for part in ("train", "valid")}
        self.tokenizer = train_tokenizer(list(read_documents(self.corpora["train"])["text"]), sizes["vocabulary"])
        self.streams = {part: read_tokens(corpus, self.tokenizer) for part, corpus in self.corpora.items()}
        length = sizes["sequence_length"]
        stream = self.streams["valid"]
        self.blocks = [
            {"input_ids": stream.tokens(start, start + length)} for start in range(0, len(stream) - length + 1, length)
        ][: given.valid_blocks]
        mask = self.masks(0)
        self.draws = [self.rows(mask(self.blocks)) for _ in range(DRAWS)]

    def masks(self, seed: int) -> DataCollatorForLanguageModeling:
        """Masks drawn anew for every batch, apart from the model's random numbers: the same for all rows."""
        return DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=MASKED, seed=seed)

    @staticmethod
    def rows(batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """A masked batch as examples."""
        return [
            {"input_ids": ids, "labels": labels}
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        ]

    def settings(self) -> dict[str, Any]:
        """All that a run depends on but its row and its seed."""
        hashes = {
            part: {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in local_files(corpus)}
            for part, corpus in self.corpora.items()
        }
        chosen = {name: getattr(self.given, name) for name in ("learning_rate", "valid_blocks")}
        sizes = {name: size for name, size in self.sizes.items() if name != "experts"}  # a row's own are in its config
        return {**chosen, **sizes, "masked": MASKED, "draws": DRAWS, "sha256": hashes}

    def train(self, row: Row, model: PreTrainedModel, seed: int) -> dict[str, Any]:
        """Train a model and score it on every masking of the held-out text."""
        sizes, steps = self.sizes, self.sizes["steps"]
        mask = self.masks(seed)

        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            if "labels" in rows[0]:  # masked beforehand
                return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
            batch = mask(rows)
            return {name: batch[name] for name in ("input_ids", "labels")}

        arguments = training_arguments(
            TrainingArguments,
            self.given.out / "trainer",
            max_steps=steps,
            per_device_train_batch_size=sizes["batch_blocks"],
            per_device_eval_batch_size=sizes["batch_blocks"],
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            learning_rate=self.given.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=sizes["warmup_steps"],
            max_grad_norm=1.0,
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=max(1, steps // VALIDATIONS),
            seed=seed,
        )
        blocks = PackedMixture(
            [self.streams["train"]], [1.0], sizes["sequence_length"], steps * sizes["batch_blocks"], seed=seed
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=blocks,
            eval_dataset=self.draws[0],
            data_collator=collate,
            compute_metrics=mean_nats,
            preprocess_logits_for_metrics=token_nats,
        )
        trainer.train()
        found = [trainer.predict(draw) for draw in self.draws]
        scored = [draw.label_ids != IGNORED for draw in found]
        nats = np.sum([draw.predictions.sum(axis=1, where=at) for draw, at in zip(found, scored, strict=True)], axis=0)
        tokens = np.sum([at.sum(axis=1) for at in scored], axis=0)
        # What the routers do with text as it is, nothing masked.
        size = sizes["batch_blocks"]
        ids = [torch.from_numpy(block["input_ids"]) for block in self.blocks]
        batches = [{"input_ids": torch.stack(ids[start : start + size])} for start in range(0, len(ids), size)]
        return {
            **curves(trainer),
            "nats": float(nats.sum() / tokens.sum()),
            "block_nats": nats.tolist(),
            "block_tokens": tokens.tolist(),
            **heads_of(model, batches, self.tokenizer),
        }


def report(text: MaskedText, rows: Sequence[Row], runs: Mapping[str, list[Run]], seeds: Sequence[int]) -> Document:
    """The report of all rows."""
    sizes, steps = text.sizes, text.sizes["steps"]
    length, blocks = sizes["sequence_length"], sizes["batch_blocks"]
    introduction = (
        f"Masked language models of width {sizes['hidden_size']}, {sizes['num_hidden_layers']} layers, trained for "
        f"{steps:,} steps of {blocks} blocks of {length} tokens ({steps * blocks * length:,} tokens; the training text "
        f"has {len(text.streams['train']):,}, the vocabulary {len(text.tokenizer):,}), with {len(seeds)} random seeds; "
        f"the same blocks with the same masks for all. Held-out text: {len(text.blocks):,} blocks, {MASKED:.0%} "
        f"masked, {DRAWS} times."
    )
    results = Table(
        [
            Column("name", "model", "text"),
            Column("parameters", "parameters", "amount"),
            Column("macs", "MACs per token", "amount"),
            Column("perplexity", "masked perplexity", best="min"),
            Column("nats", "nats per masked token", "fine", best="min"),
            Column("range", "lowest and highest seed", "text"),
        ],
        [
            {
                "name": row.name,
                "parameters": row.parameters,
                "macs": row.macs,
                "perplexity": math.exp(fmean(run["nats"] for run in runs[row.key])),
                "nats": fmean(run["nats"] for run in runs[row.key]),
                "range": " to ".join(
                    f"{math.exp(pick(run['nats'] for run in runs[row.key])):.2f}" for pick in (min, max)
                ),
            }
            for row in rows
        ],
    )
    validation = {
        row.name: [[(step, math.exp(nats)) for step, nats in run["validation_curve"]] for run in runs[row.key]]
        for row in rows
    }
    blocks_: list[Block] = [
        TableBlock(results, "Results", "Perplexity: the exponential of the mean nats per masked token over the seeds."),
        Figures([curve_figure("validation.svg", "Held-out text, first masking", "masked perplexity", validation)]),
    ]
    first_mixture = rows[1]
    costs: list[Block] = [
        Paragraph(
            f"MACs: multiply-accumulates of one forward pass per token of a block of {length} tokens, the head over "
            f"the vocabulary for every token. Changes against {first_mixture.name}; between the mixtures only the "
            "router's cost differs."
        ),
        TableBlock(sizes_table(rows, runs, first_mixture), "Parameters and cost"),
    ]
    sections = [
        Section(
            "Findings", [Bullets([(row.name, verdict(rows[index], row, runs)) for index, row in enumerate(rows[1:])])]
        ),
        Section("Results", blocks_),
        Section("Parameters and cost", costs),
        attention_heads_section(routed_rows(rows, runs, seeds)),
        reproduction(text.settings(), runs[rows[0].key][0]),
    ]
    return Document("Masked language models with mixtures of attention heads", [Paragraph(introduction)], sections)


def verdict(before: Row, row: Row, runs: Mapping[str, list[Run]]) -> str:
    """How a row compares with the one before it."""
    mine, other = runs[row.key], runs[before.key]
    change, bounds = difference(mine, other, "nats")
    nats = [{"text": np.mean([run["block_nats"] for run in side], axis=0).tolist()} for side in (mine, other)]
    over_text = interval_over_text(*nats, {"text": mine[0]["block_tokens"]})
    text = (
        "" if over_text is None else f"; over held-out blocks {signed(over_text.low, 3)} to {signed(over_text.high, 3)}"
    )
    return (
        f"{signed(100 * math.expm1(change), 1)}% perplexity against {before.name}: {signed(change, 3)} nats per masked "
        f"token ({over_seeds(bounds, 3)}{text})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("valid")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, help=f"default: {SIZES['steps']}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--valid-blocks", type=int, default=1000, help="blocks of held-out text, at most")
    parser.add_argument("--rows", nargs="+", help="only these: dense, moa-8, moa-16, moa-32; no report")
    parser.add_argument("--scaling-factor", type=float, default=SIZES["scaling_factor"], help="what gates sum to")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    given = parser.parse_args()
    sizes = (QUICK if given.quick else SIZES) | {"scaling_factor": given.scaling_factor}
    text = MaskedText(given, sizes | ({"steps": given.steps} if given.steps else {}))
    rows = rows_of(text.sizes, len(text.tokenizer), text.tokenizer.pad_token_id)
    chosen = [row for row in rows if given.rows is None or row.key in given.rows]
    runs = Comparison(given.out, chosen, text.settings(), text.train).runs(given.seeds)
    if len(chosen) == len(rows):
        write(report(text, rows, runs, given.seeds), given.out)


if __name__ == "__main__":
    main()
