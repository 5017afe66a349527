"""A forward pass as experts, context or width grow: its time against the cost model of `bamoe inspect`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from harness import Bench, Part, Result
from shapes import EXPERTS, Shape, batch_of, mixture_config, model_of
from work import pass_flops

from bamoe.modeling import BamoeConfig
from bamoe.reports.table import Column

DEPTH, HEAD_WIDTH, VOCABULARY = 1, 64, 2048


@dataclass(frozen=True)
class Axis:
    """What grows, and for each of its sizes the shape and the number of experts; all else stays."""

    name: str
    cases: Mapping[int, tuple[Shape, int]]

    def settings(self) -> dict[str, Any]:
        """For the page: one value where all sizes share it, else all of them."""
        cases = [{**asdict(shape), "experts": experts} for shape, experts in self.cases.values()]
        return {name: " / ".join(dict.fromkeys(str(case[name]) for case in cases)) for name in cases[0]}


def axes(bench: Bench) -> list[Axis]:
    """Each at a fixed number of tokens, enough to fill the cores, of experts with few tokens each too."""
    on_cpu = bench.device.type == "cpu"
    width, context, tokens = (256, 256, 8192) if on_cpu else (1024, 1024, 65_536)
    experts = (2, 4, 8, 16, 32) if bench.full else (4, 8, 32)
    contexts = (256, 512, 1024, 2048, 4096, 8192) if bench.full else (256, 1024, 4096)
    widths = [width // 2 * factor for factor in ((1, 2, 4, 8) if bench.full else (1, 2, 4))]
    return [
        Axis("experts", {size: (shape_of(width, context, tokens), size) for size in experts}),
        Axis("context", {size: (shape_of(width, size, tokens), EXPERTS) for size in contexts}),
        Axis("width", {size: (shape_of(size, context, tokens), EXPERTS) for size in widths}),
    ]


def shape_of(width: int, context: int, tokens: int) -> Shape:
    """A shape with heads and feed-forward in proportion to its width."""
    return Shape(width, DEPTH, width // HEAD_WIDTH, width * 11 // 4, VOCABULARY, tokens // context, context)


def mixtures_of(shape: Shape, experts: int) -> dict[str, BamoeConfig]:
    """One mixture of each kind with as many experts as asked for."""
    top_2_attention: dict[str, Any] = {"attention_routing": "top_k", "num_attention_experts_per_tok": 2}
    zero_computation: dict[str, Any] = {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2}
    # With tau = 1 the equilibrium that the cost model counts is a uniform choice, which is what untrained routers make.
    uniform: dict[str, Any] = {"num_experts_per_tok": 2, "zero_computation_tau": 1.0}
    return {
        "BAM, KV experts": mixture_config(shape, experts, "experts", experts),
        "BAM, KV sharing": mixture_config(shape, experts, "shared", experts),
        "BTX": mixture_config(shape, experts=experts),
        "MoA": mixture_config(shape, experts, "shared", **top_2_attention),
        "MoE++": mixture_config(shape, experts=experts, **zero_computation, **uniform),
    }


def forward(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """A pass over all tokens (batch, context), with the logits of the last ones only, so that the layers count."""
    model.eval()

    @torch.inference_mode()
    def call() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return call


def along(axis: Axis, bench: Bench) -> Result:
    """Times and FLOPs over those of the largest size, which fills the cores if any does."""
    mixtures = {size: mixtures_of(*case) for size, case in axis.cases.items()}
    largest, records = max(mixtures), []
    for name in mixtures[largest]:
        calls, flops = {}, {}
        for size, (shape, _) in axis.cases.items():
            config = mixtures[size][name]
            calls[str(size)] = forward(model_of(config, bench), batch_of(shape, bench))
            flops[size] = pass_flops(config, shape.batch, shape.context)
        turns = bench.turns(calls, turns=None if bench.full else 2)
        for size in mixtures:
            predicted = flops[size] / flops[largest]
            records.append(
                {
                    "name": name,
                    "size": size,
                    "flops": flops[size],
                    "rate": flops[size] / turns.median(str(size)),
                    "predicted": predicted,
                    "measured": turns.ratio(str(size), str(largest))["ratio"],
                    **turns.ratio(str(size), str(largest), 1 / predicted),
                }
            )
        bench.tell(f"Cost against {axis.name}, {name}: done")
    columns = [
        Column("name", "model", "text"),
        Column("size", axis.name, "text"),
        Column("flops", "FLOPs", "amount"),
        Column("rate", "FLOP/s", "amount"),
        Column("predicted", f"FLOPs over those at {largest}", "fine"),
        Column("measured", f"time over that at {largest}", "fine"),
        Column("ratio", "time over FLOPs"),
        Column("quartiles", "quartiles", "text"),
    ]
    reading = (
        f"A forward pass without a gradient, over the one at {axis.name} {largest}; 1 is as the cost model says, and "
        "more is a size too small to fill the cores. To reach: 0.8 to 1.2 from the smallest size that fills them."
    )
    return Result(f"Cost against {axis.name}", columns, records, axis.settings(), reading)


def measure(bench: Bench) -> list[Result]:
    """All axes."""
    return [along(axis, bench) for axis in axes(bench)]


PART = Part("scaling", measure)
