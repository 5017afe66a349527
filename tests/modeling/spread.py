"""Two processes on the CPU: models loaded with a `DistributedConfig`, their losses, gradients and local shapes.

One launch runs many cases, since starting processes takes most of the time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORKER = """
import json, os, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
# Older versions cannot gather two weights packed into one (gate and up), so such a model cannot be saved there.
CAN_GATHER = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def load(case):
    from transformers.distributed import DistributedConfig

    distributed_config = DistributedConfig(**case["parallel"])
    if case.get("remote"):  # the code in the folder, before bamoe is imported
        from transformers import AutoConfig, AutoModelForCausalLM

        if rank == 0:
            AutoConfig.from_pretrained(case["folder"], trust_remote_code=True)  # copies the code into the cache
        torch.distributed.barrier()
        return AutoModelForCausalLM.from_pretrained(
            case["folder"], trust_remote_code=True, distributed_config=distributed_config
        )
    if case.get("dense"):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(case["folder"], distributed_config=distributed_config)
    from bamoe.modeling import BamoeForCausalLM

    return BamoeForCausalLM.from_pretrained(case["folder"], distributed_config=distributed_config)


def whole(tensor):
    if not isinstance(tensor, DTensor):
        return tensor
    packed = getattr(tensor.placements[-1], "split_factor", None)
    if CAN_GATHER or packed is None:
        return tensor.full_tensor()
    local = tensor.to_local()
    parts = [torch.empty_like(local) for _ in range(2)]
    torch.distributed.all_gather(parts, local.contiguous())
    dim = tensor.placements[-1].dim
    return torch.cat([torch.cat(halves, dim) for halves in zip(*(part.chunk(packed, dim) for part in parts))], dim)


def run(case):
    folder = Path(case["folder"])
    model = load(case)
    tokens = torch.load(folder / "tokens.pt")
    result = {"module": type(model).__module__}
    result["local"] = {
        name: list((p.to_local() if isinstance(p, DTensor) else p).shape) for name, p in model.named_parameters()
    }
    if case.get("generate"):
        model.eval()
        result["generated"] = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False
        ).tolist()
    model.train()
    data_ranks = case["parallel"].get("fsdp_size", 1)
    mine = tokens.chunk(data_ranks)[rank % data_ranks] if data_ranks > 1 else tokens
    losses = []
    for micro_batch in mine.chunk(case.get("accumulate", 1)):
        loss = model(micro_batch, labels=micro_batch).loss / case.get("accumulate", 1)
        loss.backward()
        losses.append(loss.detach())
    loss = torch.stack(losses).sum()
    if data_ranks > 1:
        torch.distributed.all_reduce(loss)
        loss /= data_ranks
    result["loss"] = loss.item()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    if CAN_GATHER:
        model.save_pretrained(folder / "saved")
    return result


results = {}
for case in json.loads(Path(sys.argv[1]).read_text()):
    try:
        results[case["name"]] = run(case)
    except Exception as error:
        if not case.get("refused"):
            raise
        results[case["name"]] = {"error": f"{type(error).__name__}: {error}"}
Path(sys.argv[1]).with_name(f"results-{rank}.json").write_text(json.dumps(results))
torch.distributed.barrier()
# Both are done; gloo's threads can deadlock while two processes take each other's connections down.
os._exit(0)
"""


def run_two_processes(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the cases in two processes; what each of them saw, by the cases' names."""
    (folder / "worker.py").write_text(WORKER)
    (folder / "cases.json").write_text(json.dumps(cases))
    launch = (*("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), str(folder / "worker.py"))
    finished = subprocess.run(
        [sys.executable, *launch, str(folder / "cases.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules-cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


def save_case(folder: Path, model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """A model and the global batch of a case."""
    model.save_pretrained(folder)
    torch.save(tokens, folder / "tokens.pt")


def loss_and_gradients(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """What one process computes on the global batch."""
    model.train().zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_agree(folder: Path, result: dict[str, Any], model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Loss and every gradient of two processes are those of one, and what they saved is the whole model."""
    loss, expected = loss_and_gradients(model, tokens)
    assert abs(result["loss"] - loss) < 1e-5 * max(1.0, abs(loss))
    found = torch.load(folder / "gradients.pt")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max()
        assert largest > 0 or "k_proj.bias" in name, name
        difference = (found[name] - gradient).abs().max()
        assert difference <= 1e-5 * largest + 1e-6, f"{name}: {difference} of {largest}"
    if (folder / "saved").exists():
        saved = type(model).from_pretrained(folder / "saved").state_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(saved[name], weight), name
