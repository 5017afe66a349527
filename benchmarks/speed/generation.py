"""Prefill, and decode with a cache: time beside a dense model's, and beside what has to be read and computed for it.

A token with few others at its side makes a machine read far more than it computes, so the fair yardstick of decode is
bytes; that of a long prompt is FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from harness import Bench, Part, Result
from shapes import DENSE, EXPERTS, Shape, batch_of, built, counted, model_of
from training_step import PRODUCT, product
from transformers import DynamicCache
from work import pass_flops, selections, surplus_flops, weight_bytes

from bamoe.modeling import BamoeConfig
from bamoe.reports.table import Column

BATCHES = (1, 8)
STREAM = 16_384, 8192  # rows and columns of the matrix whose product with a vector shows how fast memory is read


def shapes(bench: Bench) -> list[Shape]:
    """What is measured; `context` is the prompt, and the cache of the decode step."""
    if bench.device.type != "cpu":
        sizes = [(2048, 4, 16, 5632, 32_000)]
    else:
        sizes = [(1024, 2, 16, 2816, 2048), *([(512, 4, 8, 1408, 2048), (2048, 2, 32, 5632, 2048)] * bench.full)]
    return [Shape(*size, batch=batch, context=512) for size in sizes for batch in BATCHES]


class Generation:
    """A model, a prompt (batch, context) and the cache that the prompt leaves."""

    def __init__(self, model: Any, prompt: torch.Tensor):
        self.model, self.prompt, self.token = model.eval(), prompt, prompt[:, :1]
        self.cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def prefill(self) -> None:
        """Fill a new cache, with the logits of the last token alone, as `generate` does."""
        self.cache = DynamicCache(config=self.model.config)
        self.model(input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self) -> None:
        """One more token; what it adds to the cache is cut off again, without a copy."""
        self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)


@dataclass(frozen=True)
class Work:
    """What a pass computes, and what it reads from memory at least."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Machine:
    """What the processor can do: FLOPs per second of a large matrix product, bytes per second of a large matrix-vector
    product, and the latter's call."""

    flop_rate: float
    byte_rate: float
    read: Callable[[], object]

    def binds(self, work: Work) -> str:
        """What takes it longer."""
        return "bytes" if work.bytes / self.byte_rate > work.flops / self.flop_rate else "FLOPs"


def machine_of(bench: Bench) -> Machine:
    """Measure it."""
    matmul, flops = product(bench)
    matrix = torch.randn(*STREAM, device=bench.device, dtype=bench.dtype)
    vector = torch.randn(STREAM[1], device=bench.device, dtype=bench.dtype)
    turns = bench.turns({"product": matmul, "read": lambda: matrix @ vector}, 3)
    return Machine(flops / turns.median("product"), matrix.nbytes / turns.median("read"), lambda: matrix @ vector)


def work_of(generation: Generation, config: BamoeConfig) -> dict[str, Work]:
    """What the prefill and the decode step of this very prompt and cache cost; leaves the cache filled."""
    model, (batch, context) = generation.model, generation.prompt.shape
    chosen = selections(model, generation.prefill)
    flops = pass_flops(config, batch, context) + surplus_flops(config, chosen)
    prefill = Work(flops, weight_bytes(model, generation.prompt, chosen))
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in generation.cache.layers)
    chosen = selections(model, generation.decode)
    flops = pass_flops(config, batch, 1, context) + surplus_flops(config, chosen)
    return {"prefill": prefill, "decode": Work(flops, weight_bytes(model, generation.token, chosen) + cached)}


def table(
    what: str,
    shape: Shape,
    calls: Mapping[str, Callable[[], object]],
    works: Mapping[str, Work],
    machine: Machine,
    bench: Bench,
) -> Result:
    """Times of `calls` over the dense model's, and over what `works` lets expect."""
    # In its turn, the large matrix drives the weights out of the processor's cache: they have to be read from memory,
    # as those of a larger model would.
    count = {"prefill": 3, "decode": 9}[what] * (5 if bench.full else 1)
    turns = bench.turns({**calls, "read": machine.read}, count)
    dense, records = works[DENSE], []
    for name, work in works.items():
        over = {
            "FLOPs": turns.ratio(name, DENSE, dense.flops / work.flops),
            "bytes": turns.ratio(name, DENSE, dense.bytes / work.bytes),
        }
        binds = machine.binds(work)
        records.append(
            {
                "name": name,
                "flops": work.flops,
                "bytes": work.bytes,
                "time": turns.ratio(name, DENSE)["ratio"],
                "over_bytes": over["bytes"]["ratio"],
                "over_flops": over["FLOPs"]["ratio"],
                "binds": binds,
                "quartiles": over[binds]["quartiles"],
            }
        )
    columns = [
        Column("name", "model", "text"),
        Column("flops", "FLOPs", "amount"),
        Column("bytes", "bytes read", "bytes"),
        Column("time", "time over the dense model's"),
        Column("over_bytes", "over dense x bytes"),
        Column("over_flops", "over dense x FLOPs"),
        Column("binds", "binds", "text"),
        Column("quartiles", "quartiles of that", "text"),
    ]
    reading = (
        "Time over the dense model's times the ratio of bytes (weights that some token of the batch uses, cached keys "
        "and values) and of FLOPs; less is better. What binds is what this machine would need longer for, at the speed "
        "of a large matrix product and of a matrix-vector product. To reach there: 1.25."
    )
    settings = {
        **shape.settings(),
        "experts": f"{EXPERTS} (BAM, BTX), {2 * EXPERTS} (MoA, MoE++)",
        "matrix product": f"{PRODUCT} x {PRODUCT}",
        "matrix-vector product": f"{STREAM[0]} x {STREAM[1]}",
    }
    title = f"{what.capitalize()}, batch {shape.batch}, width {shape.width}"
    return Result(title, columns, records, settings, reading)


def prefill_and_decode(shape: Shape, machine: Machine, bench: Bench) -> list[Result]:
    """Both for one shape, from the same models."""
    prompt = batch_of(shape, bench)
    generations = {name: Generation(model_of(config, bench), prompt) for name, config in built(shape).items()}
    works = {name: work_of(generations[name], config) for name, config in counted(shape).items()}
    return [
        table(
            what,
            shape,
            {name: getattr(generation, what) for name, generation in generations.items()},
            {name: work[what] for name, work in works.items()},
            machine,
            bench,
        )
        for what in ("prefill", "decode")
    ]


def measure(bench: Bench) -> list[Result]:
    """All shapes."""
    machine, results = machine_of(bench), []
    for shape in shapes(bench):
        results += prefill_and_decode(shape, machine, bench)
        bench.tell(f"Prefill and decode, batch {shape.batch}, width {shape.width}: done")
    return results


PART = Part("generation", measure)
