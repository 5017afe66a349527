"""Steps of an experiment: each done once, side by side where they do not need each other, resumed after a stop.

A step has a folder of its own, `root`/NAME, for whatever it writes; NAME may have slashes. `step.json` there is its
record: what it was called with, the hashes of what it read, what ran it, and its result. It appears when the step is
done, and stands as long as the step's fingerprint (of its arguments, its inputs and everything before it) is the same.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from bamoe.errors import BamoeError, ConfigError
from bamoe.experiments.environment import code_version, environment
from bamoe.locks import locked

Event = Literal["kept", "started", "finished"]
Listener = Callable[[Event, "Step", float], None]  # with the seconds the step took, 0 when it starts

RECORD, LOG = "step.json", "log.txt"
_STARTED, _LOCK = ".started", ".lock"


@dataclass(frozen=True)
class Step:
    """One call, `function(**arguments)`, with plain data in and out.

    function: of a module, so that a worker process can find it.
    needs: the steps that come first; `makes`: the files or folders that must exist for the step to count as done.
    inputs: anything else the result depends on, such as the hashes of the files it reads.
    means: further arguments, which say how the result is reached and not what it is.
    """

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    needs: Sequence[str] = ()
    makes: Sequence[Path] = ()
    inputs: Any = None
    means: Mapping[str, Any] = field(default_factory=dict)

    def is_called(self, pattern: str) -> bool:
        """Whether `pattern` names this step: all of its name, or whole parts of it, with wildcards."""
        parts, wanted = self.name.split("/"), pattern.strip("/").split("/")
        return any(
            all(map(fnmatchcase, parts[start : start + len(wanted)], wanted))
            for start in range(len(parts) - len(wanted) + 1)
        )


class StepError(BamoeError):
    """A step that failed; the message names it and its log."""


def run_steps(
    steps: Sequence[Step],
    root: Path,
    *,
    workers: int,
    only: Collection[str] | None = None,
    force: bool = False,
    listener: Listener = lambda event, step, seconds: None,
) -> dict[str, Any]:
    """Run the steps that are not done yet and return the records of all steps that are done, by name.

    A finished step is kept as long as its fingerprint is the same, also when `root` is moved; one that has changed
    starts again in an empty folder. Where several could start, the first in the list does.

    Args:
        steps: in an order in which each comes after what it needs.
        workers: processes, each with one thread, so that results do not depend on how many there are; 0 runs
            everything in this process. With GPUs, each process has one of them.
        only: run only the steps that one of these patterns names (none: just read the records); what they need must be
            done. Several such runs may work in `root` at once.
        force: do every chosen step again, from an empty folder.
        listener: told of every step kept, started and finished.

    Raises:
        ConfigError: another run uses one of the steps, a pattern names no step, or a step's folder holds files of
            something else.
        StepError: a step ended in an error of the user's, or what it needs is not done; other errors come out as they
            are. Other running steps stop.
    """
    chosen = _chosen(steps, only)
    with ExitStack() as locks, _full_disk_explained(root):
        done = _Done(root, steps, chosen if force else set())
        for step in steps:
            if step.name in done.records:
                listener("kept", step, done.records[step.name]["seconds"])
        waiting = [step for step in steps if step.name in chosen and step.name not in done.records]
        for step in waiting:
            if only is not None and (
                missing := [
                    name for name in dict.fromkeys(step.needs) if name not in done.records and name not in chosen
                ]
            ):
                raise StepError(f"{step.name} needs {', '.join(missing)}, not done in {root}; run that first")
            (root / step.name).mkdir(parents=True, exist_ok=True)
            locks.enter_context(locked(root / step.name / _LOCK, str(root / step.name)))
        if waiting:
            _run(waiting, root, done, workers, listener)
    return done.records


def states(steps: Sequence[Step], root: Path) -> dict[str, Literal["done", "to do", "changed"]]:
    """What a run in `root` would find of every step; what is "changed" would be deleted and done again."""
    done = _Done(root, steps, ())
    return {step.name: "done" if step.name in done.records else done.found(step) for step in steps}


def _chosen(steps: Sequence[Step], only: Collection[str] | None) -> set[str]:
    for pattern in only or ():
        # With wildcards it may well be that there is none.
        if not any(wild in pattern for wild in "*?[") and not any(step.is_called(pattern) for step in steps):
            close = difflib.get_close_matches(pattern, [step.name for step in steps], n=3, cutoff=0.3)
            raise ConfigError(
                f"--only {pattern}: no such step{f'; did you mean {close}?' if close else ''}; --dry-run names them all"
            )
    return {step.name for step in steps if only is None or any(step.is_called(pattern) for pattern in only)}


class _Done:
    """What is done in `root`: the records of its steps, and the fingerprints that they must have."""

    def __init__(self, root: Path, steps: Sequence[Step], again: Collection[str]) -> None:
        """`again`: steps that count as not done, whatever is there."""
        self.root = root
        self.again = set(again)
        self.code = code_version()
        self.records: dict[str, dict[str, Any]] = {}
        self.fingerprints: dict[str, str] = {}
        for step in steps:
            self.fingerprints[step.name] = _fingerprint(step, self.fingerprints, root)
            record = _read_json(root / step.name / RECORD)
            same = record.get("fingerprint") == self.fingerprints[step.name] and step.name not in self.again
            if same and all(path.exists() for path in step.makes) and all(name in self.records for name in step.needs):
                self.records[step.name] = record

    def found(self, step: Step) -> Literal["to do", "changed"]:
        """What there is of a step that is not done."""
        started = self.root / step.name / _STARTED
        same = not started.is_file() or started.read_text(encoding="utf-8") == self.fingerprints[step.name]
        return "to do" if same else "changed"

    def begin(self, step: Step) -> None:
        """Make the step's folder ready: as an interrupted call left it, or empty if that was another call."""
        folder, fingerprint = self.root / step.name, self.fingerprints[step.name]
        started, record = folder / _STARTED, folder / RECORD
        others = [path for path in folder.iterdir() if path not in (folder / _LOCK, started, record)]
        if others and not (started.is_file() or record.is_file()):
            raise ConfigError(f"{folder} holds files that no step wrote; choose another folder for the experiment")
        if not started.is_file() or started.read_text(encoding="utf-8") != fingerprint or step.name in self.again:
            # First what says that the rest is of use.
            for path in (record, started, *others):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            started.write_text(fingerprint, encoding="utf-8")

    def finish(self, step: Step, outcome: _Outcome) -> None:
        """Keep the step's result, as it will be read again."""
        record: dict[str, Any] = {
            "step": step.name,
            "fingerprint": self.fingerprints[step.name],
            "function": f"{step.function.__module__}.{step.function.__qualname__}",
            "arguments": step.arguments,
            "means": step.means,
            "inputs": step.inputs,
            "needs": {name: self.fingerprints[name] for name in step.needs},
            "code": self.code,
            "environment": outcome.environment,
            "seconds": round(outcome.seconds, 3),
            "result": outcome.result,
        }
        path = self.root / step.name / RECORD
        _write_json(path, record)
        self.records[step.name] = _read_json(path)


