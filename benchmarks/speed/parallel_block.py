"""What it brings that attention and feed-forward of a parallel block could run at the same time (BAM, section 3).

A parallel block is run one half after the other; prototypes with the same results are measured beside it. On a CPU: the
products that read the block's input made one, and a thread for each half. On a GPU: a stream for each half, all kernels
launched by the host one by one, and replayed as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from harness import Bench, Call, Part, Result, repeated, require_agreement
from shapes import EXPERTS, Shape, mixture_config, model_of
from soft_attention import CACHED, CALLS, HEAD_WIDTH, LONG, inference
from torch import nn

from bamoe.modeling.modeling_bamoe import BamoeDecoderLayer
from bamoe.reports.table import Column

BLOCKS = {"BAM": EXPERTS, "dense": 1}


class Computed(nn.Module):
    """Stands where a projection was, and hands out its part of a product that is already there."""

    product: torch.Tensor

    def forward(self, rows: torch.Tensor, *_: Any) -> torch.Tensor:
        """The product's rows for `rows` (..., D), in their shape."""
        return self.product.reshape(*rows.shape[:-1], -1)


class SharedProducts(nn.Module):
    """A parallel block with queries, keys, values and the logits of both routers from a single product.

    Only for inference, as the wide weight is a copy, and only in float32, for router logits are never less.
    """

    weight: torch.Tensor

    def __init__(self, layer: BamoeDecoderLayer):
        super().__init__()
        self.layer, self.parts = layer, []
        weights = []
        for name in ("q_proj", "k_proj", "v_proj"):
            weights.append(getattr(layer.self_attn, name).weight)
            self.parts.append(Computed())
            setattr(layer.self_attn, name, self.parts[-1])
        for router in (getattr(layer.self_attn, "gate", None), getattr(layer.mlp, "gate", None)):
            if router is not None:
                weights.append(router.weight)
                self.parts.append(Computed())
                router.score = self.parts[-1].forward
        self.register_buffer("weight", torch.cat([weight.detach() for weight in weights]))
        self.widths = [len(weight) for weight in weights]

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        """Map hidden_states (B, T, D) to the next ones."""
        normed = self.layer.input_layernorm(hidden_states)
        for part, product in zip(self.parts, F.linear(normed, self.weight).split(self.widths, dim=-1), strict=True):
            part.product = product
        attended, fed = self.layer.self_attn(normed, **kwargs)[0], self.layer.mlp(normed)[0]
        return (hidden_states + attended + fed,)


class TwoThreads(nn.Module):
    """A parallel block whose halves run in a thread each, with half of the cores each; only for inference.

    The backward pass would run in one thread whatever the forward pass did. The interpreter is shared too: only inside
    an operation is its lock free for the other thread.
    """

    def __init__(self, layer: BamoeDecoderLayer, workers: Sequence[Executor]):
        super().__init__()
        self.layer, self.workers = layer, workers

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        """Map hidden_states (B, T, D) to the next ones."""
        normed = self.layer.input_layernorm(hidden_states)
        attending = self.workers[0].submit(_without_gradients, self.layer.self_attn, normed, **kwargs)
        feeding = self.workers[1].submit(_without_gradients, self.layer.mlp, normed)
        return (hidden_states + attending.result()[0] + feeding.result()[0],)


class OneThread(nn.Module):
    """A block one half after the other with half of the cores: what two threads gain at few tokens may be nothing but
    that fewer cores wait for each other in every operation."""

    def __init__(self, layer: BamoeDecoderLayer, worker: Executor):
        super().__init__()
        self.layer, self.worker = layer, worker

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        """Map hidden_states (B, T, D) to the next ones."""
        return self.worker.submit(_without_gradients, self.layer, hidden_states, **kwargs).result()


def _without_gradients(module: nn.Module, *given: Any, **kwargs: Any) -> Any:
    # Whether gradients are recorded is a setting of each thread, and on in a new one.
    with torch.no_grad():
        return module(*given, **kwargs)


class TwoStreams(nn.Module):
    """A parallel block whose feed-forward is queued on a stream of its own."""

    def __init__(self, layer: BamoeDecoderLayer, stream: torch.cuda.Stream):
        super().__init__()
        self.layer, self.stream = layer, stream

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        """Map hidden_states (B, T, D) to the next ones."""
        normed = self.layer.input_layernorm(hidden_states)
        current = torch.cuda.current_stream()
        # As each stream waits for the other, neither gets memory that the other still uses.
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            fed = self.layer.mlp(normed)[0]
        attended = self.layer.self_attn(normed, **kwargs)[0]
        current.wait_stream(self.stream)
        return (hidden_states + attended + fed,)


def worker(threads: int) -> Executor:
    """A thread that computes with `threads` threads.

    torch.set_num_threads is process-wide for threads that have not computed yet: each takes over the number at its
    first operation, or when it first asks. From then on the call sets the caller's own number, for OpenMP as for MKL.
    Every such thread has a team of OpenMP threads to itself, and an idle team spins for a while: on few cores the main
    thread's team, which made the norm, can be in the way of the two others.
    """

    def start() -> None:
        torch.get_num_threads()
        torch.set_num_threads(threads)

    pool = ThreadPoolExecutor(1, initializer=start)
    pool.submit(torch.get_num_threads).result()
    return pool


