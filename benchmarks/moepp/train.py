"""MoE++ and the plain mixture with the same feed-forward experts, trained from nothing on the same tokens.

    python benchmarks/moepp/train.py CORPUS... OUT [--seeds 0 1] [--tokens N] [--workers 2] [--quick]

CORPUS are pairs of files, NAME.train.jsonl and NAME.valid.jsonl (or .txt, .parquet; .gz too): a domain each, in equal
shares. Models of one random seed read the same batches and start from the same weights, as far as both have them. The
plain mixture has the same number of experts per token and the same capacity factor. MoE++'s load-balance loss has no
factor N, so that the same coefficient weighs several times less; its rows have one that makes up for it, and one row
the paper's 0.01. The same command goes on with an interrupted run. OUT gets results.json, table.md, and the trained
models.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from bamoe.experiments.hashes import FileHashes
from bamoe.experiments.phases import BLOCKS_FILE, evaluate_row, train_row
from bamoe.experiments.statistics import interval_over_seeds, interval_over_text
from bamoe.experiments.steps import Step, run_steps
from bamoe.experiments.untrained import write_untrained
from bamoe.reports.experts_per_token import TokenCosts, experts_per_token_tables
from bamoe.reports.table import Column, Table

# The paper's 0.6B model in small: 8 feed-forward experts beside one zero, one copy and two constant ones, top-2 with
# true probabilities, capacity factor 1.1.
ROUTING = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False, "expert_capacity_factor": 1.1}
ZERO_COMPUTATION = {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2}
PLAIN = "plain"
COEFFICIENT = 0.01  # of the load-balance loss


def plus(tau: float, coefficient: float | None = None) -> dict[str, Any]:
    """MoE++'s fields; by default its load-balance loss weighs, in balance, what the plain mixture's does.

    Without a factor N it is K / Σ_i (1/η_i) there, where the plain one is 1 (`router_losses`).
    """
    experts, added = ROUTING["num_experts"], sum(ZERO_COMPUTATION.values())
    in_balance = ROUTING["num_experts_per_tok"] / (experts + added / tau)
    weight = COEFFICIENT / in_balance if coefficient is None else coefficient
    return {**ZERO_COMPUTATION, "zero_computation_tau": tau, "router_aux_loss_coef": weight}


MODELS: dict[str, dict[str, Any]] = {
    PLAIN: {"router_aux_loss_coef": COEFFICIENT},
    "MoE++, tau 0.75": plus(0.75),
    "MoE++, tau 0.5": plus(0.5),
    "MoE++, tau 0.75, coefficient 0.01": plus(0.75, 0.01),
}
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
TRAINING = {
    "sequence_length": 128,
    "tokens": 2_000_000,
    "batch_tokens": 4096,
    "learning_rate": 2e-3,
    "schedule": {"warmup_tokens": 200_000, "decay": "cosine", "final": 0.1},
    "log_every_steps": 10,
    "report_to": [],
}
QUICK_SHAPE = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
QUICK_TRAINING = {"sequence_length": 32, "tokens": 1024, "batch_tokens": 256, "schedule": {}}
WIDE = 130  # characters of a table
SETTLED = 0.25  # of a run, its end: over which the dropped share is taken


@dataclass(frozen=True)
class Plan:
    """What is trained: `corpora[domain][part]` as the fields of a `Corpus`, and the sizes."""

    corpora: dict[str, dict[str, dict[str, Any]]]
    shape: dict[str, Any]
    training: dict[str, Any]
    seeds: list[int]


def paired(paths: Sequence[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """Training and held-out files by domain."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in paths:
        name, _, rest = path.name.partition(".")
        part = rest.partition(".")[0]
        if part not in ("train", "valid"):
            raise SystemExit(f"{path}: name the files NAME.train.* and NAME.valid.*")
        found.setdefault(name, {})[part] = {"name": name, "path": str(path.absolute())}
    if single := sorted(name for name, parts in found.items() if len(parts) < 2):
        raise SystemExit(f"{', '.join(single)}: give both NAME.train.* and NAME.valid.*")
    return found


def make_tokenizer(
    folder: str, corpora: Mapping[str, Any], shape: Mapping[str, Any], sequence_length: int
) -> dict[str, Any]:
    """A byte-level BPE learnt from all domains in equal shares."""
    shares = dict.fromkeys(corpora, 1.0)
    out = Path(folder) / "model"
    return write_untrained(corpora, shares, out, shape, sequence_length=sequence_length, seed=0)


