"""`bamoe train`: from a YAML file to a model, and messages instead of tracebacks."""

from pathlib import Path

import pytest
import yaml

from bamoe.cli.main import main
from tests.training.tiny import dense, run_config


def config_file(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path, dense(tmp_path / "model")) | changes))
    return path


def test_trains_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path)
    assert main(["train", str(path)]) == 0
    assert f"{tmp_path / 'run'}: 640 tokens in 10 steps, last loss" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").is_file()

    assert main(["train", str(path)]) == 1
    assert "already holds a finished run" in capsys.readouterr().err
    assert main(["train", str(path), "--force"]) == 0


def test_no_resume_refuses_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path, learning_rate=1e30, max_grad_norm=0.0)
    assert main(["train", str(path)]) == 1
    assert "training diverged" in capsys.readouterr().err
    assert main(["train", str(path), "--no-resume"]) == 1
    assert "unfinished run of these settings" in capsys.readouterr().err


def test_mistakes_are_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path, learning_rte=1e-3)
    assert main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert "unknown key 'learning_rte'; did you mean 'learning_rate'?" in error
    assert "Traceback" not in error
    assert main(["train", str(tmp_path / "gone.yaml")]) == 1
    assert "gone.yaml" in capsys.readouterr().err
