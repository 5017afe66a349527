"""Reading corpora: every kind gives the same documents, and every mistake is named."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from bamoe.data.corpora import Corpus, read_documents
from bamoe.errors import DataError

DOCUMENTS = ["one\ntwo", "drei vier fünf", "six"]


def read(path: Path, **changes: str) -> list[str]:
    return read_documents(Corpus(name="c", path=str(path), **changes))["text"][:]


def test_json_lines_plain_and_compressed(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    assert read(tmp_path / "a.jsonl") == DOCUMENTS
    assert read(tmp_path / "a.jsonl.gz") == DOCUMENTS


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("three")
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    assert read(tmp_path) == ["one\n\ntwo\n", "three"]


def test_line_ends_of_text_files_are_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read(tmp_path / "a.txt") == ["one\ntwo\n"]


def test_parquet_with_another_field(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": DOCUMENTS, "n": [1, 2, 3]}).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="body") == DOCUMENTS


def test_names_with_pattern_characters_are_read_literally(tmp_path: Path) -> None:
    (tmp_path / "a[1]*.txt").write_text("here")
    (tmp_path / "a1.txt").write_text("elsewhere")
    assert read(tmp_path / "a[1]*.txt") == ["here"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before")
    assert read(tmp_path / "a.txt") == ["before"]
    (tmp_path / "a.txt").write_text("after")
    assert read(tmp_path / "a.txt") == ["after"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "gone.jsonl does not exist"),
        ("gone", None, "gone does not exist"),
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", "not json\n", "JSON parse error"),
        ("a.docx", "text", r"unknown kind.*\.parquet"),
        ("other.jsonl", '{"body": "x", "title": "y"}\n', "no field 'text'; set text_field to one of: body, title"),
        ("numbers.jsonl", '{"text": 1}\n', "holds int64, not text"),
        ("nested.jsonl", '{"text": ["a"]}\n', "holds mixed or nested values, not text"),
        ("mixed.jsonl", '{"text": "a"}\n{"text": 1}\n', "holds mixed or nested values, not text"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"(?s)corpus 'c'.*{message}"):
        read(tmp_path / name)


def test_folders_need_one_known_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file that can be read"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(DataError, match="mixes kinds"):
        read(tmp_path)


def test_a_hub_name_that_cannot_be_reached_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**arguments: object) -> None:
        assert arguments == {"path": "someone/something", "name": None, "split": "validation"}
        raise ConnectionError("no such host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"cannot read someone/something .*hub.*: no such host"):
        read_documents(Corpus(name="c", path="someone/something", split="validation"))
