"""The benchmarks of mixtures of attention heads in their quick form, on text made on the spot."""

import json
import sys
from pathlib import Path

import pytest
import transformers

from bamoe.modeling.costs import count_parameters
from tests.reports.reading import Page

pytest.importorskip("sacrebleu")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks" / "moa"
SUBJECTS = [
    ("a dog", "ein Hund"),
    ("two men", "zwei Männer"),
    ("the child", "das Kind"),
    ("a red bus", "ein roter Bus"),
]
PREDICATES = [("runs", "läuft"), ("sleeps", "schläft"), ("waits here", "wartet hier"), ("jumps", "springt")]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`benchmark(name, *arguments)` runs a script as the command line does; returns its module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("comparison", "translation", "masked_language_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def run(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--quick", "--seeds", "0", "1"])
        module = __import__(name)
        module.main()
        return module

    return run


def records(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "runs").iterdir())}


def assert_nothing_trains_again(monkeypatch: pytest.MonkeyPatch, out: Path, run) -> None:
    """The second call makes the same report from the files of the first."""
    before = (out / "report.html").read_bytes()
    monkeypatch.setattr(transformers.Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    run()
    assert (out / "report.html").read_bytes() == before


def test_translation(benchmark, monkeypatch, tmp_path, capsys):
    pairs = [{"en": f"{a} {v}", "de": f"{b} {w}"} for a, b in SUBJECTS for v, w in PREDICATES] * 4
    for name, kept in (("train", pairs), ("valid", pairs[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in kept), encoding="utf-8")
    out = tmp_path / "out"
    files = [str(tmp_path / "train.jsonl"), str(tmp_path / "valid.jsonl"), str(out), "--epochs", "2"]
    module = benchmark("translation", *files)
    found = records(out)
    assert sorted(found) == sorted(
        f"{row}-seed-{seed}" for row in ("dense-macs", "moa", "dense-parameters") for seed in (0, 1)
    )
    for run in found.values():
        assert len(run["translations"]) == len(run["sentence_nats"]) == 6
        assert sum(run["sentence_nats"]) / sum(run["sentence_tokens"]) == pytest.approx(run["nats"], rel=1e-5)
        assert len(run["validation_curve"]) == 2
        assert "tok:13a" in run["bleu_signature"]
    heads = found["moa-seed-0"]
    assert {kind: len(domains["held-out text"]) for kind, domains in heads["routing"].items()} == {
        "encoder": 1, "decoder": 1, "cross": 1,
    }  # fmt: skip
    assert "routing" not in found["dense-macs-seed-0"]
    text = Page((out / "report.html").read_text(encoding="utf-8")).text
    for shown in ("MoA 2K4E8D", "Transformer, equal MACs", "cross-attention", "reference: ein Hund läuft"):
        assert shown in text
    assert_nothing_trains_again(monkeypatch, out, lambda: benchmark("translation", *files))

    sentences = module.Dataset.from_dict({"input_ids": [[n] for n in range(20)], "length": list(range(20))})
    laid = [module.in_batches(sentences, 6, 2, seed)["input_ids"] for seed in (0, 0, 1)]
    assert laid[0] == laid[1] != laid[2]
    assert len(laid[0]) == 36
    assert len({token for (token,) in laid[0][:18]}) == 18  # nothing twice in one pass


def test_masked_language_model(benchmark, monkeypatch, tmp_path, capsys):
    documents = [" ".join(f"{a} {v}." for a, _ in SUBJECTS for v, _ in PREDICATES) for _ in range(12)]
    (tmp_path / "text").mkdir()
    for name in ("one", "two"):  # a folder of files is read as one text
        (tmp_path / "text" / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in documents)
        )
    out = tmp_path / "out"
    arguments = [str(tmp_path / "text"), str(tmp_path / "text"), str(out), "--steps", "12", "--valid-blocks", "20"]
    benchmark("masked_language_model", *arguments)
    found = records(out)
    assert sorted(found) == sorted(f"{row}-seed-{seed}" for row in ("dense", "moa-2", "moa-4") for seed in (0, 1))
    masked = {tuple(run["block_tokens"]) for run in found.values()}
    assert len(masked) == 1  # all rows and seeds are scored on the same masks
    for run in found.values():
        assert len(run["block_nats"]) == 20
        assert sum(run["block_nats"]) / sum(run["block_tokens"]) == pytest.approx(run["nats"], rel=1e-6)
    text = Page((out / "report.html").read_text(encoding="utf-8")).text
    assert "MoA 2K4E8D" in text
    assert "against Transformer" in text
    # A mixture in which every token uses every head has no choice to show.
    assert "MoA 2K4E8D: every layer" in text
    assert "MoA 2K2E8D: every layer" not in text
    assert_nothing_trains_again(monkeypatch, out, lambda: benchmark("masked_language_model", *arguments))


def test_rows_are_of_equal_size(benchmark, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    translation = __import__("translation")
    tokenizer = translation.train_tokenizer(["a dog runs"] * 3, 300)
    by_macs, mixture, by_parameters = translation.rows_of(translation.SIZES, tokenizer, 16)
    assert mixture.config.num_attention_experts_per_tok < mixture.config.num_attention_experts
    assert by_macs.macs == pytest.approx(mixture.macs, rel=0.01)
    assert by_parameters.parameters == pytest.approx(mixture.parameters, rel=0.01)
    assert mixture.parameters == count_parameters(mixture.config).total > 1.2 * by_macs.parameters
    with pytest.raises(ValueError, match="no width comes within 1%"):
        translation.matched(
            lambda width: translation.BamoeEncoderDecoderConfig(intermediate_size=width),
            lambda config: 1000.0 * config.intermediate_size,
            1400.0,
        )
