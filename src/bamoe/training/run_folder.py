"""The output directory of a training run: what is there, where to resume, and the model put in place at the end.

While a run goes on, everything is in `checkpoints/`; the directory itself holds a model only when the run is complete.
`training_config.json` arrives last and says so.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bamoe.errors import ConfigError

TRAINING_CONFIG = "training_config.json"
TRAINING_LOG = "training_log.jsonl"
# Settings that do not change the trained weights, or only say where they go.
_FREE_TO_CHANGE = {"output", "log_every_steps", "save_every_tokens", "keep_checkpoints"}


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

    def check(self, config: dict[str, Any], resume: bool, force: bool) -> None:
        """Refuse an output that this run may not write to; changes nothing.

        Raises:
            ConfigError: files of something else, a finished run, or an unfinished one that cannot be resumed.
        """
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"output {self.output} is a file; choose another output")
        if not any(path.is_file() and path.suffix != ".partial" for path in self.output.rglob("*")):
            return
        finished = _read_json(self.output / TRAINING_CONFIG)
        started = _read_json(self.checkpoints / TRAINING_CONFIG)
        if finished is None and started is None:
            raise ConfigError(f"output {self.output} holds files that no training run wrote; choose another output")
        if force:
            return
        if finished is not None:
            raise ConfigError(
                f"output {self.output} already holds a finished run; choose another output, or --force to train again"
            )
        assert started is not None
        keys = sorted(config.keys() - _FREE_TO_CHANGE)
        different = [
            f"{key}: {started.get(key)!r} there, {config[key]!r} now" for key in keys if started.get(key) != config[key]
        ]
        if different:
            raise ConfigError(
                f"output {self.output} holds an unfinished run with other settings; choose another output, or "
                "--force to start again\n  " + "\n  ".join(different)
            )
        if not resume:
            raise ConfigError(
                f"output {self.output} holds an unfinished run of these settings; leave out --no-resume to go on with "
                "it, or --force to start again"
            )

    def start(self, config: dict[str, Any], force: bool) -> None:
        """Make the directory this run's; with `force`, delete what an earlier run left."""
        try:
            if force and self.output.exists():
                shutil.rmtree(self.output)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            _write_json(self.checkpoints / TRAINING_CONFIG, config)
        except OSError as error:
            raise ConfigError(f"cannot write output {self.output}: {error.strerror}; choose another output") from error

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        numbered = [
            (int(path.name.removeprefix("checkpoint-")), path)
            for path in self.checkpoints.glob("checkpoint-*")
            if path.name.removeprefix("checkpoint-").isdigit()
        ]
        # The Trainer writes trainer_state.json after everything else.
        return next(
            (path for _, path in sorted(numbered, reverse=True) if _read_json(path / "trainer_state.json") is not None),
            None,
        )

    def finish(self, keep_checkpoints: bool) -> None:
        """Put the model in `staging` in place: config.json, which makes it loadable, after its weights."""
        for name in (TRAINING_LOG, TRAINING_CONFIG):
            shutil.copyfile(self.checkpoints / name, self.staging / name)
        last = ["config.json", TRAINING_CONFIG]
        for name in sorted(path.name for path in self.staging.iterdir() if path.name not in last) + last:
            os.replace(self.staging / name, self.output / name)
        if keep_checkpoints:
            self.staging.rmdir()
        else:
            shutil.rmtree(self.checkpoints)


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
