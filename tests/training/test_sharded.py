"""Runs with the model spread over two processes take the steps of one process, and go on with another number."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaConfig, TrainerCallback

from bamoe.errors import ConfigError
from bamoe.modeling import BamoeConfig
from bamoe.training import TrainConfig, train
from bamoe.training.parallel import distributed_config
from tests.training.tiny import corpus, dense, mixture, run_config

EXAMPLES = Path(__file__).parents[2] / "examples"
MODERN = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)
modern = pytest.mark.skipif(not MODERN, reason="parallel needs transformers 5.23")

WORKER = """
import json, os, sys
from pathlib import Path
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
import bamoe.training.parallel
from bamoe.training import train

torch.set_num_threads(1)


class Watch(TrainerCallback):
    def __init__(self, stop):
        self.stop = stop

    def on_train_begin(self, args, state, control, model=None, **_):
        self.local = {
            name: list((p.to_local() if isinstance(p, DTensor) else p).shape) for name, p in model.named_parameters()
        }

    def on_step_end(self, args, state, control, optimizer=None, **_):
        self.moments = sum(
            (value.to_local() if isinstance(value, DTensor) else value).numel()
            for values in optimizer.state.values() for value in values.values()
        )
        if state.global_step == self.stop:
            raise InterruptedError


def as_on_gpus(self, *args, **kwargs):
    # accelerate takes its FSDP to be for accelerators, though nothing in it is.
    if not AcceleratorState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plain(self, *args, **kwargs)


seen = {}
for name, config, stop in json.load(open(sys.argv[1])):
    watch = Watch(stop)
    if "accelerate" in name:  # comes last
        plain, AcceleratorState.__init__ = AcceleratorState.__init__, as_on_gpus
        bamoe.training.parallel._check_launcher = lambda config: None
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    try:
        train(config, callbacks=[watch])
    except InterruptedError:
        pass
    seen[name] = {"local": watch.local, "moments": watch.moments}
