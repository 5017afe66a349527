"""`bamoe upcycle`: its time beside copying the same bytes, its memory, and both beside mergekit-moe's."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from builders import DTYPE, MERGEKIT, Builder, bamoe_builders, mergekit_builders, mergekit_recipe
from child_process import Memory, run
from harness import Bench, Call, Part, Result, Turns
from shapes import EXPERTS, Shape, dense_config, model_of
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bamoe.checkpoints.reader import CheckpointReader
from bamoe.reports.table import Column, amount

LIMIT = 2**30  # bytes of anonymous memory, the libraries' included


def dense_shape(width: int, depth: int, heads: int, inner: int) -> Shape:
    """Of a dense model on the disk; nothing runs it."""
    return Shape(width, depth, heads, inner, vocabulary=8192, batch=1, context=2048)


TINY = dense_shape(64, 2, 4, 128)
SMALL, LARGE = dense_shape(1024, 7, 16, 2816), dense_shape(2048, 9, 16, 5632)  # 0.21 and 0.99 GB
# The same bytes in a single layer, so in the largest tensors that they can make.
SMALL_ONE_LAYER, LARGE_ONE_LAYER = dense_shape(1024, 1, 16, 27_904), dense_shape(2048, 1, 16, 72_576)


@dataclass(frozen=True)
class Candidates:
    """Builders by name, what they build to start up, and mergekit's version or why there is none."""

    bamoe: Mapping[str, Builder]
    mergekit: Mapping[str, Builder]
    tiny: Sequence[Path]
    peer: str

    @property
    def all(self) -> dict[str, Builder]:
        """bamoe's and mergekit's."""
        return {**self.bamoe, **self.mergekit}


@contextmanager
def dense_models(shape: Shape, bench: Bench) -> Iterator[list[Path]]:
    """Directories of the dense models, a weight file and a tokenizer of three words in each; deleted afterwards."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="word"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    with tempfile.TemporaryDirectory(dir=bench.work.resolve()) as folder:
        paths = [Path(folder) / f"model-{number}" for number in range(EXPERTS)]
        model = model_of(dense_config(shape), replace(bench, dtype=DTYPE))
        for path in paths:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        del model
        yield paths


def weights(directories: Sequence[Path]) -> list[Path]:
    """The files that hold tensors."""
    return [file for directory in directories for file in sorted(directory.glob("*.safetensors"))]


def size(*directories: Path) -> int:
    """Bytes of their weights."""
    return sum(file.stat().st_size for file in weights(directories))


def turns_of(bench: Bench) -> int:
    """Fewer than elsewhere: each is a whole process, and moves gigabytes."""
    return 5 if bench.full else 2


def take_turns(calls: Mapping[str, Call], out: Path, read: Sequence[Path], bench: Bench) -> Turns:
    """Like `Bench.turns`, with the same start for every call, which does not count.

    There is no `out`, nothing waits to be written to the disk, and the files `read` are in the page cache (to empty
    it takes an administrator).
    """

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        run(["cat", *read], bench.threads)

    turns = bench.turns(calls, turns_of(bench), warm_up=0, before=before)
    shutil.rmtree(out, ignore_errors=True)
    return turns


def limits(made: Path, out: Path, read: Sequence[Path], bench: Bench) -> dict[str, Call]:
    """What the bytes alone take: a copy of the mixture `made`, a copy that is on the disk, and a read of the input."""

    def copy() -> None:
        # Some file systems would share the blocks; here bytes are to be copied.
        run(["cp", "-r", "--reflink=never", made, out], bench.threads)

    def flushed_copy() -> None:
        copy()
        run(["sync", *weights([out])], bench.threads)

    return {"cp": copy, "cp, flushed": flushed_copy, "read": lambda: run(["cat", *read], bench.threads)}


def start_ups(candidates: Candidates, bench: Bench) -> dict[str, float]:
    """Seconds by builder for tiny models: its program's imports, and whatever else is done once."""
    builders, out = candidates.all, bench.work / "out"
    one_each = {builder.program: partial(builder.build, candidates.tiny, out) for builder in builders.values()}
    turns = take_turns(
        {program.module: call for program, call in one_each.items()}, out, weights(candidates.tiny), bench
    )
    return {name: turns.median(builder.program.module) for name, builder in builders.items()}


