"""Interrupted runs go on bit for bit; an output directory is never overwritten by accident."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from bamoe.errors import ConfigError
from bamoe.training import train
from bamoe.training.run_folder import RunFolder
from tests.training.tiny import dense, mixture, run_config


class StopError(Exception):
    """Stands for a power cut."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise StopError


def interrupted(config: dict[str, Any], step: int) -> Path:
    with pytest.raises(StopError):
        train(config, callbacks=[StopAt(step)])
    return Path(config["output"])


def assert_same_weights(first: Path, second: Path) -> None:
    expected, found = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name


@pytest.mark.parametrize("make", [dense, mixture])
def test_a_resumed_run_gives_the_same_weights_bit_for_bit(tmp_path: Path, make: Any) -> None:
    # Dropout, so that the state of the random numbers has to come back too.
    model = make(tmp_path / "model", attention_dropout=0.2)
    settings = {"save_every_tokens": 128, "micro_batch_tokens": 32}
    whole = train(run_config(tmp_path, model, output=str(tmp_path / "whole"), **settings))
    config = run_config(tmp_path, model, **settings)
    output = interrupted(config, step=5)
    assert not (output / "config.json").exists()
    assert not (output / "model.safetensors").exists()
    assert (output / "checkpoints" / "checkpoint-4").is_dir()
    interrupted(config, step=8)  # twice
    resumed = train(config)
    assert_same_weights(whole.output, resumed.output)
    assert resumed.final_loss == whole.final_loss
    assert resumed.log.read_text() == whole.log.read_text()


def test_an_unfinished_checkpoint_is_passed_over(tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    whole = train(run_config(tmp_path, model, output=str(tmp_path / "whole")))
    config = run_config(tmp_path, model, save_every_tokens=128, keep_checkpoints=True)
    output = interrupted(config, step=7)
    state = output / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    (output / "checkpoints" / "checkpoint-6" / "optimizer" / "adamw.safetensors").unlink()
    assert_same_weights(whole.output, train(config).output)


def test_stopped_before_the_first_checkpoint_starts_again(tmp_path: Path) -> None:
    model = dense(tmp_path / "model")
    whole = train(run_config(tmp_path, model, output=str(tmp_path / "whole")))
    config = run_config(tmp_path, model, save_every_tokens=640)
    interrupted(config, step=3)
    assert_same_weights(whole.output, train(config).output)


def test_stopped_while_the_model_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(tmp_path / "model")
    whole = train(run_config(tmp_path, model, output=str(tmp_path / "whole")))
    names = {path.name for path in whole.output.iterdir()}
    config = run_config(tmp_path, model)
    output = Path(config["output"])
    import os

    replace, last = os.replace, "training_config.json"

    def stop_before(source: Any, target: Any) -> None:
        if Path(target) == output / stop:
            raise StopError
        replace(source, target)

    monkeypatch.setattr("os.replace", stop_before)
    for stop in ("generation_config.json", "model.safetensors", "config.json", last):
        with pytest.raises(StopError):
            train(config)
        # Loadable only when everything else is there.
        loadable = (output / "config.json").exists()
        assert loadable == (stop == last)
        assert not (output / last).exists()
    monkeypatch.undo()
    assert_same_weights(whole.output, train(config).output)
    assert {path.name for path in output.iterdir()} == names


def test_a_finished_run_is_not_touched_without_force(tmp_path: Path) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"))
    output = train(config).output
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(ConfigError, match=r"already holds a finished run.*--force"):
        train(config)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    (output / "leftover").touch()
    again = train(config | {"seed": 1}, force=True)
    assert not (output / "leftover").exists()
    assert json.loads((again.output / "training_config.json").read_text())["seed"] == 1


def test_another_unfinished_run_is_not_continued(tmp_path: Path) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"), save_every_tokens=128)
    interrupted(config, step=5)
    with pytest.raises(ConfigError, match=r"other settings(?s:.*)learning_rate: 0.01 there, 0.02 now"):
        train(config | {"learning_rate": 2e-2})
    with pytest.raises(ConfigError, match="unfinished run of these settings; leave out --no-resume"):
        train(config, resume=False)
    # How often to save or log is not part of what the run computes.
    assert train(config | {"save_every_tokens": 320, "log_every_steps": 5}).steps == 10


def test_force_does_not_delete_what_no_run_wrote(tmp_path: Path) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"))
    output = Path(config["output"])
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ConfigError, match="holds files that no training run wrote"):
            train(config, force=force)
    assert (output / "thesis.tex").read_text() == "years of work"
    shutil.rmtree(output)
    output.write_text("a file")
    with pytest.raises(ConfigError, match="is a file"):
        train(config, force=True)


def test_an_empty_output_is_used(tmp_path: Path) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"))
    Path(config["output"]).mkdir()
    assert train(config).steps == 10


def test_a_second_run_is_kept_out_while_the_first_lives(tmp_path: Path) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"), save_every_tokens=128)
    refusals = []

    class SecondRun(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for force in (False, True):
                with pytest.raises(ConfigError) as refusal:
                    train(config, force=force)
                refusals.append(str(refusal.value))
            if state.global_step == 5:
                raise StopError

    whole = train(config | {"output": str(tmp_path / "whole")})
    with pytest.raises(StopError):
        train(config, callbacks=[SecondRun()])
    assert len(refusals) == 10
    assert all(re.search(r"run is in use by another run \(process \d+ on .*\); wait", said) for said in refusals)
    assert_same_weights(whole.output, train(config).output)


def test_two_runs_that_start_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second passes the first look before the first has made the folder, and is refused at the second look."""
    config = run_config(tmp_path, dense(tmp_path / "model"))
    look = RunFolder.check

    def look_then_let_another_finish(self: RunFolder, *arguments: Any) -> None:
        look(self, *arguments)
        monkeypatch.undo()
        train(config)

    monkeypatch.setattr(RunFolder, "check", look_then_let_another_finish)
    with pytest.raises(ConfigError, match="already holds a finished run"):
        train(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("left", [[], ["run.lock"], ["run.lock", "training_config.json.partial"]])
def test_a_run_killed_in_its_first_moments_is_nobodys(tmp_path: Path, left: list[str]) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in left:
        (tmp_path / "run" / "checkpoints" / name).write_text("process 1")
    assert train(config | {"seed": 3}).steps == 10


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "training_config.json"])
def test_force_that_is_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    config = run_config(tmp_path, dense(tmp_path / "model"))
    train(config | {"seed": 1})
    unlink = Path.unlink

    def stop_before(self: Path, missing_ok: bool = False) -> None:
        if self == tmp_path / "run" / gone:
            raise StopError
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", stop_before)
    with pytest.raises(StopError):
        train(config, force=True)
    monkeypatch.undo()
    whole = train(config | {"output": str(tmp_path / "whole")})
    assert_same_weights(whole.output, train(config, force=True).output)
