"""`bamoe evaluate`: JSON for programs, tables for people, messages for mistakes."""

import json
import math
from pathlib import Path

import pytest
import torch

from bamoe.checkpoints.loading import load_model
from bamoe.cli.main import main
from bamoe.evaluation import evaluate
from tests.training.tiny import corpus, dense, mixture, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    dense(folder / "dense")
    mixture(folder / "mixture")
    for name in ("sea", "code"):
        corpus(folder / f"{name}.jsonl", name, documents=5)
    return folder


def arguments(folder: Path, kind: str) -> list[str]:
    data = [f"{name}={folder / name}.jsonl" for name in ("sea", "code")]
    return ["evaluate", str(folder / kind), "--data", data[0], "--data", data[1], "--sequence-length", "16"]


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(folder, "mixture"), "--json", "--max-tokens", "20"]) == 0
    content = json.loads(capsys.readouterr().out)
    data: dict[str, str | Path] = {name: folder / f"{name}.jsonl" for name in ("sea", "code")}
    expected = evaluate(folder / "mixture", data, sequence_length=16, max_tokens=20)
    assert content == expected.to_dict()
    assert content["domains"]["sea"]["tokens"] == 20
    assert len(content["routing"]["feed_forward"]["code"]) == 2
    assert main([*arguments(folder, "dense"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["routing"] is None


def test_json_has_numbers_only(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def save_scaled(name: str, factor: float) -> Path:
        model = load_model(folder / "dense")
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(factor)
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    def no_number(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data = ["--data", f"sea={folder / 'sea.jsonl'}", "--data", f"code={folder / 'code.jsonl'}", "--json"]
    assert main(["evaluate", str(save_scaled("certain", 1e6)), *data]) == 0
    content = json.loads(capsys.readouterr().out, parse_constant=no_number)
    assert content["domains"]["sea"]["log_perplexity"] > 710  # its exponential is more than a float holds
    assert content["domains"]["sea"]["perplexity"] == pytest.approx(math.exp(700))
    assert content["average_perplexity"] == pytest.approx(math.exp(700))

    assert main(["evaluate", str(save_scaled("broken", math.nan)), *data]) == 1
    shown = capsys.readouterr()
    assert "corpus 'sea': the model's log perplexity is nan; its weights hold NaN or Inf" in shown.err
    assert shown.out == ""


def test_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "mixture")) == 0
    table = capsys.readouterr().out
    data: dict[str, str | Path] = {name: folder / f"{name}.jsonl" for name in ("sea", "code")}
    result = evaluate(folder / "mixture", data, sequence_length=16)
    for score in result.domains.values():
        assert f"{score.perplexity:.3f}" in table
        assert f"{score.bits_per_byte:.4f}" in table
    assert f"{result.average_perplexity:.3f}" in table
    assert "feed-forward routers" in table
    assert "attention routers" in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--data", "sea"], "--data takes NAME=PATH, found 'sea'"),
        (["--data", "=x.txt"], "--data takes NAME=PATH"),
        (["--data", "sea=x.txt"], "the domain 'sea' is given twice"),
        (["--sequence-length", "65"], "maximum of 64, found 65"),
        (["--text-field", "body"], "no field 'body'"),
        (["--text-field", ""], "domain 'sea': text_field: String should have at least 1 character"),
    ],
)
def test_mistakes_are_messages(
    folder: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(folder, "dense"), *changes]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_unfinished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "training_config.json").write_text("{}")
    assert main(["evaluate", str(tmp_path / "run"), "--data", f"a={tmp_path}"]) == 1
    assert "an unfinished training run; finish it with `bamoe train`" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense(tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    assert main(["evaluate", str(tmp_path / "model"), "--data", f"a={tmp_path}"]) == 1
    assert "no tokenizer; copy tokenizer.json" in capsys.readouterr().err