def times(shape: Shape, inputs: Sequence[Path], candidates: Candidates, bench: Bench) -> list[Result]:
    """Of every mixture beside a copy of it, and of BTX beside mergekit-moe."""
    made, out, read = bench.work / "made", bench.work / "out", weights(inputs)
    starts = start_ups(candidates, bench)
    copies: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    for name, bamoe in candidates.bamoe.items():
        if name != "BTX" and not bench.full:
            continue
        bamoe.build(inputs, made)
        same = {name: bamoe, **(candidates.mergekit if bamoe.recipe is mergekit_recipe else {})}
        calls = {key: partial(one.build, inputs, out) for key, one in same.items()}
        turns = take_turns({**limits(made, out, read, bench), **calls}, out, [*read, *weights([made])], bench)
        copies.append({"name": name, "written": size(made), **beside_limits(name, turns, starts[name])})
        if len(same) > 1:
            peers = [{"name": key, **beside_bamoe(key, name, turns, starts)} for key in same]
        shutil.rmtree(made)
        bench.tell(f"{name}, width {shape.width}: timed")
    settings = {**model_settings(shape, inputs, candidates), "turns": turns_of(bench)}
    return [copies_table(copies, settings), *([peers_table(peers, settings)] if peers else [])]


def beside_limits(name: str, turns: Turns, start: float) -> dict[str, Any]:
    """A build's seconds over those of copy and read, all of them and those after start-up."""
    build, read = turns.seconds[name], turns.seconds["read"]
    compared = Turns(
        {
            "build": build,
            "work": [seconds - start for seconds in build],
            "limit": [a + b for a, b in zip(turns.seconds["cp"], read, strict=True)],
            "flushed": [a + b for a, b in zip(turns.seconds["cp, flushed"], read, strict=True)],
        }
    )
    return {
        "seconds": compared.median("build"),
        "start": start,
        "limit": compared.median("limit"),
        **compared.ratio("build", "limit"),
        "work": compared.ratio("work", "limit")["ratio"],
        "flushed": compared.ratio("work", "flushed")["ratio"],
    }


def beside_bamoe(name: str, bamoe: str, turns: Turns, starts: Mapping[str, float]) -> dict[str, Any]:
    """A build's seconds over those of `bamoe upcycle`, all of them and those after start-up."""
    work = Turns({key: [seconds - starts[key] for seconds in turns.seconds[key]] for key in (name, bamoe)})
    return {
        "seconds": turns.median(name),
        "start": starts[name],
        **turns.ratio(name, bamoe),
        "work": work.ratio(name, bamoe)["ratio"],
    }


