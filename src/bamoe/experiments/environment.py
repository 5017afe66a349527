"""What ran a step: the machine, the libraries and the code, as plain data for its record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_LIBRARIES = ("bamoe", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


def environment() -> dict[str, Any]:
    """Python, platform, libraries, cores, threads and accelerator of this process."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = torch.cuda.get_device_name() if accelerator is not None and accelerator.type == "cuda" else str(accelerator)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{library: importlib.metadata.version(library) for library in _LIBRARIES},
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "device": "cpu" if accelerator is None else name,
    }


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def code_version() -> dict[str, Any]:
    """The version of bamoe and, where it runs from a git checkout, the commit and whether files differ from it."""
    version: dict[str, Any] = {"bamoe": importlib.metadata.version("bamoe")}
    package = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        finished = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
        return finished.stdout.strip()

    try:
        # Installed into an environment that lies in somebody's repository, the package is not that repository's.
        if git("ls-files", "--error-unmatch", __file__):
            version |= {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        pass
    return version
