"""Memory of a training step: what the forward pass keeps for the backward pass, and the most that is held at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from harness import Bench, Part, Result
from shapes import DENSE, EXPERTS, Shape, batch_of, built, counted, dense_config, mixtures, model_of, step_flops
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedConfig

from bamoe.reports.table import Column


@dataclass(frozen=True)
class Held:
    """Bytes beyond weights and gradients: kept from the forward pass to the backward one, and at the peak of both."""

    kept: int
    peak: int


def shapes(bench: Bench) -> list[Shape]:
    """What is measured: on an accelerator the shape of BAM's 590M model (BAM, appendix A) but for its vocabulary."""
    if bench.device.type != "cpu":
        return [Shape(1024, 6, 8, 2048, 32_000, batch=4, context=2048)]
    small = Shape(256, 4, 4, 704, 2048, batch=1, context=2048)
    return [small, Shape(512, 4, 8, 1408, 2048, batch=1, context=2048)] if bench.full else [small]


def large_vocabulary(bench: Bench) -> Shape:
    """A model that is little else than its logits."""
    return Shape(32, 1, 2, 64, 256_000, batch=1, context=512 if bench.device.type == "cpu" else 2048)


def held(loss: Callable[[], torch.Tensor], bench: Bench) -> Held:
    """What a forward pass and its backward pass allocate: exact, so once is enough."""
    if bench.device.type == "cpu":
        return _held_on_cpu(loss)
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    value = loss()
    kept = torch.accelerator.memory_allocated() - before
    value.backward()
    return Held(kept, torch.accelerator.max_memory_allocated() - before)


def _held_on_cpu(loss: Callable[[], torch.Tensor]) -> Held:
    """The same from the profiler's record of every allocation, for the CPU's allocator keeps no statistics."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        value = loss()
        with record_function("backward pass"):
            value.backward()
    events = profiler.profiler.kineto_results.events()
    backward = next(event.start_ns() for event in events if event.name() == "backward pass")
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    kept = sum(change for when, change in changes if when < backward)
    return Held(kept, max(accumulate(change for _, change in changes)))


def training_step(model: Any, ids: torch.Tensor, bench: Bench, **options: Any) -> Held:
    """Of one step over token ids (batch, context); `options` of the model's forward pass."""
    model.train()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)  # there beforehand, as when gradients accumulate: not counted
    return held(lambda: model(input_ids=ids, labels=ids, use_cache=False, **options).loss, bench)


def activations(shape: Shape, bench: Bench) -> Result:
    """Every mixture beside the dense model, without and with gradient checkpointing."""
    ids = batch_of(shape, bench)
    configs = counted(shape)
    plain, checkpointed = {}, {}
    for name, config in built(shape).items():
        model = model_of(config, bench)
        plain[name] = training_step(model, ids, bench)
        # Renamed in transformers 5.2x; the old name warns there.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        checkpointed[name] = training_step(model, ids, bench)
        bench.tell(f"Training memory, {name}: done")
    records = []
    for name, config in configs.items():
        flops = step_flops(config, shape) / step_flops(configs[DENSE], shape)
        records.append(
            {
                "name": name,
                "flops": flops,
                "kept": plain[name].kept,
                "over_kept": plain[name].kept / plain[DENSE].kept / flops,
                "peak": plain[name].peak,
                "over_peak": plain[name].peak / plain[DENSE].peak / flops,
                "checkpointed": checkpointed[name].kept,
                "checkpointed_peak": checkpointed[name].peak,
                "over_checkpointed_peak": checkpointed[name].peak / checkpointed[DENSE].peak / flops,
            }
        )
    columns = [
        Column("name", "model", "text"),
        Column("flops", "FLOPs over the dense model's"),
        Column("kept", "activations kept", "bytes"),
        Column("over_kept", "over dense x FLOPs"),
        Column("peak", "peak", "bytes"),
        Column("over_peak", "over dense x FLOPs"),
        Column("checkpointed", "kept with checkpointing", "bytes"),
        Column("checkpointed_peak", "peak with checkpointing", "bytes"),
        Column("over_checkpointed_peak", "over dense x FLOPs"),
    ]
    reading = (
        "Bytes beyond weights and gradients: what the forward pass keeps for the backward pass, and the peak of both; "
        "over the dense model's times the ratio of FLOPs. To reach: 1.2 in what is kept. MoE++'s FLOPs are those of "
        "trained routers, and untrained ones run more feed-forward experts. Checkpointing keeps a layer's input only."
    )
    settings = {**shape.settings(), "experts": f"{EXPERTS} (BAM, BTX), {2 * EXPERTS} (MoA, MoE++)"}
    return Result(f"Training memory, width {shape.width}", columns, records, settings, reading)


def logits(shape: Shape, bench: Bench) -> Result:
    """The loss over a large vocabulary, in copies of all logits."""
    ids = batch_of(shape, bench)
    copy = shape.tokens * shape.vocabulary * torch.float32.itemsize
    mixture = mixtures(shape)["BAM, KV sharing"]
    candidates: list[tuple[str, PreTrainedConfig, dict[str, Any]]] = [
        (DENSE, dense_config(shape), {}),
        ("BAM, KV sharing", mixture, {}),
        ("BAM, KV sharing, skip_logits", mixture, {"skip_logits": True}),
    ]
    records = []
    for name, config, options in candidates:
        step = training_step(model_of(config, bench), ids, bench, **options)
        records.append({"name": name, "copy": copy, "kept": step.kept / copy, "peak": step.peak / copy})
        bench.tell(f"Loss over {shape.vocabulary} tokens, {name}: done")
    columns = [
        Column("name", "model", "text"),
        Column("copy", "all logits in float32", "bytes"),
        Column("kept", "copies kept for the backward pass"),
        Column("peak", "copies at the peak"),
    ]
    reading = (
        "Bytes of a training step beyond weights and gradients, over those of one copy of the logits; the model itself "
        "is small beside them. With `skip_logits` the loss is computed in parts. To reach there: less than 2."
    )
    return Result(f"Loss over a vocabulary of {shape.vocabulary:,}", columns, records, shape.settings(), reading)


def measure(bench: Bench) -> list[Result]:
    """All shapes, and the loss over a large vocabulary."""
    return [*(activations(shape, bench) for shape in shapes(bench)), logits(large_vocabulary(bench), bench)]


PART = Part("training_memory", measure)
