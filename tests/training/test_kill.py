"""`kill -9` anywhere in a run: the same call then ends with the weights and the log of an uninterrupted run.

A server process imports everything once and forks a child for every call of `train`. A child counts the Python and C
functions it calls and kills itself at one of them: while it reads, in a step, between two files of a checkpoint or in
the middle of one, while the model is put in place.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.training.tiny import dense, mixture, run_config

KILLS_PER_RUN = 8

SERVER = """
import contextlib, json, os, random, signal, sys, traceback
from pathlib import Path

import datasets, torch, torch.utils.tensorboard
import bamoe.training.trackers, bamoe.training.trainer
from bamoe.errors import ConfigError
from bamoe.training import train

torch.set_num_threads(1)
HERE = Path(sys.argv[1])
COUNTED = HERE / "counted.json"


@contextlib.contextmanager
def finished_before_it_was_killed():
    try:
        yield
    except ConfigError as error:
        if "already holds a finished run" not in str(error):
            raise


def run(config, output, kill_at=None):
    # Trains in a child, which kills itself at its call number `kill_at`; tells whether it was killed.
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if kill_at is not None:
                sys.setprofile(Counter(kill_at))
            with finished_before_it_was_killed():
                train(config | {"output": str(HERE / output)})
            if kill_at is not None:
                counter = sys.getprofile()
                sys.setprofile(None)
                COUNTED.write_text(json.dumps({"calls": counter.calls, "marks": counter.marks}))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"a run ended with {status}")
    return status != 0


class Counter:
    def __init__(self, kill_at):
        self.kill_at, self.calls, self.marks = kill_at, 0, {}

    def __call__(self, frame, event, argument):
        if event in ("call", "c_call"):
            self.calls += 1
            if self.calls == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "call" and frame.f_code.co_name in ("_save_checkpoint", "rotate_checkpoints", "finish"):
                self.marks.setdefault(frame.f_code.co_name, []).append(self.calls)


runs = {}
for name, config in json.loads((HERE / "configs.json").read_text()).items():
    draw = random.Random(name)
    run(config, f"{name}-whole")
    run(config, f"{name}-counted", kill_at=0)
    counted = json.loads(COUNTED.read_text())
    marks = counted["marks"]
    saves, (finish,) = list(zip(marks["_save_checkpoint"], marks["rotate_checkpoints"])), marks["finish"]
    kills, outputs = [], [f"{name}-counted"]
    while sum(kills) < int(sys.argv[2]):
        outputs.append(f"{name}-{len(outputs)}")
        # Anywhere; within a checkpoint; in the last moves. Then again somewhere, if the resumed run comes that far.
        anywhere = draw.randrange(counted["calls"])
        places = [anywhere, draw.randint(*draw.choice(saves)), draw.randint(finish, counted["calls"])]
        for kill_at in (places[len(outputs) % 3], draw.randrange(counted["calls"] // 2)):
            kills.append(run(config, outputs[-1], kill_at))
            if not kills[-1]:
                break
        else:
            run(config, outputs[-1])
    runs[name] = {"kills": sum(kills), "outputs": outputs}
(HERE / "runs.json").write_text(json.dumps(runs))
"""


def content(output: Path) -> dict[str, bytes]:
    """What a finished run computed: not TensorBoard's files, which have times in them, nor its config and code."""
    files = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    return {
        str(file): (output / file).read_bytes()
        for file in files
        if file.parts[0] != "tensorboard" and file.name != "training_config.json" and file.suffix != ".py"
    }


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    # Dropout, so that random numbers have to come back too.
    models = [dense(tmp_path / "dense", attention_dropout=0.2), mixture(tmp_path / "mixture", attention_dropout=0.2)]
    settings: dict[str, Any] = {"save_every_tokens": 128, "keep_optimizer": True}
    stages = [
        {"trainable": "all", "until_tokens": 192},
        {"trainable": "routers", "until_tokens": 320},
        {"trainable": "all", "reset_optimizer": True},
    ]
    validation = [{"name": "sea", "path": str(tmp_path / "sea.jsonl")}]
    configs = {
        "dense": run_config(tmp_path, models[0], validation=validation, evaluate_every_tokens=192, **settings),
        "mixture": run_config(tmp_path, models[1], micro_batch_tokens=32, **settings),
        "staged": run_config(tmp_path, models[1], stages=stages, **settings),
    }
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    (tmp_path / "server.py").write_text(SERVER)
    finished = subprocess.run(
        [sys.executable, str(tmp_path / "server.py"), str(tmp_path), str(KILLS_PER_RUN)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert sum(run["kills"] for run in runs.values()) >= 20
    for name, run in runs.items():
        expected = content(tmp_path / f"{name}-whole")
        assert {"model.safetensors", "training_log.jsonl", "optimizer/adamw.safetensors"} <= expected.keys()
        assert len(run["outputs"]) > 3
        for output in run["outputs"]:
            found = content(tmp_path / output)
            assert found.keys() == expected.keys(), output
            assert [file for file, data in expected.items() if found[file] != data] == [], output