def make_model(folder: str, tokenizer: str, plain: Mapping[str, Any], added: Mapping[str, Any], seed: int) -> None:
    """An untrained mixture; what it shares with the plain one of the same random seed has the same weights."""
    import torch

    from bamoe import BamoeConfig, BamoeForCausalLM
    from bamoe.checkpoints.loading import load_tokenizer

    words = load_tokenizer(tokenizer)

    def untrained(**changes: Any) -> BamoeForCausalLM:
        torch.manual_seed(seed)
        return BamoeForCausalLM(
            BamoeConfig(**{**plain, **changes}, num_attention_experts=1, eos_token_id=words.eos_token_id)
        )

    made, own = untrained(**added), untrained().state_dict()
    same = {name: weight for name, weight in own.items() if weight.shape == made.get_parameter(name).shape}
    made.load_state_dict(same, strict=False)
    made.save_pretrained(Path(folder) / "model")
    words.save_pretrained(Path(folder) / "model")


def steps_of(plan: Plan, out: Path, hashes: Mapping[str, str]) -> list[Step]:
    """Tokenizer; then every model with every random seed: made, trained, evaluated."""
    train = {name: parts["train"] for name, parts in plan.corpora.items()}
    length = plan.training["sequence_length"]

    def folder(name: str) -> dict[str, str]:
        return {"folder": str(out / name)}

    made = out / "tokenizer" / "model"
    settings = {"corpora": train, "shape": plan.shape, "sequence_length": length}
    steps = [Step("tokenizer", make_tokenizer, folder("tokenizer") | settings, makes=[made], inputs=hashes)]
    for seed in plan.seeds:
        for model in MODELS:
            start, training, scored = (step_name(what, model, seed) for what in ("make", "train", "evaluate"))
            plain = {**plan.shape, **ROUTING, "max_position_embeddings": length}
            arguments = {"tokenizer": str(made), "plain": plain, "added": MODELS[model], "seed": seed}
            steps.append(Step(start, make_model, folder(start) | arguments, ["tokenizer"], [out / start / "model"]))
            trained = str(out / training / "model")
            config = {
                **plan.training, "model": str(out / start / "model"), "output": trained, "data": list(train.values()),
                "seed": seed,
            }  # fmt: skip
            steps.append(
                Step(training, train_row, {**folder(training), "config": config}, [start], [Path(trained)], hashes)
            )
            held_out = [parts["valid"] for parts in plan.corpora.values()]
            arguments = {"model": trained, "corpora": held_out, "sequence_length": length, "document_mask": False}
            blocks = [out / scored / BLOCKS_FILE]
            steps.append(Step(scored, evaluate_row, folder(scored) | arguments, [training], blocks, hashes))
    return steps


def step_name(what: str, model: str, seed: int) -> str:
    return f"seed-{seed}/{what}/{model.replace(', ', '-').replace(' ', '-')}"


def row(plan: Plan, out: Path, records: Mapping[str, Any], model: str) -> dict[str, Any]:
    """One model: means over its random seeds, and what each of them gave."""
    from bamoe.checkpoints.loading import load_config
    from bamoe.modeling.costs import count_parameters, expected_experts_per_token, flops_per_token

    config: Any = load_config(out / step_name("train", model, plan.seeds[0]) / "model")
    scores = [records[step_name("evaluate", model, seed)]["result"] for seed in plan.seeds]
    trained = [records[step_name("train", model, seed)]["result"] for seed in plan.seeds]
    costs = TokenCosts(model, [score["routing"] for score in scores])
    experts, expected = fmean(costs.by_layer()), expected_experts_per_token(config)
    parameters = count_parameters(config)
    one_expert = 3 * config.hidden_size * config.intermediate_size
    flops = flops_per_token(config, plan.training["sequence_length"]).total
    return {
        "model": model,
        "parameters": parameters.total,
        **{f"perplexity {name}": fmean(s["domains"][name]["perplexity"] for s in scores) for name in plan.corpora},
        "average": fmean(score["average_perplexity"] for score in scores),
        "log": fmean(score["average_log_perplexity"] for score in scores),
        "logs": [score["average_log_perplexity"] for score in scores],
        "experts_per_token": experts,
        "balanced_experts_per_token": expected,
        "flops": flops + 2 * config.num_hidden_layers * (experts - expected) * one_expert,
        "dropped": fmean(dropped(out / step_name("train", model, seed) / "model") for seed in plan.seeds),
        "seconds": fmean(run["seconds"] for run in trained),
        "collapses": sum(run["collapses"] for run in trained),
    }


