"""Two processes take the same steps as one on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bamoe.training import train
from tests.training.tiny import dense, mixture, run_config

WORKER = """
import json, sys
import torch
from bamoe.training import train
torch.set_num_threads(1)
for config in json.load(open(sys.argv[1])):
    train(config)
"""


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    # The dropout-free models; the mixture's balance loss needs the counts of both processes together.
    runs: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
    for make in (dense, mixture):
        model = make(tmp_path / make.__name__)
        settings = {"batch_tokens": 128, "tokens": 1280}
        alone = train(run_config(tmp_path, model, output=str(tmp_path / f"{make.__name__}-1"), **settings))
        log = [json.loads(line) for line in alone.log.read_text().splitlines()]
        runs.append((log, run_config(tmp_path, model, output=str(tmp_path / f"{make.__name__}-2"), **settings)))
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "configs.json").write_text(json.dumps([config for _, config in runs]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), str(tmp_path / "configs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    for alone_log, config in runs:
        log = [json.loads(line) for line in (Path(config["output"]) / "training_log.jsonl").read_text().splitlines()]
        assert [entry["tokens"] for entry in log] == [entry["tokens"] for entry in alone_log]
        for one, two in zip(alone_log, log, strict=True):
            assert one.keys() == two.keys()
            keys = [key for key in one if key != "grad_norm"]
            np.testing.assert_allclose([two[key] for key in keys], [one[key] for key in keys], rtol=1e-4, atol=1e-5)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