def copies_table(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Result:
    """Mixtures beside copies of them."""
    columns = [
        Column("name", "mixture", "text"),
        Column("written", "bytes written", "amount"),
        Column("seconds", "s"),
        Column("start", "start-up, s"),
        Column("limit", "cp and read, s"),
        Column("ratio", "over cp and read"),
        Column("quartiles", "quartiles", "text"),
        Column("work", "without start-up"),
        Column("flushed", "without start-up, over cp, flush and read"),
    ]
    reading = (
        "`bamoe upcycle` as a whole process, over copying its output with cp and reading its input; less is better. "
        "To reach: at most 1.5. Start-up is a build of tiny models. cp leaves its copy in memory, bamoe returns when "
        "all is on the disk: so the last column, where the copy is on the disk too."
    )
    return Result(f"Upcycling beside a copy, {settings['models']}", columns, records, settings, reading)


def peers_table(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Result:
    """BTX beside mergekit-moe."""
    columns = [
        Column("name", "program", "text"),
        Column("seconds", "s"),
        Column("start", "start-up, s"),
        Column("ratio", "over bamoe's"),
        Column("quartiles", "quartiles", "text"),
        Column("work", "without start-up"),
    ]
    reading = (
        "The same mergekit-moe file, as whole processes. To reach: more than 1 for every mergekit-moe. "
        "Only bamoe waits for the disk."
    )
    return Result(f"Upcycling beside mergekit-moe, {settings['models']}", columns, records, settings, reading)


def memory_of(builder: Builder, inputs: Sequence[Path], candidates: Candidates, bench: Bench) -> tuple[Memory, int]:
    """Of one build, and the bytes of the largest tensor that it wrote."""
    out, first = bench.work / "out", bench.work / "first"
    jobs = builder.arguments(candidates.tiny, first), builder.arguments(inputs, out)
    memory = builder.program.watch(*jobs, report=bench.work / "status")
    with CheckpointReader(out) as reader:
        largest = max(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in reader.tensors.values())
    for directory in (first, out):
        shutil.rmtree(directory)
    return memory, largest


def memories(shape: Shape, inputs: Sequence[Path], candidates: Candidates, bench: Bench) -> list[dict[str, Any]]:
    """Rows of the memory table: builders on the same models."""
    builders = candidates.all
    if bench.full:
        builders["BTX, small shards"] = replace(builders["BTX"], after=("--max-shard-size", "256MB"))
    else:
        del builders["BAM, KV sharing"]
    measured = {name: memory_of(builder, inputs, candidates, bench) for name, builder in builders.items()}
    peers = [measured[name][0].above for name in candidates.mergekit]  # the first as it comes
    rows = []
    for name, (memory, largest) in measured.items():
        rivals = [] if name in candidates.mergekit else peers
        rows.append(
            {
                "name": name,
                "model": size(inputs[0]),
                "shape": f"{shape.width} x {shape.depth} x {shape.inner}",
                "largest": largest,
                "imports": memory.imports,
                "above": memory.above,
                "over_peer": memory.above / rivals[0] if rivals else None,
                "over_least": memory.above / min(rivals) if rivals else None,
                "peak": memory.peak,
                # To enforce a limit takes a control group, and so an administrator. RLIMIT_DATA is no substitute: it
                # counts the private mappings through which safetensors reads its files, though they take no memory
                # of their own, so that any build of large models would fail under it.
                "limit": "yes" if memory.peak <= LIMIT else "no",
            }
        )
    bench.tell(f"models of {amount(size(inputs[0]))}B: memory watched")
    return rows


def memory_table(records: Sequence[Mapping[str, Any]], candidates: Candidates) -> Result:
    """All models and all builders."""
    columns = [
        Column("name", "mixture or program", "text"),
        Column("model", "bytes of each model", "amount"),
        Column("shape", "width x depth x inner", "text"),
        Column("largest", "largest tensor written", "amount"),
        Column("imports", "after imports", "amount"),
        Column("above", "peak above that", "amount"),
        Column("over_peer", "over mergekit-moe's"),
        Column("over_least", "over its least"),
        Column("peak", "peak in all", "amount"),
        Column("limit", "below 1 GiB in all", "text"),
    ]
    reading = (
        "Bytes of anonymous memory, sampled every 2 ms, beyond what the same process held after it had built a mixture "
        "of tiny models; less is better. To reach: at most 400M at any size, and less than 0.5 of mergekit-moe's as it "
        "comes."
    )
    settings = {
        "models": f"{EXPERTS}, bfloat16",
        "heads": SMALL.heads,
        "vocabulary": SMALL.vocabulary,
        "mergekit-moe": candidates.peer,
    }
    return Result("Memory of upcycling", columns, records, settings, reading)


def model_settings(shape: Shape, inputs: Sequence[Path], candidates: Candidates) -> dict[str, Any]:
    """For the page."""
    sizes = {name: value for name, value in shape.settings().items() if name not in ("batch", "context")}
    return {
        "models": f"{EXPERTS} x {amount(size(inputs[0]))}B",
        "in": "bfloat16, a file each, in the page cache",
        **sizes,
        "mergekit-moe": candidates.peer,
    }


def measure(bench: Bench) -> list[Result]:
    """Times of models of usual shapes; memory also, and first of all, where tensors are very large."""
    timed, watched = [SMALL], [SMALL_ONE_LAYER]
    if bench.full:
        timed, watched = [SMALL, LARGE], [SMALL, SMALL_ONE_LAYER, LARGE, LARGE_ONE_LAYER]
    mergekit, peer = {}, MERGEKIT.partition("==")[2]
    try:
        mergekit = mergekit_builders(bench)
    except RuntimeError as error:
        peer = f"absent, for it could not be installed ({str(error).strip().splitlines()[-1]})"
        bench.tell(f"mergekit-moe is {peer}")
    results, rows = [], []
    with dense_models(TINY, bench) as tiny:
        candidates = Candidates(bamoe_builders(bench), mergekit, tiny, peer)
        for shape in dict.fromkeys([*timed, *watched]):
            with dense_models(shape, bench) as inputs:
                if shape in timed:
                    results += times(shape, inputs, candidates, bench)
                if shape in watched:
                    rows += memories(shape, inputs, candidates, bench)
    return [*results, memory_table(rows, candidates)]


PART = Part("upcycling", measure, needs_cpu=True)
