"""torch.compile of every mixture: graph breaks in a training pass and a decode step, what it costs, what it brings.

A graph break sends a pass back to the interpreter in its midst, and rules out one CUDA graph for all of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from harness import Bench, Part, Result, repeated, require_agreement
from shapes import Shape, batch_of, mixtures, model_of
from transformers import StaticCache

from bamoe.modeling import BamoeConfig
from bamoe.reports.table import Column

CACHED, ROOM = 256, 1024  # tokens in the static cache before the first step, and those it has room for
STEPS = 20  # decode steps per turn
PASSES = ("forward and backward", "decode step")
# What is timed where time is short: to compile a training pass takes half a minute on two cores.
QUICK = {"BAM, KV experts": PASSES, "MoA": PASSES[1:]}


def pinned(bench: Bench) -> Shape:
    """Few layers, as each is compiled for itself; two, for what a layer hands to the next."""
    if bench.device.type == "cpu":
        return Shape(256, 2, 4, 704, 2048, batch=4, context=128)
    return Shape(1024, 2, 8, 2048, 32_000, batch=8, context=1024)


def arguments(model: Any, name: str, shape: Shape, bench: Bench) -> dict[str, Any]:
    """What the model is called with in a pass; for a decode step, a static cache that is filled without compiling."""
    ids = batch_of(shape, bench)
    if name == PASSES[0]:
        model.train()
        return {"input_ids": ids, "labels": ids, "use_cache": False}
    model.eval()
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    prompt = ids.flatten()[None, :CACHED]
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
    return {"input_ids": prompt[:, :1], "past_key_values": cache, "use_cache": True}


def call_of(function: Callable[..., Any], model: Any, given: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """A pass through the model, compiled or not: the loss, after its backward pass, or the step's logits."""

    def train() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss: torch.Tensor = function(**given).loss
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def step() -> torch.Tensor:
        logits: torch.Tensor = function(**given).logits
        return logits

    return train if "labels" in given else step


def graph_breaks(model: Any, name: str, shape: Shape, bench: Bench) -> int:
    """Graph breaks of a pass; counted by its tracing alone, which needs no compiler."""
    given = arguments(model, name, shape, bench)
    with torch.set_grad_enabled("labels" in given):
        found = torch._dynamo.explain(model)(**given)
    for reason in found.break_reasons:
        bench.tell(f"graph break: {reason.reason}")
    count: int = found.graph_break_count
    return count


def timed(model: Any, name: str, shape: Shape, whole: bool, bench: Bench) -> dict[str, Any]:
    """Times of a pass that is not compiled over those of compiled ones, and how long the first compiled one takes.

    whole: refuse graph breaks, as else what the compiler cannot do would be run uncompiled.
    """
    # One forward has few compiled versions at a time, and beyond them runs uncompiled, without a word.
    torch._dynamo.reset()
    functions = {"eager": model, "compiled": torch.compile(model, fullgraph=whole)}
    if bench.device.type == "cuda":
        functions["graphs"] = torch.compile(model, fullgraph=whole, mode="reduce-overhead")
    calls = {key: call_of(function, model, arguments(model, name, shape, bench)) for key, function in functions.items()}
    try:
        first = {key: bench.seconds(call) for key, call in calls.items()}
    except RuntimeError as error:
        bench.tell(f"{name}: {str(error).splitlines()[0]}")
        return {"quartiles": "does not compile"}
    if bench.dtype == torch.float32:  # in a shorter type rounding is enough to select another expert
        require_agreement(calls)
    turns = bench.turns(repeated(calls, 1 if name == PASSES[0] else STEPS))
    found = {"first": first["compiled"], **turns.ratio("eager", "compiled")}
    if "graphs" in calls:
        graphs = turns.ratio("eager", "graphs")
        found |= {"graphs": graphs["ratio"], "graphs_quartiles": graphs["quartiles"]}
    return found


def can_compile(bench: Bench) -> bool:
    """Whether there is a compiler for what inductor writes (C++ on a CPU); if so, it is started and ready."""
    # An empty folder: what a former run compiled would be found elsewhere, and nothing would be timed but reading it.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(bench.work / "inductor")
    values = torch.ones(64, device=bench.device)
    try:
        torch.compile(lambda values: values.sin() + 1)(values)
    except RuntimeError as error:
        bench.tell(f"no times, for nothing can be compiled here: {str(error).splitlines()[0]}")
        return False
    return True


def compare(model: Any, name: str, shape: Shape, with_time: bool, bench: Bench) -> dict[str, Any]:
    """Graph breaks and, where wanted, times of a pass."""
    breaks = graph_breaks(model, name, shape, bench)
    times = timed(model, name, shape, breaks == 0, bench) if with_time else {}
    return {"pass": name, "breaks": str(breaks), **times}


def table(shape: Shape, kinds: dict[str, BamoeConfig], bench: Bench) -> Result:
    """All kinds of mixtures and both passes."""
    works, everything = can_compile(bench), bench.full or bench.device.type != "cpu"
    records = []
    for kind, config in kinds.items():
        model = model_of(config, bench)
        for name in PASSES:
            with_time = works and (everything or name in QUICK.get(kind, ()))
            records.append({"name": kind, **compare(model, name, shape, with_time, bench)})
        bench.tell(f"{kind}: done")
    columns = [
        Column("name", "model", "text"),
        Column("pass", "pass", "text"),
        Column("breaks", "graph breaks", "text"),
        Column("first", "first call, compiling", "duration"),
        Column("ratio", "speed, compiled over not"),
        Column("quartiles", "quartiles", "text"),
    ]
    if bench.device.type == "cuda":
        columns += [
            Column("graphs", "speed, reduce-overhead over not compiled"),
            Column("graphs_quartiles", "quartiles", "text"),
        ]
    reading = "To reach: no graph break. Speed: more is better. " + (
        "Empty cells were not timed." if works else "There are no times, as nothing can be compiled on this machine."
    )
    settings = {
        **shape.settings(),
        "decode": f"batch 1, {CACHED} cached in a static cache of {ROOM}, {STEPS} steps per turn",
    }
    return Result(f"Compiled, width {shape.width}", columns, records, settings, reading)


def measure(bench: Bench) -> list[Result]:
    """One shape."""
    shape = pinned(bench)
    return [table(shape, mixtures(shape), bench)]


PART = Part("compiled", measure)
