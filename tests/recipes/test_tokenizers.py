"""Tokenizer files are compared by what they do to text, not by how they are spelt."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from bamoe.errors import CheckpointError
from bamoe.recipes.tokenizers import chat_template, compare_tokenizers, has_tokenizer

TEXT = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"]


def save_tokenizer(directory: Path, vocabulary: int = 60, text=TEXT) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>", "</s>"]))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def edit(directory: Path, change) -> Path:
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return directory


@pytest.fixture
def seed(tmp_path):
    return save_tokenizer(tmp_path / "seed")


@pytest.fixture
def other(tmp_path):
    return save_tokenizer(tmp_path / "other")


def test_equal_tokenizers_have_no_difference(seed, other):
    comparison = compare_tokenizers(seed, other)
    assert comparison.differences == []
    assert {"token-to-id map", "merges", "normaliser", "pre-tokenizer"} <= set(comparison.compared)


def test_merges_may_be_written_as_text_or_as_pairs(seed, other):
    merges = json.loads((seed / "tokenizer.json").read_text())["model"]["merges"]
    assert isinstance(merges[0], list)
    edit(other, lambda data: data["model"].update(merges=[" ".join(merge) for merge in merges]))
    assert compare_tokenizers(seed, other).differences == []


def test_truncation_and_padding_do_not_matter(seed, other):
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(pad_id=1)
    tokenizer.save(str(other / "tokenizer.json"))
    assert compare_tokenizers(seed, other).differences == []


def swap_two_ids(data):
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["c"] = vocabulary["c"], vocabulary["a"]


def swap_two_merges(data):
    merges = data["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (swap_two_ids, "token-to-id map: 2 differ: 'a' is"),
        (swap_two_merges, "merges: number 0 is"),
        (lambda data: data["model"]["merges"].pop(), "merges: "),
        (
            lambda data: data.update(normalizer={"type": "Lowercase"}),
            'normaliser: null in the seed, {"type": "Lowercase"} here',
        ),
        (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer: "),
        (
            lambda data: data["added_tokens"][0].update(lstrip=True),
            "added-token matching: 1 differ: '<s>' is",
        ),
        (
            lambda data: data["added_tokens"].append({"id": 99, "content": "<new>"}),
            "'<new>' is absent in the seed, 99 here",
        ),
    ],
)
def test_each_difference_is_named_with_the_values_seen(seed, other, change, part):
    differences = compare_tokenizers(seed, edit(other, change)).differences
    assert any(part in difference for difference in differences), differences


def test_a_real_normaliser_changes_the_comparison_both_ways(seed, other):
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(other / "tokenizer.json"))
    for first, second in ((seed, other), (other, seed)):
        assert [d.split(":")[0] for d in compare_tokenizers(first, second).differences] == ["normaliser"]


def test_unigram_positions_are_ids(tmp_path):
    for name, pieces in (("x", [["a", 0.0], ["b", -1.0]]), ("y", [["b", -1.0], ["a", 0.0]])):
        (tmp_path / name).mkdir()
        data = {"model": {"type": "Unigram", "vocab": pieces}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(data))
    (difference,) = compare_tokenizers(tmp_path / "x", tmp_path / "y").differences
    assert "'a' is 0 in the seed, 1 here" in difference


def test_vocab_and_merges_files_are_compared_with_tokenizer_json(seed, tmp_path):
    model = json.loads((seed / "tokenizer.json").read_text())["model"]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "vocab.json").write_text(json.dumps(model["vocab"]))
    (plain / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    comparison = compare_tokenizers(seed, plain)
    assert comparison.compared == ["token-to-id map", "merges"]
    assert comparison.differences == []
    (plain / "merges.txt").write_text("#version: 0.2\n")
    assert compare_tokenizers(seed, plain).differences[0].startswith("merges: ")


def test_sentencepiece_files_are_compared_by_content_where_there_is_nothing_else(tmp_path):
    for name, content in (("x", b"same"), ("y", b"same"), ("z", b"other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    assert compare_tokenizers(tmp_path / "x", tmp_path / "y").differences == []
    assert "SentencePiece model: SHA-256" in compare_tokenizers(tmp_path / "x", tmp_path / "z").differences[0]


def test_nothing_in_common_is_no_comparison(seed, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert not has_tokenizer(empty)
    assert has_tokenizer(seed)
    assert compare_tokenizers(seed, empty).compared == []


def test_a_broken_file_is_named(seed, other):
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"other/tokenizer\.json is not valid JSON"):
        compare_tokenizers(seed, other)


@pytest.mark.parametrize("data", [{"model": "x"}, {"added_tokens": [{}]}, {"model": {"vocab": 3}}])
def test_a_file_of_another_form_is_named(seed, other, data):
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"other/tokenizer\.json has no form known here"):
        compare_tokenizers(seed, other)


def test_chat_templates_are_found_in_either_place(seed, other):
    assert chat_template(seed) is None
    (seed / "tokenizer_config.json").write_text(json.dumps({"chat_template": "A"}))
    (other / "chat_template.jinja").write_text("A")
    assert chat_template(seed) == chat_template(other) == "A"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["model"].update(vocab=[["a"], ["b"]]),
        lambda data: data["model"].update(vocab=["a", "b"]),
        lambda data: data["model"].update(vocab="x"),
        lambda data: data["model"].update(merges=5),
        lambda data: data.update(added_tokens=[1]),
        lambda data: data.update(model=3),
    ],
)
def test_a_malformed_tokenizer_is_one_message(seed, other, change):
    edit(other, change)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has no form known here"):
        compare_tokenizers(seed, other)


def test_a_path_too_long_has_no_tokenizer():
    assert not has_tokenizer(Path("a" * 300))
