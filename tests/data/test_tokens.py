"""Token streams: documents joined by EOS, positions that restart, bytes that add up."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import processors

from bamoe.data.corpora import Corpus, SkippedLines
from bamoe.data.tokens import TokenStream, read_tokens
from bamoe.errors import DataError
from tests.training.tiny import tokenizer

DOCUMENTS = ["the tide carried", "", "größer €5 𝄞 end ", "x"]


def stream(tmp_path: Path, documents: list[str] = DOCUMENTS, **changes: object) -> TokenStream:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    arguments = {"tokenizer": tokenizer(), "count_bytes": True} | changes
    return read_tokens(Corpus(name="c", path=str(path)), **arguments)


def test_documents_end_with_eos_and_empty_ones_are_skipped(tmp_path: Path) -> None:
    expected = [token for text in DOCUMENTS if text for token in [*tokenizer()(text)["input_ids"], 0]]
    read = stream(tmp_path)
    assert read.tokens(0, len(read)).tolist() == expected
    assert read.tokens(3, 9).tolist() == expected[3:9]


def test_nulls_of_parquet_are_skipped(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["sea", None, "boat"]}).to_parquet(tmp_path / "c.parquet")
    read = read_tokens(Corpus(name="c", path=str(tmp_path / "c.parquet")), tokenizer())
    assert len(read.document_starts) == 2


def test_bad_lines_change_neither_tokens_nor_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = stream(tmp_path)
    lines = (tmp_path / "c.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\n" + lines[0] + b"{\n" + b"".join(lines[1:]) + b"{}")
    source = Corpus(name="c", path=str(tmp_path / "bad.jsonl"), on_bad_lines="skip")
    with pytest.warns(SkippedLines, match="skipped 3 of the lines"):
        kept = read_tokens(source, tokenizer(), count_bytes=True)
    assert kept.tokens(0, len(kept)).tolist() == good.tokens(0, len(good)).tolist()
    assert kept.bytes_per_token(0, len(kept)).tolist() == good.bytes_per_token(0, len(good)).tolist()

    def read_again(*arguments: object, **keywords: object) -> None:
        raise AssertionError("not taken from the cache")

    monkeypatch.setattr("bamoe.data.tokens._encode", read_again)
    with pytest.warns(SkippedLines, match="skipped 3 of the lines"):  # also when read from the cache
        again = read_tokens(source, tokenizer(), count_bytes=True)
    assert again.tokens(0, len(again)).tolist() == good.tokens(0, len(good)).tolist()


def test_reads_across_the_chunks_of_a_large_corpus(tmp_path: Path) -> None:
    documents = [f"{i} " * (i % 7 + 1) for i in range(2500)]
    read = stream(tmp_path, documents)
    encoded = tokenizer()(documents)["input_ids"]
    expected = [token for ids in encoded for token in [*ids, 0]]
    assert len(read._tokens.chunks) > 1
    assert read.tokens(0, len(read)).tolist() == expected
    boundary = len(read._tokens.chunks[0])
    assert read.tokens(boundary - 3, boundary + 3).tolist() == expected[boundary - 3 : boundary + 3]
    assert read.tokens(boundary, boundary + 2).tolist() == expected[boundary : boundary + 2]


def test_positions_restart_at_documents_and_at_the_start(tmp_path: Path) -> None:
    read = stream(tmp_path)
    ids, expected, position = read.tokens(0, len(read)), [], 0
    for index in range(2, len(read)):
        position = 0 if index == 2 or ids[index - 1] == 0 else position + 1
        expected.append(position)
    assert read.positions(2, len(read)).tolist() == expected
    assert expected.count(0) == 3


def test_bytes_add_up_to_the_text(tmp_path: Path) -> None:
    read = stream(tmp_path)
    counts = read.bytes_per_token(0, len(read))
    ends = np.append(read.document_starts[1:], len(read))
    per_document = [int(counts[start:end].sum()) for start, end in zip(read.document_starts, ends, strict=True)]
    assert per_document == [len(text.encode()) for text in DOCUMENTS if text]
    assert counts.min() >= 0
    # Every token of plain ASCII stands for its own characters.
    pieces = [len(tokenizer().decode([token])) for token in tokenizer()(DOCUMENTS[0])["input_ids"]]
    assert counts[: len(pieces) + 1].tolist() == [*pieces, 0]


def test_a_bos_of_the_tokenizer_stays_and_has_no_bytes(tmp_path: Path) -> None:
    with_bos = tokenizer()
    with_bos.add_special_tokens({"bos_token": "<s>"})
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)]
    )
    read = stream(tmp_path, ["sea", "boat"], tokenizer=with_bos)
    ids = read.tokens(0, len(read)).tolist()
    assert ids.count(with_bos.bos_token_id) == 2
    assert read.bytes_per_token(0, 1).tolist() == [0]
    assert int(read.bytes_per_token(0, len(read)).sum()) == len("seaboat")


def test_a_tokenizer_that_ends_with_eos_gets_no_second_one(tmp_path: Path) -> None:
    ending = tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 0)]
    )
    read = stream(tmp_path, ["sea"], tokenizer=ending)
    assert read.tokens(0, len(read)).tolist().count(0) == 1
    assert int(read.bytes_per_token(0, len(read)).sum()) == 3


def test_tokens_are_cached_for_the_same_tokenizer_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "the tide"}\n')
    source = Corpus(name="c", path=str(path))
    first = read_tokens(source, tokenizer())
    other = tokenizer()
    other.add_tokens(["tide"])
    second = read_tokens(source, other)
    assert other.convert_tokens_to_ids("tide") in second.tokens(0, len(second))

    def encoded_again(*arguments: object, **keywords: object) -> None:
        raise AssertionError("not taken from the cache")

    monkeypatch.setattr("bamoe.data.tokens._encode", encoded_again)
    used = tokenizer()
    used(["a", "longer b"], truncation=True, max_length=2)
    again = read_tokens(source, used)
    assert again.tokens(0, len(again)).tolist() == first.tokens(0, len(first)).tolist()


def test_no_eos_and_no_text_are_refused(tmp_path: Path) -> None:
    silent = tokenizer()
    silent.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        stream(tmp_path, tokenizer=silent)
    with pytest.raises(DataError, match="is empty"):
        stream(tmp_path, ["", ""])