def workers(bench: Bench) -> list[Executor]:
    """Two threads with half of the cores each; none where there is a single core, or a GPU."""
    if bench.device.type != "cpu" or bench.threads < 2:
        return []
    half = bench.threads // 2
    made = [worker(half), worker(bench.threads - half)]
    torch.set_num_threads(bench.threads)  # what the workers set is also the number that later threads take over
    return made


def captured(call: Call) -> Call:
    """The call as a CUDA graph: launched as one, where few tokens are done before the host launched their kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up at their first calls, which cannot be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> object:
        graph.replay()
        return output

    return replay


def block(shape: Shape, experts: int, parallel: bool, bench: Bench) -> Any:
    """A layer, and the same in another call: weights come from one seed."""
    config = mixture_config(shape, experts, "experts", experts, use_parallel_block=parallel)
    return model_of(config, bench).model.layers[0]


def prototypes(shape: Shape, experts: int, halves: Sequence[Executor], bench: Bench) -> dict[str, nn.Module]:
    """Blocks that do at once what the parallel block does one after the other."""
    if bench.device.type == "cuda":
        return {"streams": TwoStreams(block(shape, experts, True, bench), torch.cuda.Stream())}
    found: dict[str, nn.Module] = {}
    if bench.dtype == torch.float32:
        found["shared"] = SharedProducts(block(shape, experts, True, bench))
    if halves:
        found["half"] = OneThread(block(shape, experts, True, bench), halves[0])
        found["threads"] = TwoThreads(block(shape, experts, True, bench), halves)
    return found


def compare(
    modules: dict[str, nn.Module], config: Any, shape: Shape, tokens: int, bench: Bench
) -> dict[str, float | str | None]:
    """Time of the parallel block as it is over the others'."""
    calls: dict[str, Callable[[], Any]] = {
        name: inference(module, config, shape, tokens, bench) for name, module in modules.items()
    }
    if bench.device.type == "cuda":
        calls |= {f"{name}, graph": captured(call) for name, call in calls.items()}
    require_agreement({name: call for name, call in calls.items() if not name.startswith("sequential")})
    short = tokens == LONG and not bench.full and bench.device.type == "cpu"
    turns = bench.turns(repeated(calls, CALLS[tokens]), 3 if short else None)
    found: dict[str, float | str | None] = {}
    for name in calls:
        ratio = turns.ratio("parallel", name)
        found |= {name: ratio["ratio"], f"{name} quartiles": ratio["quartiles"]}
    return found


def columns(bench: Bench) -> list[Column]:
    """What there is on this device."""
    if bench.device.type == "cuda":
        titles = {
            "sequential": "sequential block",
            "streams": "two streams",
            "parallel, graph": "CUDA graph",
            "streams, graph": "two streams, CUDA graph",
        }
    else:
        titles = {
            "sequential": "sequential block",
            "shared": "shared products",
            "threads": "a thread per half",
            "half": "one after the other, half of the cores",
        }
    found = [Column("block", "block", "text"), Column("tokens", "tokens", "text")]
    for name, title in titles.items():
        found += [Column(name, title), Column(f"{name} quartiles", "quartiles", "text")]
    return found


def table(width: int, halves: Sequence[Executor], bench: Bench) -> Result:
    """All blocks and numbers of tokens at one width."""
    shape = Shape(width, 1, width // HEAD_WIDTH, width * 11 // 4, 8, batch=1, context=LONG)
    records = []
    for name, experts in BLOCKS.items():
        layers = {"parallel": block(shape, experts, True, bench), "sequential": block(shape, experts, False, bench)}
        config = layers["parallel"].self_attn.config
        modules = {**layers, **prototypes(shape, experts, halves, bench)}
        for tokens in CALLS:
            found = compare(modules, config, shape, tokens, bench)
            records.append({"block": name, "tokens": str(tokens), **found})
    reading = (
        "Inference: speed over that of the parallel block as it is, one half after the other; more is better, and more "
        f"than 1 is what computing at the same time brings. One token is decoded with {CACHED} in the cache. The "
        "sequential block is of the same size, but another function."
    )
    settings = {
        "batch": 1,
        "width": width,
        "heads per expert": shape.heads,
        "feed-forward width": shape.inner,
        "experts": f"{EXPERTS} of attention, {EXPERTS} of feed-forward, 1 per token (BAM), 1 and 1 (dense)",
        "calls per turn": ", ".join(f"{calls} at {tokens}" for tokens, calls in CALLS.items()) + " tokens",
    }
    return Result(f"Parallel block, width {width}", columns(bench), records, settings, reading)


def measure(bench: Bench) -> list[Result]:
    """All widths."""
    results, halves = [], workers(bench)
    try:
        for width in (256, 512, 1024) if bench.full or bench.device.type != "cpu" else (512,):
            results.append(table(width, halves, bench))
            bench.tell(f"{results[-1].title}: done")
    finally:
        for half in halves:
            half.shutdown()
    return results


PART = Part("parallel_block", measure)
