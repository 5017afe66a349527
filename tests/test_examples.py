"""The shipped files are what the code reads, and their rows can be had."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from bamoe.checkpoints.loading import load_model
from bamoe.experiments.rows import experiment_rows
from bamoe.experiments.schema import Experiment
from bamoe.training import TrainConfig, train

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/train_*.yaml")), ids=lambda path: path.name)
def test_training_configs(path):
    assert TrainConfig.read(path).parallel is not None


@pytest.mark.parametrize("name", ["examples/experiment.yaml", "benchmarks/quality/quality.yaml"])
def test_experiments_match_parameters_and_compute(name):
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    if "builtin_characters" not in content:
        content["builtin_characters"] = 1000  # the benchmark brings its text
    rows = {row.key: row for row in experiment_rows(Experiment.read(content))}
    btx, bam = (rows[key].costs.parameters for key in ("btx-top-3-of-6", "bam-kv-experts"))
    assert btx.total == pytest.approx(bam.total, rel=0.005)
    assert btx.active == pytest.approx(bam.active, rel=0.005)
    own, reference = rows["bam-kv-experts-compute"], rows["btx-top-1"]
    assert own.flops_per_token * own.tokens == pytest.approx(reference.flops_per_token * reference.tokens, rel=0.005)


SENTENCES = [
    ("a dog runs", "ein Hund läuft"),
    ("two men sleep", "zwei Männer schlafen"),
    ("a bus waits", "ein Bus wartet"),
]


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    """`run_example(name, *arguments)` in a folder with `pairs.jsonl` and `text.jsonl`."""
    pairs = "".join(json.dumps({"en": en, "de": de}) + "\n" for en, de in SENTENCES * 20)
    texts = "".join(json.dumps({"text": " ".join(en for en, _ in SENTENCES * 10)}) + "\n" for _ in range(5))
    (tmp_path / "pairs.jsonl").write_text(pairs, encoding="utf-8")
    (tmp_path / "text.jsonl").write_text(texts, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")

    return run


def test_translation_trains_and_translates(run_example, capsys):
    run_example("translation.py", "pairs.jsonl", "out", "--steps", "2")
    assert "a dog runs\n  " in capsys.readouterr().out
    model = AutoModelForSeq2SeqLM.from_pretrained("out")
    assert model.config.num_attention_experts_per_tok < model.config.num_attention_experts


def test_masked_language_model_trains_and_fills_in(run_example, capsys):
    run_example("masked_language_model.py", "text.jsonl", "out", "--steps", "2")
    _rest, *guesses = capsys.readouterr().out.split("a dog runs two men sleep <mask>")[1].splitlines()
    assert len(guesses) == 5
    assert AutoModelForMaskedLM.from_pretrained("out").config.num_attention_experts == 32


def test_language_model_from_nothing_can_be_trained(run_example, capsys):
    run_example("language_model.py", "text.jsonl", "models/moa")
    train({
        "model": "models/moa", "output": "runs/moa", "data": [{"name": "text", "path": "text.jsonl"}],
        "sequence_length": 16, "tokens": 64, "batch_tokens": 32, "learning_rate": 1e-3, "report_to": [],
    })  # fmt: skip
    before, after = (load_model(path).state_dict() for path in ("models/moa", "runs/moa"))
    router = "model.layers.0.self_attn.gate.weight"
    assert not torch.equal(before[router], after[router])
