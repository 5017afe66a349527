"""Training with MoE++: what its log says of dropped assignments and of experts that compute."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from bamoe.checkpoints.loading import load_model
from bamoe.cli.main import main
from bamoe.training import train
from bamoe.training.trainable import part_of
from tests.training.test_train import log_of
from tests.training.tiny import mixture, run_config

# tau : 1 over three feed-forward and three other experts: shares 1/9 and 2/9.
SHARES = [1 / 9] * 3 + [2 / 9] * 3


def zero_computation(directory: Path, **changes: Any) -> Path:
    settings = {"num_experts_per_tok": 2, "initializer_range": 0.3, "zero_computation_tau": 0.5}
    kinds = {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 1}
    return mixture(directory, **(settings | kinds | changes))


@pytest.mark.parametrize("micro_batch_tokens", [64, 16])
def test_the_log_has_the_share_of_dropped_assignments(tmp_path: Path, micro_batch_tokens: int) -> None:
    model = zero_computation(tmp_path / "model")
    seen: list[torch.Tensor] = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kw: Any) -> None:
            seen.extend(batch["input_ids"] for batch in train_dataloader)

    settings = {"tokens": 64, "schedule": {}, "micro_batch_tokens": micro_batch_tokens}
    result = train(run_config(tmp_path, model, **settings), callbacks=[Spy()])
    (entry,) = log_of(result.log)
    reference = load_model(model)
    dropped, computed = [0, 0], [0, 0]
    for batch in seen:
        with torch.no_grad():
            layers = reference(batch, output_router_logits=True).router_logits
        for number, logits in enumerate(layers):
            counts = logits.topk(2).indices.flatten().bincount(minlength=6).tolist()
            # A capacity is 1.1 times the expert's share of the assignments of one forward pass, rounded up.
            limits = [math.ceil(1.1 * 2 * batch.numel() * share) for share in SHARES]
            dropped[number] += sum(max(0, count - limit) for count, limit in zip(counts, limits, strict=True))
            computed[number] += sum(counts[:3])
    # The second layer's routers see what capacities in the first have left out, so only the first is the same.
    first = "feed_forward_router/layer_0/"
    assert dropped[0] > 0
    assert entry[first + "dropped_assignments"] == pytest.approx(dropped[0] / 128)
    assert entry[first + "experts_per_token"] == pytest.approx(computed[0] / 64)
    both = [entry[f"feed_forward_router/layer_{number}/dropped_assignments"] for number in range(2)]
    assert entry["dropped_assignments"] == result.dropped_assignments == pytest.approx(sum(both) / 2)


def test_without_capacities_nothing_is_said_of_them(tmp_path: Path) -> None:
    model = zero_computation(tmp_path / "model", expert_capacity_factor=0)
    result = train(run_config(tmp_path, model, tokens=64, schedule={}))
    assert result.dropped_assignments is None
    assert not any("dropped" in key for key in log_of(result.log)[-1])


def test_a_run_ends_with_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, zero_computation(tmp_path / "model"), tokens=128, schedule={})
    text = "".join(f"{key}: {value!r}\n" for key, value in config.items())
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    share = log_of(tmp_path / "run" / "training_log.jsonl")[-1]["dropped_assignments"]
    assert f", {share:.1%} of the assignments over capacity and dropped" in capsys.readouterr().out


def test_every_part_of_it_trains_with_routers_or_experts(tmp_path: Path) -> None:
    model = load_model(zero_computation(tmp_path / "model", feed_forward_router="tanh_mlp"))
    parts = {name: part_of(name, model.config) for name, _ in model.named_parameters() if ".layers.1.mlp." in name}
    assert {name.partition("mlp.")[2]: part for name, part in parts.items()} == {
        "gate.weight": "routers",
        "gate.inner_weight": "routers",
        "gate.residual_weight": "routers",
        "experts.gate_up_proj": "experts",
        "experts.down_proj": "experts",
        "zero_computation.constant_gate": "experts",
        "zero_computation.constant_value": "experts",
    }
