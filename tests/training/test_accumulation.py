"""Gradient accumulation of a mixture: what is the same as in whole batches, and what belongs to one forward pass."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from bamoe.checkpoints.loading import load_model
from bamoe.training import train
from tests.training.tiny import mixture, run_config

EXPERTS, BALANCE, Z = 3, 0.5, 0.25


def load_balance(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """One layer's balance loss over logits (N, E), its assignments counted token by token."""
    probabilities = logits.softmax(-1)
    share = [0.0] * EXPERTS
    for row in logits.tolist():
        for expert in sorted(range(EXPERTS), key=lambda expert: -row[expert])[:top_k]:
            share[expert] += 1 / (top_k * len(logits))
    return EXPERTS * torch.stack([share[expert] * probabilities[:, expert].mean() for expert in range(EXPERTS)]).sum()


def expected(model: Any, passes: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cross-entropy and z loss over all tokens of a batch; balance loss as the mean of its forward passes."""
    nats, balance, squares = [], [], []
    for ids in passes:
        output = model(ids, output_router_logits=True)
        nats.append(torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        routers = [(layer, 2) for layer in output.router_logits]
        routers += [(layer, 1) for layer in output.attention_router_logits]
        assert len(routers) == 4
        balance.append(torch.stack([load_balance(logits, top_k) for logits, top_k in routers]).sum())
        squares.append(torch.stack([logits.logsumexp(-1).square().mean() for logits, _ in routers]).sum())
    names = ("cross_entropy", "aux_loss", "z_loss")
    return {name: torch.stack(values).mean() for name, values in zip(names, (nats, balance, squares), strict=True)}


def one_step(folder: Path, directory: Path, micro_batch_tokens: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The log line of one step of four blocks, and the token ids of its forward passes."""
    passes: list[torch.Tensor] = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
            passes.extend(batch["input_ids"] for batch in train_dataloader)

    config = run_config(
        folder,
        directory,
        output=str(folder / f"run-{micro_batch_tokens}"),
        tokens=64,
        schedule={},
        micro_batch_tokens=micro_batch_tokens,
        router_aux_loss_coef=BALANCE,
        router_z_loss_coef=Z,
    )
    (line,) = train(config, callbacks=[Spy()]).log.read_text().splitlines()
    return json.loads(line), passes


def test_accumulated_passes_are_balanced_each_on_its_own(tmp_path: Path) -> None:
    directory = mixture(
        tmp_path / "model",
        initializer_range=0.3,
        num_experts_per_tok=2,
        attention_routing="top_k",
        num_attention_experts_per_tok=1,
    )
    logged = {}
    for micro_batch_tokens, rows in ((64, [4]), (32, [2, 2]), (16, [1, 1, 1, 1])):
        entry, passes = one_step(tmp_path, directory, micro_batch_tokens)
        assert [len(ids) for ids in passes] == rows
        model = load_model(directory)
        losses = expected(model, passes)
        total = losses["cross_entropy"] + BALANCE * losses["aux_loss"] + Z * losses["z_loss"]
        total.backward()
        norm = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm()
        assert entry["loss"] == pytest.approx(total.item(), rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for name, loss in losses.items():
            assert entry[name] == pytest.approx(loss.item(), rel=1e-5), name
        logged[micro_batch_tokens] = entry
    for name in ("cross_entropy", "z_loss"):
        assert logged[16][name] == pytest.approx(logged[64][name], rel=1e-5)
    # So the mean over the passes is told from the loss of the whole batch.
    assert logged[16]["aux_loss"] != pytest.approx(logged[64]["aux_loss"], rel=1e-2)
