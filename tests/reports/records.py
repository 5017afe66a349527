"""Made-up experiments for the tests of the report, deterministic."""

import math

import numpy as np

from bamoe.reports.record import (
    DifferenceRecord,
    ExperimentRecord,
    Interval,
    ParameterMatch,
    RowRecord,
    RunRecord,
    TableRecord,
)

DOMAINS = ("general", "code", "law", "math")
LAYERS, EXPERTS = 4, 4
# key, name, budget, perplexity relative to the seed's, attention router
VARIANTS = (
    ("dense-mixture", "dense, mixture tokens", "data", 0.93, None),
    ("dense-all", "dense, all tokens", "data", 0.84, None),
    ("sparse-mixture", "sparse upcycling, mixture tokens", "data", 0.92, False),
    ("btx-top-1", "BTX top-1", "data", 0.90, False),
    ("btx-top-2", "BTX top-2", "data", 0.885, False),
    ("btx-soft", "BTX, soft", "data", 0.882, False),
    ("btx-top-3-of-6", "BTX top-3 of 6", "data", 0.876, False),
    ("bam-kv-sharing", "BAM, KV sharing", "data", 0.875, True),
    ("bam-kv-experts", "BAM, KV experts", "data", 0.866, True),
    ("bam-kv-experts-compute", "BAM, KV experts, same compute", "compute", 0.879, True),
)


def run(seed, domains, scale, routing=None, points=40):
    random = np.random.default_rng([seed, round(scale * 1000)])
    perplexity = {
        domain: (24.0 - 4 * index) * scale * (1 + 0.004 * random.standard_normal())
        for index, domain in enumerate(domains)
    }
    steps = np.linspace(0, 2_000_000, points + 1)[1:]
    start = 3.2 + 0.05 * scale
    noise = 0.05 * random.standard_normal(points)
    average = float(np.mean(list(perplexity.values())))
    return RunRecord(
        seed=seed,
        perplexity=perplexity,
        bits_per_byte={domain: 0.4 * math.log2(value) for domain, value in perplexity.items()},
        average_perplexity=average,
        average_log_perplexity=float(np.mean(np.log(list(perplexity.values())))),
        routing=routing,
        loss_curve=[(float(x), float(start - 0.3 * x / 2e6 + e)) for x, e in zip(steps, noise, strict=True)],
        validation_curve=[
            (float(x), average * (1 + 0.4 * math.exp(-x / 6e5) - 0.4 * math.exp(-2e6 / 6e5))) for x in steps[3::4]
        ],
        seconds=312.5 + seed,
        command=f"bamoe run experiment.yaml OUT --only seed-{seed}/{scale}",
    )


def routing(seed, kinds, experts=EXPERTS, layers=LAYERS, domains=DOMAINS, load=None):
    random = np.random.default_rng([seed, experts])

    def layer(depth, index):
        logits = random.standard_normal(experts) * 0.3
        logits[index % experts] += 0.6 * depth
        probability = np.exp(logits) / np.exp(logits).sum() if load is None else np.array(load)
        return {
            "load": probability.tolist(),
            "probability": probability.tolist(),
            "gate": probability.tolist(),
            "load_entropy": float(-(probability * np.log(probability)).sum()),
            "token_entropy": 0.8 * math.log(experts),
        }

    return {
        kind: {domain: [layer(depth, index) for depth in range(layers)] for index, domain in enumerate(domains)}
        for kind in kinds
    }


def row(
    key, name, runs, budget="", aside=False, same_batches=False, total=19_873_792, active=16_000_000, behind=9_000_000
):
    return RowRecord(
        key=key,
        name=name,
        budget=budget,
        total_parameters=total,
        active_parameters=active,
        own_tokens=2_000_000,
        tokens=2_000_000 + behind,
        own_flops=6.0 * active * 2e6,
        flops=6.0 * (active * 2e6 + 16e6 * behind),
        kv_cache_bytes_per_token=4096 if "experts" not in key else 16384,
        runs=runs,
        aside=aside,
        same_batches=same_batches,
    )