Path(sys.argv[1]).with_name("seen-" + os.environ["RANK"]).write_text(json.dumps(seen))
torch.distributed.barrier()
# Both are done; gloo's threads can deadlock while two processes take each other's connections down.
os._exit(0)
"""

FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "dense, fsdp": (dense, {}, {}),
    "mixture, tensor": (mixture, {"attention_key_value": "shared", "num_key_value_heads": 2}, {"tensor": 2}),
    "mixture, expert": (mixture, FOUR_EXPERTS, {"expert": 2}),
    "mixture, tensor, two passes a step": (mixture, FOUR_EXPERTS, {"tensor": 2, "expert": 2}),
    "mixture, fsdp, two passes a step": (mixture, {"qk_norm": "expert"}, {"fsdp": 2}),
}
HANDED_OVER = ("dense, fsdp", "mixture, tensor", "mixture, expert")
ACCELERATE = "mixture, accelerate's fsdp"
CASES[ACCELERATE] = (mixture, {"attention_key_value": "shared", "num_key_value_heads": 2}, {})


class StopError(Exception):
    pass


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise StopError


def settings(folder: Path, name: str, output: str) -> dict[str, Any]:
    make, changes, parallel = CASES[name]
    # The balance loss is that of one forward pass of all processes, so its size is the same with one and with two.
    micro_batch = None if "two passes" not in name else 64 if output == "alone" or "tensor" in parallel else 32
    model = folder / f"{name}-model"
    if not model.exists():
        make(model, **changes)
    return {
        "model": str(model),
        "output": str(folder / f"{name}-{output}"),
        "data": [{"name": "code", "path": str(folder / "code.jsonl")}],
        "validation": [{"name": "sea", "path": str(folder / "sea.jsonl")}],
        "sequence_length": 16,
        "tokens": 640,
        "batch_tokens": 128,
        "micro_batch_tokens": micro_batch,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "save_every_tokens": 256,
        "log_every_steps": 1,
        "report_to": [],
        "parallel": None if output == "alone" or name == ACCELERATE else parallel,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    corpus(folder / "code.jsonl", "code")
    corpus(folder / "sea.jsonl", "sea")
    jobs: list[tuple[str, dict[str, Any], int | None]] = []
    for name in CASES:
        train(settings(folder, name, "alone"))
        jobs.append((name, settings(folder, name, "together"), None))
    for name in HANDED_OVER:
        # Two steps by one process, two more by two processes, the last by one.
        config = settings(folder, name, "handed over")
        with pytest.raises(StopError):
            train(config | {"parallel": None}, callbacks=[StopAt(3)])
        jobs.append((f"{name}, handed over", config, 5))
    jobs.sort(key=lambda job: job[0] == ACCELERATE)
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    finished = subprocess.run(
        [sys.executable, *launch, str(worker), str(folder / "jobs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    for name in HANDED_OVER:
        config = settings(folder, name, "handed over")
        assert (Path(config["output"]) / "checkpoints" / "checkpoint-4").is_dir()
        train(config | {"parallel": None})
    return folder, [json.loads((folder / f"seen-{rank}").read_text()) for rank in range(2)]


def log_of(folder: Path, name: str, output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}-{output}" / "training_log.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, name: str, output: str) -> None:
    """Losses, gradient norms, validation perplexities and the final weights, which each step has a part in."""
    for alone, other in zip(log_of(folder, name, "alone"), log_of(folder, name, output), strict=True):
        assert alone.keys() == other.keys()
        assert alone["step"] == other["step"]
        for key, value in alone.items():
            assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert any(line.get("grad_norm", 0) > 0.5 for line in log_of(folder, name, "alone"))  # some were clipped
    expected = load_file(folder / f"{name}-alone" / "model.safetensors")
    found = load_file(folder / f"{name}-{output}" / "model.safetensors")
    assert expected.keys() == found.keys()
    for key, weight in expected.items():
        # AdamW's first steps move a weight by the learning rate whatever the size of its gradient.
        np.testing.assert_allclose(found[key].numpy(), weight.numpy(), atol=2e-3, rtol=0, err_msg=key)
        assert (found[key] - weight).abs().mean() < 1e-5, key


@modern
@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(runs: Any, name: str) -> None:
    assert_same_run(runs[0], name, "together")


@modern
@pytest.mark.parametrize("name", HANDED_OVER)
def test_goes_on_with_another_number_of_processes(runs: Any, name: str) -> None:
    assert_same_run(runs[0], name, "handed over")


@modern
@pytest.mark.parametrize("name", CASES)
def test_weights_and_optimizer_state_are_in_parts(runs: Any, name: str) -> None:
    folder, seen = runs
    whole = {key: value.shape for key, value in load_file(folder / f"{name}-alone" / "model.safetensors").items()}
    parallel = CASES[name][2]
    weights = []
    for process in seen:
        local = process[name]["local"]
        weights.append(sum(torch.Size(shape).numel() for shape in local.values()))
        for key, shape in whole.items():
            if "mlp.experts" in key and "expert" in parallel:
                assert local[key] == [2, *shape[1:]]
            elif "q_proj" in key:
                assert torch.Size(local[key]).numel() == shape.numel() // 2
        assert process[name]["moments"] == 2 * weights[-1] + len(local)  # two averages and a count of steps
    total = sum(shape.numel() for shape in whole.values())
    if "tensor" not in parallel:
        assert sum(weights) == total
    else:  # norms and routers are on both
        assert total < sum(weights) < 1.05 * total


def spread(parallel: dict[str, Any], model: Any, processes: int) -> Any:
    values = {
        "model": "model",
        "output": "output",
        "data": [{"name": "code", "path": "code.txt"}],
        "sequence_length": 16,
        "tokens": 64,
        "batch_tokens": 64,
        "learning_rate": 1e-3,
        "parallel": parallel,
    }
    return distributed_config(TrainConfig.read(values), model, processes)


@modern
@pytest.mark.parametrize(
    ("parallel", "processes", "message"),
    [
        ({"tensor": 2, "fsdp": 4}, 4, r"tensor \(2\) times fsdp \(4\) is 8 processes, and 4 were started"),
        ({"tensor": 2}, 1, r"tensor \(2\) times fsdp \(1\) is 2 processes, and 1 were started"),
        ({"tensor": 2}, 3, r"tensor \(2\) times fsdp \(1\) is 2 processes, and 3 were started"),
        ({"tensor": 4}, 4, r"num_key_value_heads = 6 cannot be divided by 4; this model can be spread over 1 or 2$"),
        ({"expert": 2}, 4, r"expert \(2\) must divide the 3 experts and the 4 processes"),
        ({"tensor": 2, "expert": 3}, 6, r"be a multiple of parallel.tensor \(2\)"),
    ],
)
def test_what_does_not_divide_is_refused(parallel: dict[str, Any], processes: int, message: str) -> None:
    model = BamoeConfig(num_attention_heads=12, num_key_value_heads=6, num_attention_experts=3, num_experts=3)
    with pytest.raises(ConfigError, match=message):
        spread(parallel, model, processes)


@modern
def test_a_dense_model_has_no_experts_to_divide() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.expert \(2\): llama has no experts"):
        spread({"expert": 2}, LlamaConfig(), 2)


@pytest.mark.parametrize("example", ["train_fsdp", "train_tensor_parallel", "train_expert_parallel"])
def test_the_training_examples_can_be_read(example: str) -> None:
    config = TrainConfig.read(EXAMPLES / f"{example}.yaml")
    assert config.parallel is not None
    assert config.batch_tokens % (8 * config.micro_batch_tokens) == 0


def test_the_accelerate_example_asks_for_what_is_needed() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(EXAMPLES / "accelerate_fsdp2.yaml")
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_one_process_is_a_plain_run() -> None:
    assert spread({}, LlamaConfig(), 1) is None


def test_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bamoe.training.parallel.transformers.__version__", "5.17.0")
    with pytest.raises(ConfigError, match=r"parallel needs transformers 5\.23 or later, and this is 5\.17\.0"):
        spread({}, LlamaConfig(), 2)
    monkeypatch.setattr("bamoe.training.parallel.transformers.__version__", "5.23.0")
    monkeypatch.setattr("bamoe.training.parallel.torch.__version__", "2.11.0+cpu")
    with pytest.raises(ConfigError, match=r"parallel\.tensor needs torch 2\.13 or later to save the model"):
        spread({"tensor": 2}, LlamaConfig(), 2)


def test_an_accelerate_config_that_would_shard_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = run_config(tmp_path, dense(tmp_path / "model"))
    with pytest.raises(ConfigError, match="leave parallel out"):
        train(config | {"parallel": {}})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"would silently copy the whole model.*parallel: \{fsdp: N\}"):
        train(config)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match=r"must have fsdp_state_dict_type: FULL_STATE_DICT$"):
        distributed_config(TrainConfig.read(config), LlamaConfig(), 2)
