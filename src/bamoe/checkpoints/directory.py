"""A directory that appears whole or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bamoe.checkpoints.reader import CONFIG_FILE
from bamoe.errors import ConfigError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)


@contextmanager
def atomic_directory(out: str | Path, force: bool = False) -> Iterator[Path]:
    """A hidden directory beside `out` to build in, which becomes `out` when the block ends without an error.

    An existing `out` is refused; with `force` it stays as it is until the new one takes its place in one step. What a
    killed run left behind is removed by the next one with the same `out`.

    Raises:
        ConfigError: `out` exists and `force` is false, or `out` is nothing that `force` should delete.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    refuse_existing(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.bamoe-"
    _remove_abandoned(out.parent, prefix)
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    # The lock lives as long as this process, however it ends, and says that the directory is in use.
    lock = os.open(building, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        building.chmod(0o777 & ~_umask())
        yield building
        refuse_existing(out, force)
        _put_in_place(building, out)
    finally:
        os.close(lock)
        shutil.rmtree(building, ignore_errors=True)


def refuse_existing(out: Path, force: bool) -> None:
    """Raises ConfigError unless `out` is free, or a model that `force` lets go."""
    if not os.path.lexists(out):
        return
    if not force:
        raise ConfigError(f"{out} exists; choose another place, or replace it with --force")
    if out.is_symlink() or not out.is_dir():
        raise ConfigError(f"{out} is not a directory, so --force does not replace it; choose another place")
    if any(out.iterdir()) and not (out / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{out} holds files but no {CONFIG_FILE}, so it is no model and --force does not delete it; "
            "choose another place"
        )


def _put_in_place(building: Path, out: Path) -> None:
    """Rename `building` to `out`; an old `out` ends up under the name of `building`."""
    if not out.exists():
        building.rename(out)
        return
    if _exchange(building, out):
        return
    old = building.with_name(f"{building.name}-old")
    out.rename(old)
    try:
        building.rename(out)
    except OSError:
        old.rename(out)
        raise
    old.rename(building)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step, so that a kill finds either the old or the new. False if not supported."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for directory in parent.iterdir():
        if not directory.name.startswith(prefix) or directory.is_symlink() or not directory.is_dir():
            continue
        lock = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            pass  # another run is building in it
        finally:
            os.close(lock)


def _umask() -> int:
    """mkdtemp makes private directories; a model is as readable as anything else the user makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
