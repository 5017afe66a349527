"""`bamoe evaluate`: JSON for programs, tables for people, messages for mistakes."""

import json
from pathlib import Path

import pytest

from bamoe.cli.main import main
from bamoe.evaluation import evaluate
from tests.training.tiny import corpus, dense, mixture


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
    ],
)
def test_mistakes_are_messages(
    folder: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(folder, "dense"), *changes]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
