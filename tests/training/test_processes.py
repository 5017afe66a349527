"""Two processes take the same steps as one on the same global batch, evaluate in their own batches, stop together."""

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

DIVERGING_WORKER = """
import json, os, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
from bamoe.errors import BamoeError
from bamoe.training import train
torch.set_num_threads(1)
rows = []

class Watch(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **_):
        def note_rows(network, inputs):
            if not network.training:
                rows.append(len(inputs[0]))

        model.register_forward_pre_hook(note_rows)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 2:
            model.get_input_embeddings().weight.grad[7] = torch.nan

try:
    train(json.load(open(sys.argv[1])), callbacks=[Watch()])
except BamoeError as error:
    Path(sys.argv[1]).with_name("seen-" + os.environ["RANK"]).write_text(json.dumps([max(rows), str(error)]))
"""

# Both are done; gloo's threads can deadlock while two processes take each other's connections down.
LEAVE = """
import os
torch.distributed.barrier()
os._exit(0)
"""


def run_two(worker: str, tmp_path: Path, content: object) -> None:
    (tmp_path / "worker.py").write_text(worker + LEAVE)
    (tmp_path / "content.json").write_text(json.dumps(content))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), str(tmp_path / "content.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    # The dropout-free models; the mixture's balance loss needs the counts of both processes together.
    runs: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
    for make in (dense, mixture):
        model = make(tmp_path / make.__name__)
        settings = {"batch_tokens": 128, "tokens": 1280}
        alone = train(run_config(tmp_path, model, output=str(tmp_path / f"{make.__name__}-1"), **settings))
        log = [json.loads(line) for line in alone.log.read_text().splitlines()]
        runs.append((log, run_config(tmp_path, model, output=str(tmp_path / f"{make.__name__}-2"), **settings)))
    run_two(WORKER, tmp_path, [config for _, config in runs])
    for alone_log, config in runs:
        log = [json.loads(line) for line in (Path(config["output"]) / "training_log.jsonl").read_text().splitlines()]
        assert [entry["tokens"] for entry in log] == [entry["tokens"] for entry in alone_log]
        for one, two in zip(alone_log, log, strict=True):
            assert one.keys() == two.keys()
            keys = [key for key in one if key != "grad_norm"]
            np.testing.assert_allclose([two[key] for key in keys], [one[key] for key in keys], rtol=1e-4, atol=1e-5)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_two_processes_evaluate_in_their_own_batches_and_stop_together(tmp_path: Path) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"), batch_tokens=128, tokens=1280, log_every_steps=100)
    config |= {"validation": [{"name": "sea", "path": str(tmp_path / "sea.jsonl")}]}
    config |= {"save_every_tokens": 256, "evaluate_every_tokens": 256}
    run_two(DIVERGING_WORKER, tmp_path, config)
    for rank in range(2):
        rows, error = json.loads((tmp_path / f"seen-{rank}").read_text())
        assert rows == 4  # of the eight of a step, half are one process's
        assert error.startswith("the weights hold NaN or Inf at step 4: training diverged")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
