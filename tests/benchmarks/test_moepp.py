"""The benchmarks of MoE++ in their smallest form: tokens go where they should, and all that is promised is written."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bamoe.checkpoints.loading import load_model
from tests.training.tiny import corpus

FOLDER = Path(__file__).parent.parent.parent / "benchmarks" / "moepp"

# Routers of models that learn nothing may well collapse.
pytestmark = pytest.mark.filterwarnings("ignore::bamoe.training.collapse.CollapseWarning")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"moepp_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def forward() -> ModuleType:
    module = script("expert_forward")
    module.WIDTH, module.INNER = 64, 32
    return module


def test_experts_are_drawn_in_their_shares(forward: ModuleType) -> None:
    shares = torch.tensor([0.05, 0.05, 0.1, 0.3, 0.5], dtype=torch.double)
    selected = forward.draw_experts(shares, 20_000, torch.Generator().manual_seed(0))
    assert (selected.sum(dim=-1) == 2).all()
    assert selected[:, 4].all()  # twice a half: always
    torch.testing.assert_close(selected.double().mean(dim=0) / 2, shares, rtol=0, atol=0.01)


@pytest.mark.parametrize("tau", [0.1, 0.75])
def test_tokens_are_routed_at_the_balance_by_the_routers_own_product(forward: ModuleType, tau: float) -> None:
    mixture = forward.layer("0.6B", tau, torch.device("cpu"), torch.float32)
    hidden = forward.routed_tokens(mixture, torch.tensor(mixture.expert_shares), 4000, seed=0)
    load = forward.selected_by(mixture, hidden).bincount(minlength=12) / 8000
    # tau : 1 over eight and four experts.
    expected = torch.tensor([tau] * 8 + [1.0] * 4) / (8 * tau + 4)
    torch.testing.assert_close(load, expected, rtol=0, atol=0.02)
    assert mixture(hidden, torch.zeros(4000, 12))[0].isfinite().all()


def test_times_of_every_setting_are_written(forward: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    settings = ["--size", "0.6B", "--tokens", "64", "--tau", "0.25", "--tau", "0.75", "--repetitions", "2"]
    monkeypatch.setattr(sys, "argv", ["expert_forward.py", str(tmp_path), *settings])
    forward.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(each["tokens"], each["tau"], each["theory"]) for each in results["measurements"]] == [
        (64, 0.25, pytest.approx(1 / 3)),
        (64, 0.75, pytest.approx(0.6)),
    ]
    assert results["measurements"][1]["paper"] == 0.799
    assert all(each["ratio"] > 0 < each["products"] for each in results["measurements"])
    assert (tmp_path / "table.md").read_text().count("8+1/1/2") == 2
    assert (tmp_path / "0.6B.svg").read_bytes().startswith(b"<svg")


def test_the_training_run_pairs_its_models_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = script("train")
    # Two models are enough to compare.
    train.MODELS = {name: train.MODELS[name] for name in ("plain", "MoE++, tau 0.75")}
    files = [
        str(corpus(tmp_path / f"{name}.{part}.jsonl", name)) for name in ("sea", "code") for part in ("train", "valid")
    ]
    arguments = [*files, str(tmp_path / "out"), "--quick", "--seeds", "0", "--workers", "0"]
    train.main(arguments)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    plain, plus = results["rows"]
    assert (plain["experts_per_token"], plain["balanced_experts_per_token"]) == (2, 2)
    assert 0 < plus["experts_per_token"] < 2
    assert plus["balanced_experts_per_token"] == pytest.approx(1.2)
    assert 0 < plus["dropped"] < 1
    (difference,) = results["differences"]
    assert difference["difference"] == pytest.approx(plus["log"] - plain["log"])
    assert difference["over_seeds"] is None
    assert "Feed-forward experts per token, by class of token" in (tmp_path / "out" / "table.md").read_text()

    start = tmp_path / "out" / "seed-0" / "make"
    models = [load_model(start / name / "model") for name in ("plain", "MoE++-tau-0.75")]
    same = dict(models[0].named_parameters())
    for name, weight in models[1].named_parameters():
        if "zero_computation" not in name and ".gate." not in name:
            assert torch.equal(weight, same[name]), name
    # The coefficient makes up for the missing factor: both losses are 0.01 in balance.
    assert models[1].config.router_aux_loss_coef * 2 / (8 + 4 / 0.75) == pytest.approx(0.01)

    capsys.readouterr()
    train.main(arguments)
    assert "seed-0/" not in capsys.readouterr().out  # nothing was left to do
    with pytest.raises(SystemExit, match=r"give both NAME\.train"):
        train.main([files[0], str(tmp_path / "other")])
