"""Programs that run in processes of their own: to the end, or watched for the memory that they take."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.002  # seconds between two looks at a process

# Runs a module's command line twice; in between, the process tells how much it holds.
_TWICE = """
import json, runpy, sys
from pathlib import Path
module, report, *runs = json.loads(sys.argv[1])
for number, arguments in enumerate(runs):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise
    if number == 0:
        Path(report).write_text(Path("/proc/self/status").read_text())
"""


@dataclass(frozen=True)
class Memory:
    """Anonymous memory of a process in bytes: when all was imported, and at most."""

    imports: int
    peak: int

    @property
    def above(self) -> int:
        """What the work took beside the libraries."""
        return self.peak - self.imports


@dataclass(frozen=True)
class Program:
    """A Python program, by its module: `python -m module ...`."""

    python: Path
    module: str
    threads: int

    def run(self, arguments: Sequence[str | Path]) -> None:
        """Run it to the end. Raises RuntimeError with what it said when it fails."""
        run([self.python, "-m", self.module, *arguments], self.threads)

    def watch(self, small: Sequence[str | Path], large: Sequence[str | Path], report: Path) -> Memory:
        """Do a small job, whose only purpose is that everything gets imported, then a large one in the same process.

        `report` is a file that the process may write. Raises RuntimeError when it fails.
        """
        jobs = [[str(argument) for argument in job] for job in (small, large)]
        command = [str(self.python), "-c", _TWICE, json.dumps([self.module, str(report), *jobs])]
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                command, env=environment(self.threads), stdout=subprocess.DEVNULL, stderr=errors, text=True
            )
            peak = 0
            try:
                while child.poll() is None:
                    peak = max(peak, anonymous_bytes(Path(f"/proc/{child.pid}/status")))
                    time.sleep(INTERVAL)
            finally:
                child.kill()  # nothing where it has ended
                child.wait()
            errors.seek(0)
            _check(child.returncode, 0, [self.module, *large], errors.read())
        return Memory(anonymous_bytes(report), peak)


def python_program(module: str, threads: int) -> Program:
    """A program of this very environment."""
    return Program(Path(sys.executable), module, threads)


def run(command: Sequence[str | Path], threads: int, code: int = 0) -> str:
    """Run a command to the end, and return what it wrote on stderr.

    Raises RuntimeError with that when it does not end with `code`.
    """
    done = subprocess.run(
        command, env=environment(threads), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    _check(done.returncode, code, command, done.stderr)
    return done.stderr


def environment(threads: int) -> dict[str, str]:
    """This process's, with the benchmark's threads; no library looks for a newer model on the hub."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def anonymous_bytes(status: Path) -> int:
    """Memory that belongs to no file, from a process's `status` (proc(5)); what was swapped out counts."""
    return 1024 * sum(int(kib) for kib in re.findall(r"^(?:RssAnon|VmSwap):\s*(\d+) kB", status.read_text(), re.M))


def _check(found: int, expected: int, command: Sequence[str | Path], said: str) -> None:
    if found != expected or "Traceback (" in said:
        raise RuntimeError(f"{shlex.join(map(str, command))} ended with {found}:\n{said[-2000:]}")
