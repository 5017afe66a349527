"""A router that collapses while a run goes on is said once, in words, and counted in every line of the log."""

import warnings
from pathlib import Path

import pytest
import torch

from bamoe.checkpoints.loading import load_model, load_tokenizer
from bamoe.evaluation import LayerRouting
from bamoe.training import train
from bamoe.training.collapse import CollapseWarning, CollapseWatch
from tests.training.test_train import log_of
from tests.training.tiny import mixture, run_config


def test_a_run_warns_once_and_logs_always(tmp_path: Path) -> None:
    model = load_model(mixture(tmp_path / "made"))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()  # a tie everywhere: one expert gets it all
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(tmp_path / "made").save_pretrained(tmp_path / "model")
    # 320 tokens between two lines, for three experts; with a frozen router it stays so.
    settings = {
        "tokens": 1280,
        "log_every_steps": 5,
        "save_every_tokens": 1280,
        "trainable": ["experts", "shared"],
        "learning_rate": 1e-6,
    }
    with pytest.warns(CollapseWarning) as caught:
        log = log_of(train(run_config(tmp_path, tmp_path / "model", **settings)).log)
    (warning,) = [str(each.message) for each in caught if each.category is CollapseWarning]
    assert warning.startswith("at step 10 routers have collapsed")
    assert "feed_forward router of layer 1: expert 0 gets 100.0% of the assignments" in warning
    assert "router_aux_loss_coef" in warning
    # The first step is not judged, and neither are 256 tokens.
    assert [(entry["step"], entry.get("collapsed_routers")) for entry in log] == [
        (1, None),
        (5, None),
        (10, 1),
        (15, 1),
        (20, 1),
    ]
    assert "layer 1: expert 0 gets 100.0%" in log[-1]["warnings"]


def test_a_healthy_run_and_a_soft_router_say_nothing(tmp_path: Path) -> None:
    model = mixture(tmp_path / "model", feed_forward_routing="soft", num_experts_per_tok=None)
    log = log_of(train(run_config(tmp_path, model, tokens=1280, log_every_steps=10, save_every_tokens=1280)).log)
    assert not any("collapsed_routers" in entry or "warnings" in entry for entry in log)
    chosen = mixture(tmp_path / "top-2", num_experts_per_tok=2)
    settings = {"tokens": 1280, "log_every_steps": 10, "save_every_tokens": 1280, "output": str(tmp_path / "second")}
    log = log_of(train(run_config(tmp_path, chosen, **settings)).log)
    assert [entry.get("collapsed_routers") for entry in log] == [None, 0, 0]


def test_a_router_is_named_again_only_after_it_recovered() -> None:
    watch = CollapseWatch(warns=True)
    healthy, broken = (
        LayerRouting(load, balanced, load, load, 0.0, 0.0, 1.0)
        # The same load, which is nearly balanced for one router and not for the other.
        for load, balanced in (([0.06, 0.94], [0.1, 0.9]), ([0.06, 0.94], [0.5, 0.5]))
    )
    said = []
    for step, load in enumerate([healthy, broken, broken, healthy, broken]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logs = watch.logs({"a": load, "b": healthy}, step)
        said.append(len(caught))
        assert logs["collapsed_routers"] == (load is broken)
    assert said == [0, 1, 0, 0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CollapseWatch(warns=False).logs({"a": broken}, 1)["collapsed_routers"] == 1