@dataclass(frozen=True)
class _Outcome:
    result: Any
    seconds: float
    environment: dict[str, Any]


def _run(waiting: list[Step], root: Path, done: _Done, workers: int, listener: Listener) -> None:
    running: dict[Future[_Outcome], Step] = {}
    with _executor(workers) as executor:
        while waiting or running:
            ready = [step for step in waiting if all(name in done.records for name in step.needs)]
            for step in ready[: max(workers, 1) - len(running)]:
                waiting.remove(step)
                done.begin(step)
                listener("started", step, 0.0)
                log = root / step.name / LOG if workers else None
                running[executor.submit(_timed, step.function, {**step.arguments, **step.means}, log)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                try:
                    outcome = future.result()
                except BamoeError as error:
                    raise StepError(f"step {step.name!r}: {error}") from error
                except OSError as error:
                    raise StepError(f"step {step.name!r}: {error}; the same command goes on from here") from error
                except BrokenProcessPool as error:
                    names = ", ".join(sorted({step.name, *(other.name for other in running.values())}))
                    raise StepError(
                        f"a worker process died during {names}; its {LOG} is in the step's folder in {root}. Out of "
                        "memory? Or a script without `if __name__ == '__main__'`? The same command goes on from here"
                    ) from error
                except Exception as error:
                    error.add_note(f"in step {step.name} of {root}")
                    raise
                done.finish(step, outcome)
                listener("finished", step, outcome.seconds)


def _fingerprint(step: Step, before: Mapping[str, str], root: Path) -> str:
    """Of everything that decides the step's result; the same when the whole folder `root` is moved."""
    what = {
        "function": f"{step.function.__module__}.{step.function.__qualname__}",
        "arguments": dict(step.arguments),
        "inputs": step.inputs,
        "needs": [before[name] for name in step.needs],
    }
    text = json.dumps(what, sort_keys=True).replace(json.dumps(f"{root}/")[1:-1], "")
    return hashlib.sha256(text.encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


@contextmanager
def _full_disk_explained(root: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # of what is shown, not of what is kept
    except OSError as error:
        raise StepError(f"cannot write {error.filename or root}: {error.strerror}; the same command goes on") from error


def _timed(function: Callable[..., Any], arguments: dict[str, Any], log: Path | None) -> _Outcome:
    if log is not None:
        _write_output_to(log)
    start = time.perf_counter()
    result = function(**arguments)
    return _Outcome(result, time.perf_counter() - start, environment())


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
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for place in range(workers):
        places.put(_device(place) if workers > 1 else None)
    executor = ProcessPoolExecutor(workers, context, initializer=_become_worker, initargs=(places,))
    try:
        yield executor
        executor.shutdown()
    except BaseException:
        # Leaving would wait for the steps that still run.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise


def _device(place: int) -> str | None:
    """The GPU of one of several workers, as CUDA_VISIBLE_DEVICES names it; None without GPUs."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) == count and all(visible) else [str(index) for index in range(count)]
    return names[place % count] if count else None


def _become_worker(places: Any) -> None:
    """One thread per process: small matrices gain nothing from more, and results must not depend on the machine."""
    if (device := places.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before torch looks
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
