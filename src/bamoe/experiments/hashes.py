"""SHA-256 of the files that an experiment reads, computed once for each state of a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from bamoe.errors import ConfigError


class FileHashes:
    """Hashes remembered in the file `memory`, by path, size and time of change."""

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        try:
            self._known: dict[str, str] = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def of(self, files: Iterable[Path]) -> dict[str, str]:
        """Hash by file name.

        Raises:
            ConfigError: a file that cannot be read.
        """
        return {file.name: self._hash(file) for file in files}

    def of_checkpoint(self, source: str) -> dict[str, str]:
        """Hashes of a local checkpoint with its optimizer state; of a hub name, nothing is known here."""
        folder = Path(source).expanduser()
        return self.of(file for file in sorted([*folder.glob("*"), *folder.glob("optimizer/*")]) if file.is_file())

    def _hash(self, path: Path) -> str:
        try:
            status = path.stat()
            key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
            if key not in self._known:
                with path.open("rb") as file:
                    self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
                if not self.memory.parent.is_dir():
                    return self._known[key]  # a plan that is only shown
                partial = self.memory.with_suffix(f".{os.getpid()}.partial")  # several runs may share the memory
                partial.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
                partial.replace(self.memory)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        return self._known[key]
