"""A process in which bamoe cannot be imported: it has the code that travels with a checkpoint, or none."""

import os
import subprocess
import sys
from pathlib import Path

WITHOUT_BAMOE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "bamoe" or name.startswith("bamoe."):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
folders = sys.argv[1:]
"""


def run_without_bamoe(script: str, *folders: Path) -> None:
    """Run a script, for which `folders` are names of directories, in the first one's parent."""
    there = folders[0].parent
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(there / "modules-cache")
    command = [sys.executable, "-c", WITHOUT_BAMOE + script, *(str(folder) for folder in folders)]
    subprocess.run(command, check=True, env=environment, cwd=there, timeout=300)
