"""A training step: achieved FLOP/s beside the dense model's and a matrix product's; tokens/s beside other mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Bench, Part, Result
from shapes import (
    DENSE,
    EXPERTS,
    Shape,
    batch_of,
    built,
    counted,
    jetmoe_config,
    mixtral_config,
    mixture_config,
    model_of,
    step_flops,
)
from torch.profiler import ProfilerActivity, profile
from work import selections, surplus_flops

from bamoe.modeling import BamoeConfig
from bamoe.modeling.costs import flops_per_token
from bamoe.reports.table import Column

PRODUCT = 3072  # rows and columns of the matrix product
OPERATORS = {
    "core": ("attention",),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "grouped_mm"),
    "dispatch": ("index", "sort", "scatter", "gather", "searchsorted"),
}
BACKENDS = ("eager", "grouped_mm")  # the third, batched_mm, would copy an expert's weights for every token


def shapes(bench: Bench) -> list[Shape]:
    """What is measured: on an accelerator the shape of BAM's 590M model (BAM, appendix A) too."""
    if bench.device.type != "cpu":
        return [
            Shape(1024, 6, 8, 2048, 32_000, batch=16, context=2048),
            Shape(1024, 6, 8, 2048, 256_000, batch=8, context=2048),
        ]
    small = [
        Shape(256, 4, 4, 704, 2048, batch=8, context=256),
        Shape(512, 4, 8, 1408, 2048, batch=8, context=256),
    ]
    return [*small, Shape(1024, 4, 16, 2816, 2048, batch=8, context=256)] if bench.full else small


