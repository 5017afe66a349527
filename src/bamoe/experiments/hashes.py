"""SHA-256 of the files that an experiment reads, computed once for each state of a file."""

from __future__ import annotations

import hashlib
import json
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

    def of(self, source: str) -> dict[str, str]:
        """Hash by file name: of a file, or of the files directly in a folder; of a hub name, nothing is known here.

        Raises:
            ConfigError: a file that cannot be read.
        """
        path = Path(source).expanduser()
        if path.is_file():
            return {path.name: self._hash(path)}
        if path.is_dir():
            return {file.name: self._hash(file) for file in sorted(path.iterdir()) if file.is_file()}
        return {source: "not a local file"}

    def _hash(self, path: Path) -> str:
        try:
            status = path.stat()
            key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
            if key not in self._known:
                with path.open("rb") as file:
                    self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
                partial = self.memory.with_suffix(".partial")
                partial.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
                partial.replace(self.memory)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        return self._known[key]
