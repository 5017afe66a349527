"""TensorBoard's event files beside the run, and what trackers are refused."""

import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bamoe.errors import ConfigError
from bamoe.training import train
from tests.training.test_resume import interrupted
from tests.training.test_train import log_of
from tests.training.tiny import dense, mixture, run_config


def shown(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_the_log_of_an_interrupted_run_once(tmp_path: Path) -> None:
    config = run_config(tmp_path, mixture(tmp_path / "model"), save_every_tokens=128)
    config |= {"validation": [{"name": "sea", "path": str(tmp_path / "sea.jsonl")}], "evaluate_every_tokens": 320}
    output = interrupted(config, step=1)  # before the first checkpoint
    interrupted(config, step=5)
    assert shown(output / "tensorboard", "train/loss")[-1][0] == 4  # while the run is unfinished
    log = log_of(train(config).log)
    for tag, key in (
        ("train/loss", "loss"),
        ("train/feed_forward_router/layer_0/load_max", "feed_forward_router/layer_0/load_max"),
        ("eval/sea_perplexity", "eval_sea_perplexity"),
    ):
        expected = [(entry["step"], entry[key]) for entry in log if key in entry]
        assert shown(output / "tensorboard", tag) == [(step, pytest.approx(value)) for step, value in expected]


def test_event_files_go_with_force_and_are_a_choice(tmp_path: Path) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"), save_every_tokens=128)
    output = interrupted(config, step=5)
    before = {path.name for path in (output / "tensorboard").iterdir()}
    assert before
    # Trackers are not part of what a run computes.
    assert train(config | {"report_to": []}).steps == 10
    assert {path.name for path in (output / "tensorboard").iterdir()} == before
    train(config | {"report_to": []}, force=True)
    assert not (output / "tensorboard").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="needs a tracker that is not installed")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wandb"], r"report_to: WandbCallback requires wandb to be installed.*report_to: \[\] for none"),
        (["tensorboard", "tensorbord"], r"report_to: tensorbord is not supported, only .*tensorboard"),
    ],
)
def test_trackers_that_cannot_be_used_are_refused_before_anything_is_written(
    tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(run_config(tmp_path, dense(tmp_path / "model"), report_to=names))
    assert not (tmp_path / "run").exists()
