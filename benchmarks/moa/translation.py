"""English to German: a mixture of attention heads against dense Transformers at equal cost and at equal parameters.

    python benchmarks/moa/translation.py TRAIN VALID OUT [--epochs N] [--seeds 0 1 2]

TRAIN and VALID are JSON lines {"en": ..., "de": ...} (.jsonl or .jsonl.gz), such as Multi30k's. Every 29th pair of
TRAIN is kept out of training for the validation loss; VALID is the test set, on which nothing is chosen. All rows read
the same batches in the same order, with the same optimizer and as many steps. OUT gets a file per row and seed (which
is not trained again) and report.html.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

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
    matched,
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
from datasets import Dataset
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from bamoe.data.corpora import Corpus, read_documents
from bamoe.modeling.configuration_bamoe_encoder_decoder import BamoeEncoderDecoderConfig
from bamoe.modeling.costs import count_parameters, flops_per_token
from bamoe.reports.attention_heads_section import attention_heads_section
from bamoe.reports.document import Block, Bullets, Code, Document, Figures, Paragraph, Section, TableBlock
from bamoe.reports.table import Column, Table, signed

HELD_OUT = 29  # one pair in so many
MAX_TOKENS = 100  # of a sentence
BEAMS = 5
SHOWN = 6  # translations in the report
BOOTSTRAP = 1000

_COMMON = ("hidden_size", "num_hidden_layers", "num_decoder_layers", "dropout", "label_smoothing", "norm_first")
SIZES: dict[str, Any] = {
    "vocabulary": 4000,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_decoder_layers": 3,
    "heads": 4,
    "head_dim": 48,  # of the mixture: about the cost of four heads of 32 with keys of their own
    "experts": 16,
    "dropout": 0.1,
    "label_smoothing": 0.1,
    # Post-norm, as in the paper, some rows never leave the plateau of token frequencies in so few steps.
    "norm_first": True,
    "batch_pairs": 64,
    "warmup_steps": 400,
    "scaling_factor": 1.0,  # gates sum to 1 and average the heads, as in the paper; see docs/moa.md
}
QUICK = SIZES | {
    "vocabulary": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_decoder_layers": 1,
    "heads": 2, "head_dim": 8, "experts": 4, "batch_pairs": 16, "warmup_steps": 5,
}  # fmt: skip


def read_pairs(path: str) -> list[tuple[str, str]]:
    """The pairs (English, German) of a file."""
    english, german = (
        read_documents(Corpus(name=field, path=path, text_field=field))["text"] for field in ("en", "de")
    )
    return list(zip(english, german, strict=True))


def rows_of(sizes: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, context: int) -> list[Row]:
    """The mixture, and the dense models that cost as much and hold as much; MACs at sentences of `context` tokens."""
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **{name: sizes[name] for name in _COMMON},
    }

    def dense(intermediate_size: int) -> BamoeEncoderDecoderConfig:
        return BamoeEncoderDecoderConfig(
            **dense_heads(sizes["heads"], sizes["hidden_size"]), intermediate_size=intermediate_size, **common
        )

    mixture = BamoeEncoderDecoderConfig(
        **sparse_heads(sizes["heads"], sizes["experts"], sizes["head_dim"], sizes["scaling_factor"]),
        intermediate_size=sizes["intermediate_size"],
        **common,
    )

    def macs(config: BamoeEncoderDecoderConfig) -> float:
        return flops_per_token(config, context).total / 2

    def parameters(config: BamoeEncoderDecoderConfig) -> int:
        return count_parameters(config).total

    configs = {
        "dense-macs": ("Transformer, equal MACs", matched(dense, macs, macs(mixture))),
        "moa": (f"MoA {sizes['heads']}K{sizes['experts']}E{sizes['head_dim']}D", mixture),
        "dense-parameters": ("Transformer, equal parameters", matched(dense, parameters, parameters(mixture))),
    }
    return [Row(key, name, config, parameters(config), macs(config)) for key, (name, config) in configs.items()]


def in_batches(sentences: Dataset, batch: int, passes: int, seed: int) -> Dataset:
    """Passes over sentences, one after the other, each in batches of like length in a random order.

    Laid out beforehand, because what a trainer draws on the way depends on how many random numbers a model's dropout
    takes: so all rows read the same batches. What does not fill a last batch is left out, something else in each pass.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(passes):
        indices = get_length_grouped_indices(sentences["length"], batch, generator=generator)
        order += indices[: len(indices) // batch * batch]
    return sentences.select(order).remove_columns("length")


def encode(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids of both sides, with the length by which batches are made."""
    english, german = (
        tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        for texts in zip(*pairs, strict=True)
    )
    lengths = [max(len(source), len(target)) for source, target in zip(english, german, strict=True)]
    return Dataset.from_dict({"input_ids": english, "labels": german, "length": lengths})


class Translation:
    """The data of the comparison, and how one model is trained and scored on it."""

    def __init__(self, given: argparse.Namespace, sizes: Mapping[str, Any]) -> None:
        pairs = read_pairs(given.train)[: given.pairs]
        self.test = read_pairs(given.valid)[: given.test_pairs]
        train = [pair for index, pair in enumerate(pairs) if index % HELD_OUT]
        self.given, self.sizes = given, sizes
        self.tokenizer = train_tokenizer([text for pair in train for text in pair], sizes["vocabulary"])
        self.sets = {
            name: encode(part, self.tokenizer)
            for name, part in (("train", train), ("valid", pairs[::HELD_OUT]), ("test", self.test))
        }
        self.bleu = BLEU()

    def settings(self) -> dict[str, Any]:
        """All that a run depends on but its row and its seed."""
        hashes = {
            part: hashlib.sha256(Path(getattr(self.given, part)).read_bytes()).hexdigest()
            for part in ("train", "valid")
        }
        chosen = {name: getattr(self.given, name) for name in ("epochs", "learning_rate", "pairs", "test_pairs")}
        return {**chosen, **self.sizes, "beams": BEAMS, "sha256": hashes}

    def tokens(self, part: str) -> int:
        """Tokens of both sides."""
        return sum(len(ids) for column in ("input_ids", "labels") for ids in self.sets[part][column])

    def context(self) -> int:
        """Mean length of a sentence, in tokens."""
        return round(self.tokens("train") / 2 / len(self.sets["train"]))

    def train(self, row: Row, model: PreTrainedModel, seed: int) -> dict[str, Any]:
        """Train a model, score it on both held-out parts, and translate the test set."""
        collate = DataCollatorForSeq2Seq(self.tokenizer, model=model, label_pad_token_id=IGNORED)
        arguments = training_arguments(
            Seq2SeqTrainingArguments,
            self.given.out / "trainer",
            num_train_epochs=1,  # of the passes that are laid out
            per_device_train_batch_size=self.sizes["batch_pairs"],
            per_device_eval_batch_size=self.sizes["batch_pairs"],
            train_sampling_strategy="sequential",
            learning_rate=self.given.learning_rate,
            lr_scheduler_type="inverse_sqrt",
            warmup_steps=self.sizes["warmup_steps"],
            max_grad_norm=1.0,
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=len(self.sets["train"]) // self.sizes["batch_pairs"],
            seed=seed,
        )
        trainer = Seq2SeqTrainer(
            model=model,
            args=arguments,
            train_dataset=in_batches(self.sets["train"], self.sizes["batch_pairs"], self.given.epochs, seed),
            eval_dataset=self.sets["valid"].remove_columns("length"),
            data_collator=collate,
            compute_metrics=mean_nats,
            preprocess_logits_for_metrics=token_nats,
        )
        trainer.train()
        scored = trainer.predict(self.sets["test"].remove_columns("length"))
        tokens = scored.label_ids != IGNORED
        translations = self.translate(model, collate)
        references = [german for _, german in self.test]
        return {
            **curves(trainer),
            "nats": scored.metrics["test_nats"],
            "sentence_nats": scored.predictions.sum(axis=1, where=tokens).tolist(),
            "sentence_tokens": tokens.sum(axis=1).tolist(),
            "bleu": self.bleu.corpus_score(translations, [references]).score,
            "bleu_signature": str(self.bleu.get_signature()),
            "translations": translations,
            **heads_of(model, list(self.batches("test", collate)), self.tokenizer),
        }

    def batches(self, part: str, collate: DataCollatorForSeq2Seq) -> list[dict[str, torch.Tensor]]:
        """A part in batches, the sentences in their order."""
        rows, size = self.sets[part].remove_columns("length"), self.sizes["batch_pairs"]
        return [
            dict(collate([rows[index] for index in range(start, min(start + size, len(rows)))]))
            for start in range(0, len(rows), size)
        ]

    def translate(self, model: PreTrainedModel, collate: DataCollatorForSeq2Seq) -> list[str]:
        """Translations of the test set by beam search."""
        model.eval()
        found: list[str] = []
        for batch in self.batches("test", collate):
            source = {name: batch[name] for name in ("input_ids", "attention_mask")}
            longest = min(MAX_TOKENS, 2 * source["input_ids"].shape[1] + 10)
            ids = model.generate(**source, num_beams=BEAMS, do_sample=False, max_new_tokens=longest)
            found += [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return found


def report(
    translation: Translation, rows: Sequence[Row], runs: Mapping[str, list[Run]], seeds: Sequence[int]
) -> Document:
    """The report of all rows."""
    mixture = next(row for row in rows if row.key == "moa")
    others = [row for row in rows if row is not mixture]
    pairs = {part: len(rows_) for part, rows_ in translation.sets.items()}
    given = translation.given
    introduction = (
        f"A mixture of attention heads (MoA) and dense Transformers, trained on {pairs['train']:,} sentence pairs "
        f"({translation.tokens('train'):,} tokens of a joint vocabulary of {len(translation.tokenizer):,}) for "
        f"{given.epochs} passes, with {len(seeds)} random seeds; the same batches in the same order for all. "
        f"Validation: {pairs['valid']:,} other pairs of the training file. Test: {pairs['test']:,} pairs, "
        f"translated with {BEAMS} beams."
    )
    results = Table(
        [
            Column("name", "model", "text"),
            Column("parameters", "parameters", "amount"),
            Column("macs", "MACs per token", "amount"),
            Column("valid", "validation perplexity", best="min"),
            Column("test", "test perplexity", best="min"),
            Column("bleu", "BLEU", best="max"),
            Column("range", "lowest and highest seed", "text"),
        ],
        [
            {
                "name": row.name,
                "parameters": row.parameters,
                "macs": row.macs,
                "valid": fmean(perplexity(run["validation_curve"][-1][1]) for run in runs[row.key]),
                "test": fmean(perplexity(run["nats"]) for run in runs[row.key]),
                "bleu": fmean(run["bleu"] for run in runs[row.key]),
                "range": " to ".join(f"{pick(run['bleu'] for run in runs[row.key]):.2f}" for pick in (min, max)),
            }
            for row in rows
        ],
    )  # fmt: skip
    signature = runs[mixture.key][0]["bleu_signature"]
    validation = {
        row.name: [[(step, perplexity(nats)) for step, nats in run["validation_curve"]] for run in runs[row.key]]
        for row in rows
    }
    blocks: list[Block] = [
        TableBlock(results, "Results", f"Means over the seeds. BLEU: sacrebleu, {signature}, on detokenised text."),
        Figures([curve_figure("validation.svg", "Validation pairs", "perplexity", validation)]),
    ]
    costs: list[Block] = [
        Paragraph(
            "MACs: multiply-accumulates of one forward pass per token of a sentence of mean length "
            f"({translation.context()} tokens on either side): the encoder's for a source token and the decoder's, "
            "with the head, for a target token. Changes against the mixture."
        ),
        TableBlock(sizes_table(rows, runs, mixture), "Parameters and cost"),
    ]
    sections = [
        Section("Findings", [Bullets([(row.name, verdict(translation, mixture, row, runs)) for row in others])]),
        Section("Results", blocks),
        Section("Parameters and cost", costs),
        attention_heads_section(routed_rows(rows, runs, seeds)),
        Section("Translations", [Code(samples(translation, rows, runs), wrap=True)]),
        reproduction(translation.settings(), runs[mixture.key][0]),
    ]
    return Document("Translation with a mixture of attention heads", [Paragraph(introduction)], sections)


def perplexity(nats: float) -> float:
    """exp(nats), within what a plot can show."""
    return float(torch.tensor(nats, dtype=torch.float64).clamp_max(700).exp())


def verdict(translation: Translation, mixture: Row, row: Row, runs: Mapping[str, list[Run]]) -> str:
    """How the mixture compares with a dense row."""
    change, bounds = difference(runs["moa"], runs[row.key], "bleu")
    nats, nats_bounds = difference(runs["moa"], runs[row.key], "nats")
    loss = "" if nats_bounds is None else f", {signed(nats_bounds[0], 3)} to {signed(nats_bounds[1], 3)}"
    systems = [(name, runs[key][0]["translations"]) for name, key in (("dense", row.key), ("moa", "moa"))]
    test = PairedTest(
        systems, {"BLEU": BLEU()}, [[german for _, german in translation.test]], test_type="bs", n_samples=BOOTSTRAP
    )
    p_value = test()[1]["BLEU"][1].p_value
    return (
        f"{mixture.name} has {signed(change, 2)} BLEU ({over_seeds(bounds, 2)}; paired bootstrap over the test "
        f"sentences of the first seed: p = {p_value:.3f}) and {signed(nats, 3)} nats of test loss per token{loss}"
    )


def samples(translation: Translation, rows: Sequence[Row], runs: Mapping[str, list[Run]]) -> str:
    """The first test sentences and their translations by the first seed."""
    blocks = []
    for index, (english, german) in enumerate(translation.test[:SHOWN]):
        lines = [f"source: {english}", f"reference: {german}"]
        lines += [f"{row.name}: {runs[row.key][0]['translations'][index]}" for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("valid")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--rows", nargs="+", help="only these: dense-macs, moa, dense-parameters; no report")
    parser.add_argument("--pairs", type=int, help="train on the first so many pairs")
    parser.add_argument("--test-pairs", type=int, help="test on the first so many pairs")
    parser.add_argument("--scaling-factor", type=float, default=SIZES["scaling_factor"], help="what gates sum to")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    given = parser.parse_args()
    sizes = (QUICK if given.quick else SIZES) | {"scaling_factor": given.scaling_factor}
    translation = Translation(given, sizes)
    rows = rows_of(sizes, translation.tokenizer, translation.context())
    chosen = [row for row in rows if given.rows is None or row.key in given.rows]
    runs = Comparison(given.out, chosen, translation.settings(), translation.train).runs(given.seeds)
    if len(chosen) == len(rows):
        write(report(translation, rows, runs, given.seeds), given.out)


if __name__ == "__main__":
    main()