def forward_backward(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """One pass forward and one backward; gradients stay where they are, as in a training loop."""
    model.train()

    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return call


def with_optimizer(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """The whole step with AdamW in one kernel."""
    optimizer, run = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), forward_backward(model, ids)

    def call() -> None:
        run()
        optimizer.step()

    return call


def product(bench: Bench) -> tuple[Callable[[], object], float]:
    """A large matrix product and its FLOPs."""
    left, right = (torch.randn(PRODUCT, PRODUCT, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * PRODUCT**3


def computed_flops(config: BamoeConfig, model: Any, shape: Shape, ids: torch.Tensor) -> float:
    """FLOPs of one training step of this model on this batch: of MoE++, of the assignments that were computed."""
    dropped: list[torch.Tensor] = []

    @torch.no_grad()
    def forward() -> None:
        dropped.extend(getattr(model.train()(input_ids=ids, use_cache=False), "dropped_assignments", None) or ())

    chosen = selections(model, forward)
    return step_flops(config, shape) + 3 * surplus_flops(config, chosen, dropped)


def against_dense(shape: Shape, bench: Bench) -> Result:
    """Achieved model FLOP/s of every mixture, over the dense model's and the matrix product's."""
    ids = batch_of(shape, bench)
    configs = counted(shape)
    models = {name: model_of(config, bench) for name, config in built(shape).items()}
    calls = {name: forward_backward(models[name], ids) for name in configs}
    flops = {name: computed_flops(config, models[name], shape, ids) for name, config in configs.items()}
    matmul, flops["product"] = product(bench)
    passes = bench.turns({**calls, "product": matmul}, turns=None if bench.full else 4)
    optimized = {}
    if bench.full:
        steps = bench.turns({name: with_optimizer(models[name], ids) for name in configs})
        optimized = {name: steps.ratio(DENSE, name, flops[name] / flops[DENSE])["ratio"] for name in configs}
    records = [
        {
            "name": name,
            "flops": flops[name],
            "rate": flops[name] / passes.median(name),
            **passes.ratio(DENSE, name, flops[name] / flops[DENSE]),
            "of_product": passes.ratio("product", name, flops[name] / flops["product"])["ratio"],
            "with_optimizer": optimized.get(name),
        }
        for name in configs
    ]
    columns = [
        Column("name", "model", "text"),
        Column("flops", "FLOPs per step", "amount"),
        Column("rate", "FLOP/s", "amount"),
        Column("ratio", "over the dense model's"),
        Column("quartiles", "quartiles", "text"),
        Column("of_product", "over the matrix product's"),
        *([Column("with_optimizer", "over the dense model's, AdamW included")] * bench.full),
    ]
    reading = (
        "Model FLOP/s of a forward and a backward pass; more is better. To reach: 1.0 of the dense model's with BAM, "
        "0.95 with sparse layers, 0.8 of the matrix product's from width 512 on."
    )
    settings = {**shape.settings(), "product": f"{PRODUCT} x {PRODUCT}", "experts": EXPERTS}
    return Result(f"Training step, width {shape.width}", columns, records, settings, reading)


def against_mixtures(shape: Shape, bench: Bench) -> Result:
    """Tokens per second of Mixtral and JetMoE, and of mixtures of the same active parameters."""
    ids = batch_of(shape, bench)
    mixtral, jetmoe = mixtral_config(shape), jetmoe_config(shape)
    like_mixtral = mixture_config(shape, experts=EXPERTS, num_experts_per_tok=2, norm_topk_prob=True)
    like_jetmoe = mixture_config(
        shape, 2 * EXPERTS, "shared", 2 * EXPERTS, num_experts_per_tok=2, norm_topk_prob=True,
        attention_routing="top_k", num_attention_experts_per_tok=2,
    )  # fmt: skip
    calls = {
        **{f"Mixtral, {name}": forward_backward(_with(mixtral, name, bench), ids) for name in BACKENDS},
        "BTX": forward_backward(model_of(like_mixtral, bench), ids),
        "JetMoE": forward_backward(model_of(jetmoe, bench), ids),
        "MoA and top-2 feed-forward": forward_backward(model_of(like_jetmoe, bench), ids),
    }
    turns = bench.turns(calls, turns=None if bench.full else 3)
    fastest = min((name for name in calls if name.startswith("Mixtral")), key=turns.median)
    records = [
        {
            "name": name,
            "rate": shape.tokens / turns.median(name),
            **({} if peer is None else turns.ratio(peer, name)),
            "peer": peer,
        }
        for name, peer in [
            *((name, None) for name in calls if name.startswith("Mixtral")),
            ("BTX", fastest),
            ("JetMoE", None),
            ("MoA and top-2 feed-forward", "JetMoE"),
        ]
    ]
    columns = [
        Column("name", "model", "text"),
        Column("rate", "tokens/s", "amount"),
        Column("peer", "peer", "text"),
        Column("ratio", "tokens/s over the peer's"),
        Column("quartiles", "quartiles", "text"),
    ]
    reading = "Forward and backward pass; more is better. To reach: more than 1."
    settings = {**shape.settings(), "experts": f"{EXPERTS} (Mixtral), {2 * EXPERTS} (JetMoE), 2 per token"}
    return Result(f"Training beside other mixtures, width {shape.width}", columns, records, settings, reading)


def _with(config: Any, backend: str, bench: Bench) -> Any:
    return model_of(config, bench, experts_implementation=backend)


def where_time_goes(shape: Shape, bench: Bench) -> Result:
    """A profile of one step of every model: which kinds of operators take how much of it, and how fast they are."""
    ids = batch_of(shape, bench)
    matmul, product_flops = product(bench)
    rate, records = product_flops / bench.turns({"product": matmul}, 3).median("product"), []
    configs = built(shape)
    for name, config in counted(shape).items():
        model = model_of(configs[name], bench)
        call = forward_backward(model, ids)
        seconds = profiled(call, bench)
        core = step_flops(config, shape) - 3 * flops_per_token(config, 0).total * shape.tokens
        flops = {"products": computed_flops(config, model, shape, ids) - core, "core": core}
        records.append(
            {
                "name": name,
                **{kind: seconds[kind] / sum(seconds.values()) for kind in (*OPERATORS, "rest")},
                **{f"{kind} rate": flops[kind] / seconds[kind] / rate for kind in flops},
            }
        )
    columns = [
        Column("name", "model", "text"),
        Column("products", "matrix products", "share"),
        Column("core", "attention core", "share"),
        Column("dispatch", "sorting and gathering", "share"),
        Column("rest", "element-wise and the rest", "share"),
        Column("products rate", "FLOP/s of products over the large one's"),
        Column("core rate", "FLOP/s of the core over it"),
    ]
    reading = (
        "Shares of a forward and a backward pass by kind of operator, from torch's profiler. The core's FLOPs are "
        "counted at half, and its backward pass at twice the forward pass, though it computes the scores again."
    )
    settings = {**shape.settings(), "product": f"{PRODUCT} x {PRODUCT}", "experts": EXPERTS}
    return Result(f"Where a training step goes, width {shape.width}", columns, records, settings, reading)


def profiled(call: Callable[[], object], bench: Bench) -> dict[str, float]:
    """Seconds of one call by kind of operator."""
    on_cpu = bench.device.type == "cpu"
    activities = [ProfilerActivity.CPU, *([] if on_cpu else [ProfilerActivity.CUDA])]
    with profile(activities=activities, acc_events=True) as events:
        bench.seconds(call)
    seconds = dict.fromkeys((*OPERATORS, "rest"), 0.0)
    for event in events.key_averages():
        if not on_cpu and not event.key.startswith("aten::"):
            continue  # kernels, which their operators count already
        kind = next((kind for kind, names in OPERATORS.items() if any(name in event.key for name in names)), "rest")
        seconds[kind] += (event.self_cpu_time_total if on_cpu else event.self_device_time_total) / 1e6
    return seconds


def measure(bench: Bench) -> list[Result]:
    """All shapes, and a profile of the largest."""
    results = []
    for shape in shapes(bench):
        for table in (against_dense, against_mixtures):
            results.append(table(shape, bench))
            bench.tell(f"{results[-1].title}: done")
    return [*results, where_time_goes(shapes(bench)[-1], bench)]


PART = Part("training_step", measure)
