"""The output directory of a training run: what is there, where to resume, and the model put in place at the end.

While a run goes on, everything is in `checkpoints/`, and event files in `tensorboard/`; the directory itself holds a
model only when the run is complete. `training_config.json` arrives last and says so. A run holds `checkpoints/run.lock`
as long as it lives, so that no second one writes here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bamoe.errors import BamoeError, CheckpointError, ConfigError
from bamoe.locks import locked

TRAINING_CONFIG = "training_config.json"
TRAINING_LOG = "training_log.jsonl"
# Settings that do not change the trained weights, or only say where they go.
FREE_TO_CHANGE = {
    *("output", "log_every_steps", "save_every_tokens", "keep_checkpoints", "keep_optimizer", "report_to", "parallel"),
}
# Settings that name files: another name may be the same file in a folder that was moved.
_PATHS = {"model", "output", "data", "validation"}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors passes on the system's words; of torch.save these are the words when it cannot write.
_NO_ROOM_WORDS = re.compile(
    "|".join([*map(os.strerror, _NO_ROOM), "PytorchStreamWriter", "unexpected pos", "iostream error"])
)


@dataclass(frozen=True)
class RunFolder:
    """The output directory of one run."""

    output: Path

    @property
    def checkpoints(self) -> Path:
        """Where an unfinished run keeps its state."""
        return self.output / "checkpoints"

    @property
    def staging(self) -> Path:
        """Where the final model is written before it is put in place."""
        return self.checkpoints / "final"

    @property
    def event_files(self) -> Path:
        """Where TensorBoard's event files go; they stay after the run."""
        return self.output / "tensorboard"

    @property
    def lock(self) -> Path:
        """The file that a living run holds."""
        return self.checkpoints / "run.lock"

    def is_finished(self, config: dict[str, Any] | None = None) -> bool:
        """Whether a run is complete here: any, or the one that learns what `config` says."""
        finished = _read_json(self.output / TRAINING_CONFIG)
        return finished is not None and (config is None or not _different(finished, config, FREE_TO_CHANGE))

    def move(self, config: dict[str, Any]) -> bool:
        """Let `config` go on with an unfinished run of its settings, whatever the paths; false if there is no such run.

        For a caller that knows that it is the same run in a folder that was moved.
        """
        started = _read_json(self.checkpoints / TRAINING_CONFIG)
        if started is None or _different(started, config, FREE_TO_CHANGE | _PATHS):
            return False
        _write_json(self.checkpoints / TRAINING_CONFIG, config)
        return True

    def check(self, config: dict[str, Any], resume: bool, force: bool) -> None:
        """Refuse an output that this run may not write to; changes nothing of use.

        Raises:
            ConfigError: files of something else, a finished run, one that goes on, or an unfinished one that cannot
                be resumed.
        """
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"output {self.output} is a file; choose another output")
        if self.lock.exists():
            with locked(self.lock, f"output {self.output}", shared=True):
                pass
        self._check_content(config, resume, force)

    def _check_content(self, config: dict[str, Any], resume: bool, force: bool) -> None:
        # A run that is killed in its first moments leaves a lock and a partial file.
        files = [path for path in self.output.rglob("*") if path.is_file() and path.suffix != ".partial"]
        if files in ([], [self.lock]):
            return
        finished = _read_json(self.output / TRAINING_CONFIG)
        started = _read_json(self.checkpoints / TRAINING_CONFIG)
        if finished is None and started is None:
            raise ConfigError(f"output {self.output} holds files that no training run wrote; choose another output")
        if force:
            return
        if finished is not None:
            if not finished.get("keep_checkpoints"):
                shutil.rmtree(self.checkpoints, ignore_errors=True)  # a kill may have left some of it
            raise ConfigError(
                f"output {self.output} already holds a finished run; choose another output, or --force to train again"
            )
        assert started is not None
        if different := _different(started, config, FREE_TO_CHANGE):
            raise ConfigError(
                f"output {self.output} holds an unfinished run with other settings; choose another output, or "
                "--force to start again\n  " + "\n  ".join(different)
            )
        if not resume:
            raise ConfigError(
                f"output {self.output} holds an unfinished run of these settings; leave out --no-resume to go on with "
                "it, or --force to start again"
            )

    @contextmanager
    def held(self, config: dict[str, Any], resume: bool, force: bool) -> Iterator[None]:
        """Make the directory this run's, and keep others out for the block; with `force`, delete an earlier run.

        Raises:
            ConfigError: the directory cannot be written, or is no longer what `check` saw.
        """
        with ExitStack() as stack:
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.lock, f"output {self.output}"))
                self._check_content(config, resume, force)
                started = self.checkpoints / TRAINING_CONFIG
                old = [path for path in self._checkpoints() if not _is_whole(path)]
                if force:
                    old = [path for path in self.checkpoints.iterdir() if path not in (started, self.lock)]
                _delete(old)
                _write_json(started, config)
                if force:
                    # Now, not before: whatever a kill leaves here is known to be a run's.
                    _delete(sorted(path for path in self.output.iterdir() if path != self.checkpoints))
            except OSError as error:
                remedy = "make room or choose another output" if error.errno in _NO_ROOM else "choose another output"
                raise ConfigError(f"cannot write output {self.output}: {error.strerror}; {remedy}") from error
            yield

    def _checkpoints(self) -> list[Path]:
        """Checkpoints, whole or not, in the order of their steps."""
        numbered = [
            (int(path.name.removeprefix("checkpoint-")), path)
            for path in self.checkpoints.glob("checkpoint-*")
            if path.name.removeprefix("checkpoint-").isdigit()
        ]
        return [path for _, path in sorted(numbered)]

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        return next((path for path in reversed(self._checkpoints()) if _is_whole(path)), None)

    @contextmanager
    def full_disk_explained(self) -> Iterator[None]:
        """Say in one CheckpointError what libraries say in many ways, and where the next run goes on."""
        try:
            yield
        except Exception as error:
            if isinstance(error, BamoeError) or not _is_full_disk(error):
                raise
            last = self.last_checkpoint()
            raise CheckpointError(
                f"cannot write to {self.output}: the disk is full, or a quota or limit is reached. Make room and give "
                f"the same command again, which goes on from {'the start' if last is None else last.name}."
            ) from error

    def finish(self, keep_checkpoints: bool) -> None:
        """Put the model in `staging` in place: config.json, which makes it loadable, after its weights."""
        shutil.copyfile(self.checkpoints / TRAINING_LOG, self.staging / TRAINING_LOG)
        last = Path("config.json")
        files = [path.relative_to(self.staging) for path in self.staging.rglob("*") if path.is_file()]
        for file in [*sorted(file for file in files if file != last), last]:
            (self.output / file).parent.mkdir(exist_ok=True)
            os.replace(self.staging / file, self.output / file)
        shutil.rmtree(self.staging)
        # With this one move the run is no longer unfinished, but finished.
        os.replace(self.checkpoints / TRAINING_CONFIG, self.output / TRAINING_CONFIG)
        if keep_checkpoints:
            self.lock.unlink()
        else:
            shutil.rmtree(self.checkpoints)


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_whole(checkpoint: Path) -> bool:
    # The Trainer writes this file after everything else.
    return _read_json(checkpoint / "trainer_state.json") is not None


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether no room is the cause of an error, or of one that it came from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if _NO_ROOM_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _different(there: dict[str, Any], now: dict[str, Any], but: set[str]) -> list[str]:
    return [
        f"{key}: {there.get(key)!r} there, {now[key]!r} now"
        for key in sorted(now.keys() - but)
        if there.get(key) != now[key]
    ]


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None when it is missing or was not written to its end."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
