"""How fast and how frugal bamoe is, beside what one would use instead and beside what the machine can do.

    python benchmarks/speed/bench.py OUT [--part training_step ...] [--full] [--page docs/benchmarks.md]

Each part runs in a process of its own and leaves OUT/PART.json; its tables go to the page, between its markers.
FLOPs are counted as everywhere in bamoe: 2 per multiply-accumulate, the causal attention core at half, routers counted,
norms not; a training step is three times a forward pass. On a GPU, if there is one (bfloat16), else float32.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from harness import Bench, Part, Record, put, section
from rich.console import Console

# In the order of the page.
PARTS = (
    "training_step", "soft_attention", "parallel_block", "generation", "scaling", "training_memory", "compiled",
    "upcycling", "start_up",
)  # fmt: skip
WIDE = 170  # characters of a table


def part_of(name: str) -> Part:
    """The part with this name, from the module of the same name."""
    found: Part = importlib.import_module(name).PART
    return found


def run(name: str, given: argparse.Namespace) -> None:
    """Measure one part in this process."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDE)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    part = part_of(name)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile tells the terminal of its start and its stop
    gc.freeze()  # else every collection between two timed calls walks through torch and transformers
    device = torch.device("cpu") if part.needs_cpu or accelerator is None else accelerator
    torch.set_num_threads(given.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory(dir=given.out) as work:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        bench = Bench(given.full, torch.get_num_threads(), device, dtype, Path(work), console)
        results = part.measure(bench)
    options = ["--part", name, *["--full"] * given.full, *([f"--threads={given.threads}"] if given.threads else [])]
    command = shlex.join(["python", "benchmarks/speed/bench.py", "OUT", *options])
    plain = [{**asdict(result), "columns": [asdict(column) for column in result.columns]} for result in results]
    Record(name, command, plain).write(given.out / f"{name}.json")
    put(given.page or given.out / "benchmarks.md", name, section(name, command, results, bench))
    for result in results:
        console.print(result.table().rich(result.title))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--full", action="store_true", help="more sizes and turns, without a limit of time")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own")
    parser.add_argument("--page", type=Path, help="where the tables go; default: OUT/benchmarks.md")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    parts = given.part or list(PARTS)
    if len(parts) == 1:
        run(parts[0], given)
        return
    failed = []
    for number, name in enumerate(parts, start=1):
        print(f"{number} of {len(parts)}: {name}", flush=True)
        start = time.perf_counter()
        options = [f"--{option}={value}" for option in ("threads", "page") if (value := getattr(given, option))]
        arguments = [sys.executable, __file__, str(given.out), "--part", name, *options, *["--full"] * given.full]
        if subprocess.run(arguments).returncode:
            failed.append(name)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the others are in {given.out}")


if __name__ == "__main__":
    main()
