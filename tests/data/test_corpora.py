"""Reading corpora: every kind gives the same documents, and every mistake is named."""

import gzip
import json
import re
from pathlib import Path

import datasets
import pytest

from bamoe.data.corpora import Corpus, SkippedLines, read_documents
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


# What is in the second line of a file, and what is said of it.
BAD_LINES = [
    ('{"text": "grün"}'.encode("latin-1"), r"not UTF-8 \(byte 0xfc at column 13\)"),
    (b'{"text": "b', r"not valid JSON \(Unterminated string .* at column 10\)"),
    (b"\0\0\0", r"not valid JSON \(Expecting value at column 1\)"),
    (b'{"text": "a"} rest', r"not valid JSON \(Extra data at column 15\)"),
    (b"[" * 100_000, r"not usable JSON \(maximum recursion depth"),
    (b'{"body": "b"}', "no field 'text'"),
    (b'{"text": null}', "the field 'text' holds null, not a string"),
    (b'{"text": 1.5}', "the field 'text' holds a number, not a string"),
    (b'{"text": {"a": "b"}}', "the field 'text' holds an object, not a string"),
    (rb'{"text": "\ud800"}', "the field 'text' holds half of a surrogate pair"),
    (b'["a"]', "a list, not an object"),
    (b'"a"', "a string, not an object"),
]


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
@pytest.mark.parametrize(("line", "fault"), BAD_LINES)
def test_a_bad_line_is_refused_by_number_or_skipped_and_counted(
    tmp_path: Path, name: str, line: bytes, fault: str
) -> None:
    path = tmp_path / name
    content = b'{"text": "first", "n": 1}\n' + line + b'\n\n{"text": "last", "n": 2}\n'
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=rf"^corpus 'c': {re.escape(str(path))}, line 2: {fault}.*on_bad_lines: skip$"):
        read(path)
    with pytest.warns(
        SkippedLines, match=rf"skipped 1 of the lines of {path}, the first being line 2: {fault}"
    ) as seen:
        assert read(path, on_bad_lines="skip") == ["first", "last"]
    warning = seen[0].message
    assert isinstance(warning, SkippedLines)
    assert (warning.file, warning.count) == (str(path), 1)


@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz"])
def test_bad_lines_of_text_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = b"one\r\n\xff\xfe\n\ntwo\rthree\nfour\xc3"
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=rf"{path}, line 2: not UTF-8 \(byte 0xff at column 1\)"):
        read(path)
    with pytest.warns(SkippedLines, match="skipped 2 of the lines"):
        assert read(path, on_bad_lines="skip") == ["one\n\ntwo\nthree\n"]


def test_skipping_counts_every_file_and_reads_good_ones_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n{}\n[]\n')
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"text": "drei vier fünf"}\r\n  \n'.encode())
    (tmp_path / "c.jsonl").write_text('1\n{"text": ""}')
    with pytest.warns(SkippedLines) as seen:
        assert read(tmp_path, on_bad_lines="skip") == ["a", "drei vier fünf", ""]
    assert [warning.message.count for warning in seen] == [2, 1]  # type: ignore[union-attr]
    (tmp_path / "c.jsonl").unlink()
    (tmp_path / "a.jsonl").write_text('{"text": "changed"}\n')
    assert read(tmp_path, on_bad_lines="skip") == ["changed", "drei vier fünf"]
    assert read(tmp_path) == ["changed", "drei vier fünf"]


def test_a_huge_line_is_a_document(tmp_path: Path) -> None:
    huge = "grün " * 5_000_000
    line = json.dumps({"text": huge}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(line + '\n{"text": "b"}\n')
    assert read(tmp_path / "a.jsonl") == [huge, "b"]
    assert read(tmp_path / "a.jsonl", on_bad_lines="skip") == [huge, "b"]
    (tmp_path / "b.jsonl").write_text(line[:-1] + "\n")
    with pytest.raises(
        DataError, match=r"line 1: not valid JSON \(Expecting ',' delimiter at column 25000012\)"
    ) as seen:
        read(tmp_path / "b.jsonl")
    assert len(str(seen.value)) < 1000


def test_a_truncated_archive_is_refused_either_way(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(1000)))[:-20])
    with pytest.raises(DataError, match=r"a.jsonl.gz, after line \d+: Compressed file ended"):
        read(path)
    with pytest.raises(DataError, match=r"cannot read .*a.jsonl.gz: Compressed file ended"):
        read(path, on_bad_lines="skip")


def test_skipping_needs_lines_and_leaves_something(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"on_bad_lines: skip is for JSON lines and text files"):
        read(tmp_path / "a.parquet", on_bad_lines="skip")
    (tmp_path / "a.jsonl").write_text("1\n2\n")
    with pytest.warns(SkippedLines, match="skipped 2"), pytest.raises(DataError, match="holds no document"):
        read(tmp_path / "a.jsonl", on_bad_lines="skip")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match=r"b\.jsonl is empty"):
        read(tmp_path / "b.jsonl", on_bad_lines="skip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "gone.jsonl does not exist"),
        ("gone", None, "gone does not exist"),
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", "not json\n", r"broken.jsonl, line 1: not valid JSON \(Expecting value at column 1\)"),
        ("a.docx", "text", r"unknown kind.*\.parquet"),
        ("other.jsonl", '{"body": "x", "title": "y"}\n', "no field 'text'; set text_field to one of: body, title"),
        ("numbers.jsonl", '{"text": 1}\n', "line 1: the field 'text' holds a number, not a string"),
        ("nested.jsonl", '{"text": ["a"]}\n', "line 1: the field 'text' holds a list, not a string"),
        ("mixed.jsonl", '{"text": "a"}\n{"text": 1}\n', "line 2: the field 'text' holds a number, not a string"),
        ("latin.json", '[{"text": "gr\udcfcn"}]', r"cannot read .*latin\.json: .*UTF"),
        ("dates.jsonl", '{"text": "2020-01-01"}\n', r"holds timestamp\[s\], not text"),
        (
            "list.json",
            '[{"text": "a"},\n{"text": null}]\n',
            "1 records of .*list.json have no text in the field 'text'",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, errors="surrogateescape")
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