def dropped(model: Path) -> float:
    """The share of assignments that experts had no room for, at the end of a training."""
    lines = (model / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    shares = [entry["dropped_assignments"] for line in lines if "dropped_assignments" in (entry := json.loads(line))]
    return fmean(shares[-max(1, round(SETTLED * len(shares))) :])


def against_plain(plan: Plan, out: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each MoE++ less the plain mixture in mean log perplexity, paired over seeds and over blocks of text."""

    def blocks(model: str) -> list[dict[str, Any]]:
        files = [out / step_name("evaluate", model, seed) / BLOCKS_FILE for seed in plan.seeds]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def mean_nats(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
        return {name: [fmean(each) for each in zip(*(run["nats"][name] for run in runs), strict=True)]
                for name in runs[0]["nats"]}  # fmt: skip

    plain, *others = rows
    found = []
    for each in others:
        runs, reference = blocks(each["model"]), blocks(PLAIN)
        over_seeds = interval_over_seeds([own - other for own, other in zip(each["logs"], plain["logs"], strict=True)])
        over_text = interval_over_text(mean_nats(runs), mean_nats(reference), reference[0]["tokens"])
        found.append(
            {
                "model": each["model"],
                "change": each["average"] / plain["average"] - 1,
                "difference": each["log"] - plain["log"],
                "over_seeds": over_seeds and (over_seeds.low, over_seeds.high),
                "over_text": over_text and (over_text.low, over_text.high),
                "flops": each["flops"] / plain["flops"] - 1,
            }
        )
    return found


def tables(plan: Plan, records: Mapping[str, Any], rows: list[dict[str, Any]], others: list[Any]) -> dict[str, Table]:
    """By title."""
    scores = Table(
        [
            Column("model", "model", "text"),
            Column("parameters", "params", "amount"),
            *(Column(f"perplexity {name}", name, best="min") for name in plan.corpora),
            Column("average", "average", best="min"),
            Column("log", "mean log", "fine", best="min"),
            Column("experts_per_token", "experts per token"),
            Column("balanced_experts_per_token", "in balance"),
            Column("dropped", "dropped", "share"),
            Column("flops", "FLOPs per token", "amount"),
            Column("seconds", "training", "duration"),
        ],
        rows,
    )
    differences = Table(
        [
            Column("model", "against plain", "text"),
            Column("change", "perplexity", "change"),
            Column("difference", "mean log", "difference"),
            Column("over_seeds", "95% over seeds", "interval"),
            Column("over_text", "95% over text", "interval"),
            Column("flops", "FLOPs", "change"),
        ],
        others,
    )
    found = {model: [records[step_name("evaluate", model, seed)]["result"] for seed in plan.seeds] for model in MODELS}
    costs = [
        TokenCosts(model, [each["routing"] for each in scores], [each["token_classes"] for each in scores])
        for model, scores in found.items()
    ]
    return {"Perplexity on held-out text": scores, "Differences": differences, **experts_per_token_tables(costs)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path, nargs="+", metavar="CORPUS")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokens", type=int, default=TRAINING["tokens"], help="of each training")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side, with one thread each")
    parser.add_argument("--quick", action="store_true", help="tiny and untrained: shows that everything runs")
    given = parser.parse_args(arguments)
    out, console = given.out.absolute(), Console(highlight=False)
    console.width = max(console.width, WIDE)
    quick = (QUICK_SHAPE, QUICK_TRAINING) if given.quick else ({}, {})
    training = {**TRAINING, "tokens": given.tokens, **quick[1]}
    plan = Plan(paired(given.corpora), {**SHAPE, **quick[0]}, training, given.seeds)
    out.mkdir(parents=True, exist_ok=True)
    files = [Path(corpus["path"]) for parts in plan.corpora.values() for corpus in parts.values()]
    hashes = FileHashes(out / ".hashes.json").of(files)

    def tell(event: str, step: Step, seconds: float) -> None:
        if event == "finished":
            console.print(f"{step.name}: {seconds:.0f} s", style="dim")

    records = run_steps(steps_of(plan, out, hashes), out, workers=given.workers, listener=tell)
    rows = [row(plan, out, records, model) for model in MODELS]
    others = against_plain(plan, out, rows)
    shown = tables(plan, records, rows, others)
    results = {"shape": {**plan.shape, **ROUTING}, "training": training, "seeds": plan.seeds, "text": hashes,
               "rows": rows, "differences": others}  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    markdown = "\n".join(f"**{title}**\n\n{table.markdown()}" for title, table in shown.items())
    (out / "table.md").write_text(markdown, encoding="utf-8")
    for title, table in shown.items():
        console.print(table.rich(title))


if __name__ == "__main__":
    main()
