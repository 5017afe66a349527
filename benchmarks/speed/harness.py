"""What every part of the benchmark suite does alike: candidates that take turns, tables with their settings, a page.

Machines are shared and noisy, so nothing is compared with a time of another run: candidates take turns, and what is
reported is the median over the turns of their ratio within a turn, with its quartiles.
"""

from __future__ import annotations

import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bamoe.experiments.environment import code_version, environment
from bamoe.reports.table import Column, Table

Call = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """How to measure.

    full: sizes and repetitions without a limit of time; else a part takes about a minute.
    work: an empty folder for what a part writes, deleted after it.
    console: where progress goes.
    """

    full: bool
    threads: int
    device: torch.device
    dtype: torch.dtype
    work: Path
    console: Console

    def tell(self, text: str) -> None:
        """Show progress."""
        self.console.print(text, style="dim")

    def turns(
        self, calls: Mapping[str, Call], turns: int | None = None, warm_up: int = 1, before: Call | None = None
    ) -> Turns:
        """Run every call once a turn, in an order that rotates; the first turns warm up and do not count, and neither
        does `before`, which runs before each call."""
        counted = turns or (15 if self.full else 5)
        names = list(calls)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(warm_up + counted):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if before is not None:
                    before()
                taken = self.seconds(calls[name])
                if turn >= warm_up:
                    seconds[name].append(taken)
        return Turns(seconds)

    def seconds(self, call: Call) -> float:
        """How long a call takes, the device's work included."""
        gc.collect()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


@dataclass(frozen=True)
class Turns:
    """Seconds of each candidate in each turn."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds of one candidate."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str, factor: float = 1.0) -> dict[str, Any]:
        """`factor` times the candidate's seconds over another's: the median over the turns and its quartiles."""
        ratios = [factor * a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return {"ratio": middle, "quartiles": f"{low:.2f} to {high:.2f}"}


def require_agreement(calls: Mapping[str, Callable[[], torch.Tensor]]) -> None:
    """Stop if a call returns anything but what the first one does, to half the digits of the type."""
    first, *others = calls
    expected = calls[first]().float()
    for name in others:
        found = calls[name]()
        allowed = torch.finfo(found.dtype).eps ** 0.5 * expected.abs().max()
        difference = (found.float() - expected).abs().max()
        if not difference <= allowed:
            raise AssertionError(f"{name} and {first} differ by {difference:.3g}, more than {allowed:.3g}")


def repeated(calls: Mapping[str, Call], times: int) -> dict[str, Call]:
    """Each call as often as a turn has it."""

    def repeat(call: Call) -> Call:
        def run() -> None:
            for _ in range(times):
                call()

        return run

    return {name: repeat(call) for name, call in calls.items()}


@dataclass(frozen=True)
class Result:
    """A table of one part.

    title: what is compared with what. settings: all sizes that were pinned. reading: how a column is to be read, and
    what must be reached.
    """

    title: str
    columns: Sequence[Column]
    records: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    reading: str

    def table(self) -> Table:
        """For the terminal and the page."""
        return Table(self.columns, self.records)


@dataclass(frozen=True)
class Part:
    """A part of the suite: a name for the command line, and what measures it."""

    name: str
    measure: Callable[[Bench], list[Result]]
    needs_cpu: bool = False  # nothing in it would run on an accelerator


@dataclass
class Record:
    """What a part left: its results, and what ran it."""

    part: str
    command: str
    results: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=lambda: {**environment(), "processor": processor()})
    code: dict[str, Any] = field(default_factory=code_version)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def section(part: str, command: str, results: Sequence[Result], bench: Bench) -> str:
    """The part of the page: every table with its reading, its settings, the command and the machine."""
    blocks = []
    for result in results:
        settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
        blocks += [
            f"**{result.title}**. {result.reading}",
            result.table().markdown().rstrip(),
            f"Settings: {settings}.",
        ]
    facts = environment()
    device = facts["device"] if bench.device.type != "cpu" else f"{processor()}, {bench.threads} threads"
    code = code_version()
    commit = f", commit {code['commit'][:10]}{' and changes' if code['modified'] else ''}" if "commit" in code else ""
    blocks.append(
        f"`{command}`, on {device}, {str(bench.dtype).removeprefix('torch.')}; torch {facts['torch']}, "
        f"transformers {facts['transformers']}{commit}."
    )
    return "\n\n".join(blocks)


def put(page: Path, part: str, text: str) -> None:
    """Write a part's section between its markers on the page, or at the end of it."""
    start, end = f"<!-- measured: {part} -->", f"<!-- end: {part} -->"
    whole = page.read_text(encoding="utf-8") if page.is_file() else "# Benchmarks\n"
    block = f"{start}\n{text}\n{end}"
    if start in whole:
        before, rest = whole.split(start, 1)
        whole = before + block + rest.split(end, 1)[1]
    else:
        whole = f"{whole.rstrip()}\n\n{block}\n"
    page.write_text(whole, encoding="utf-8")
