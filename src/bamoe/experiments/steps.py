"""Steps of an experiment: each done once, side by side where they do not need each other, resumed after a stop."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bamoe.errors import BamoeError

Event = Literal["kept", "started", "finished"]
Listener = Callable[[Event, "Step", float], None]  # with the seconds the step took, 0 when it starts


@dataclass(frozen=True)
class Step:
    """One call, `function(**arguments)`, with plain data in and out.

    function: of a module, so that a worker process can find it.
    needs: the steps that come first; `makes`: the files or folders that must exist for the step to count as done.
    inputs: anything else the result depends on, such as the text of a config file.
    """

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    needs: Sequence[str] = ()
    makes: Sequence[Path] = ()
    inputs: Any = field(default=None)


class StepError(BamoeError):
    """A step that failed; the message names it and its log."""


def run_steps(
    steps: Sequence[Step], records: Path, *, workers: int, listener: Listener = lambda event, step, seconds: None
) -> dict[str, Any]:
    """Run the steps that are not done yet and return every step's result.

    A finished step leaves `records`/NAME.json with its result and a fingerprint of its arguments and of everything
    before it. It is kept as long as that is the same, also when the folder around `records` is moved. Where several
    could start, the first in the list does.

    Args:
        steps: in an order in which each comes after what it needs.
        records: a folder for the records and the logs of the workers.
        workers: processes, each with one thread, so that results do not depend on how many there are; 0 runs
            everything in this process.
        listener: told of every step kept, started and finished.

    Raises:
        StepError: a step ended in an error of the user's; other errors come out as they are. Other running steps stop.
    """
    records.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    fingerprints: dict[str, str] = {}
    waiting: list[Step] = []
    for step in steps:
        fingerprints[step.name] = _fingerprint(step, fingerprints, records.parent)
        record = _read_record(records, step.name)
        done = record.get("fingerprint") == fingerprints[step.name] and all(path.exists() for path in step.makes)
        if done and all(name in results for name in step.needs):
            results[step.name] = record["result"]
            listener("kept", step, record["seconds"])
        else:
            waiting.append(step)
    if not waiting:
        return results
    with _executor(workers) as executor:
        running: dict[Future[tuple[Any, float]], Step] = {}
        while waiting or running:
            ready = [step for step in waiting if all(name in results for name in step.needs)]
            for step in ready[: max(workers, 1) - len(running)]:
                waiting.remove(step)
                listener("started", step, 0.0)
                log = records / f"{step.name}.log" if workers else None
                running[executor.submit(_timed, step.function, dict(step.arguments), log)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                try:
                    results[step.name], seconds = future.result()
                except BamoeError as error:
                    raise StepError(f"step {step.name!r}: {error}") from error
                except BrokenProcessPool as error:
                    names = ", ".join(sorted({step.name, *(other.name for other in running.values())}))
                    raise StepError(
                        f"a worker process died during {names} (out of memory?); its log is in {records}. The same "
                        "command goes on from here"
                    ) from error
                _write_record(records, step.name, fingerprints[step.name], results[step.name], seconds)
                listener("finished", step, seconds)
    return results


def _fingerprint(step: Step, before: Mapping[str, str], root: Path) -> str:
    """Of everything that decides the step's result; the same when the whole folder `root` is moved."""
    what = {
        "function": f"{step.function.__module__}.{step.function.__qualname__}",
        "arguments": dict(step.arguments),
        "inputs": step.inputs,
        "needs": [before[name] for name in step.needs],
    }
    text = json.dumps(what, sort_keys=True).replace(json.dumps(str(root))[1:-1], "")
    return hashlib.sha256(text.encode()).hexdigest()


def _read_record(records: Path, name: str) -> dict[str, Any]:
    try:
        record = json.loads((records / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(records: Path, name: str, fingerprint: str, result: Any, seconds: float) -> None:
    path = records / f"{name}.json"
    partial = path.with_suffix(".partial")
    record = {"fingerprint": fingerprint, "seconds": round(seconds, 3), "result": result}
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _timed(function: Callable[..., Any], arguments: dict[str, Any], log: Path | None) -> tuple[Any, float]:
    if log is not None:
        _write_output_to(log)
    start = time.perf_counter()
    result = function(**arguments)
    return result, time.perf_counter() - start


class _InThisProcess(Executor):
    """Runs a call when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _executor(workers: int) -> Iterator[Executor]:
    if workers == 0:
        yield _InThisProcess()
        return
    others = set(multiprocessing.active_children())
    # Spawned, not forked: a forked copy of a process that has used torch's threads may hang.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_become_worker)
    try:
        yield executor
        executor.shutdown()
    except BaseException:
        # Leaving would wait for the steps that still run.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise


def _become_worker() -> None:
    """One thread per process: small matrices gain nothing from more, and results must not depend on the machine."""
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal; the parent stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # By default a lock between processes, which a worker stopped in its work would leave behind.
    tqdm.set_lock(threading.RLock())
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A killed parent cannot tell its workers, which would train on as orphans.
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _write_output_to(log: Path) -> None:
    """Send this process's stdout and stderr, progress bars included, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