def difference(rows, key, against, seeds):
    mean = math.log(rows[key].runs[0].average_perplexity / rows[against].runs[0].average_perplexity)
    over_seeds = Interval(mean, mean - 0.009, mean + 0.009, len(seeds)) if len(seeds) > 1 else None
    return DifferenceRecord(
        key, against, math.exp(mean) - 1, over_seeds, Interval(mean, mean - 0.004, mean + 0.004, 400)
    )


def experiment(seeds=(0, 1, 2), **changes):
    """Four dense models for context, ten rows that compete, a table against each of two of them."""
    rows = [row("seed", "seed", [run(seed, DOMAINS, 1.0) for seed in seeds], aside=True, behind=0)]
    for index, domain in enumerate(DOMAINS[1:]):
        runs = [run(seed, DOMAINS, 1.05 + 0.03 * index) for seed in seeds]
        rows.append(row(domain, f"expert: {domain}", runs, aside=True, behind=2_000_000))
    for key, name, budget, scale, attention in VARIANTS:
        kinds = () if attention is None else ("feed_forward", "attention") if attention else ("feed_forward",)
        experts = 6 if key.endswith("6") else EXPERTS
        found = [routing(seed, kinds, experts) if kinds else None for seed in seeds]
        runs = [run(seed, DOMAINS, scale, found[index]) for index, seed in enumerate(seeds)]
        rows.append(row(key, name, runs, budget, same_batches=budget == "data" and "all" not in key))
    by_key = {found.key: found for found in rows}
    competing = [key for key, *_ in VARIANTS]
    differences = [difference(by_key, key, "btx-top-1", seeds) for key in competing if key != "btx-top-1"]
    differences += [difference(by_key, "bam-kv-experts", other, seeds) for other in ("btx-top-3-of-6", "dense-all")]
    fields = {
        "name": "Branch-Attend-Mix at laptop scale",
        "description": "Three branches of a small Llama, mixed.\n\nAll text comes with\nthe Python installation.",
        "command": "bamoe run experiment.yaml OUT",
        "domains": DOMAINS,
        "seeds": seeds,
        "sequence_length": 256,
        "rows": rows,
        "tables": [
            TableRecord("Data-matched", ["seed", *competing[:-1]], "btx-top-1", "All rows on the same mixture tokens."),
            TableRecord("Against top-3 of 6", ["btx-top-3-of-6", "bam-kv-experts"], "btx-top-3-of-6"),
        ],
        "differences": differences,
        "parameter_matches": [
            ParameterMatch("btx-top-3-of-6", "bam-kv-experts", 0.0012, -0.0041),
            ParameterMatch("btx-top-1", "bam-kv-experts", -0.0974, -0.081),
        ],
        "own_expert": {"general": 23.98, "code": 14.31, "law": 11.07, "math": 8.52, "average": 14.47},
        "corpora": {
            domain: {
                part: {"documents": 1234 + index, "characters": 3_456_789, "sha256": f"{index:02x}" * 32}
                for index, part in enumerate(("train", "valid"))
            }
            for domain in DOMAINS
        },
        "environment": {"python": "3.11.2", "torch": "2.13.0", "cores": 2, "device": "cpu"},
        "code": {"bamoe": "0.1.0", "commit": "0123456789abcdef0123456789abcdef01234567", "modified": False},
        "config": "name: laptop\nseeds: [0, 1, 2]\nvariants:\n- btx-top-1\n- bam-kv-experts\n",
        "notes": ["Every model here is small: the order of the rows is the result, not their level."],
        "samples": {"code": "def first(values):\n    return values[0]", "law": "The contract " * 30},
    }
    return ExperimentRecord(**(fields | changes))


def smallest():
    """One dense row, no routing, nothing that may be left out."""
    only = row("dense", "dense", [run(0, ("text",), 1.0)], budget="data")
    return ExperimentRecord(
        name="One model",
        description="",
        command="bamoe run one.yaml OUT",
        domains=["text"],
        seeds=[0],
        sequence_length=64,
        rows=[only],
        tables=[TableRecord("All rows", ["dense"])],
        differences=[],
        parameter_matches=[],
        own_expert=None,
        corpora={},
        environment={},
        code={},
        config="name: One model\n",
    )
