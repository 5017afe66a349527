"""Corpus files line by line: which line is bad and why, and the documents without the bad ones."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_GZIP = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"
_KINDS = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number", str: "a string"}


def first_bad_line(files: Sequence[Path], builder: str, field: str) -> str | None:
    """The place and fault of the first line that holds no document, such as "a.jsonl, line 3: not UTF-8 (...)".

    None when every line is good, or the files are JSON that is not one object per line.
    """
    for file in files:
        number = 0
        try:
            for number, line in enumerate(_lines(file), 1):
                if builder == "json" and number == 1 and _spans_lines(line.strip()):
                    return None
                _read(line, builder, field)
        except ValueError as error:
            return f"{file}, line {number}: {error}"
        except (OSError, EOFError, zlib.error) as error:
            return f"{file}, after line {number}: {error}"
    return None


def good_documents(
    files: Sequence[str], builder: str, field: str, stamps: Sequence[tuple[int, int]]
) -> Iterator[dict[str, str | None]]:
    """Rows for `datasets`: a document as {"text"}, a bad line as {"file", "problem"} in its place.

    A text file is one document, without its bad lines; blank JSON lines are nothing. `stamps` (size and time of each
    file) only make the cache tell a changed file.
    """
    for file in files:
        kept = []
        for number, line in enumerate(_lines(Path(file)), 1):
            try:
                text = _read(line, builder, field)
            except ValueError as error:
                yield {"text": None, "file": file, "problem": f"line {number}: {error}"}
                continue
            if text is None:
                continue
            if builder == "text":
                kept.append(text)
            else:
                yield {"text": text, "file": None, "problem": None}
        if builder == "text":
            document = "".join(kept).replace("\r\n", "\n").replace("\r", "\n")
            yield {"text": document, "file": None, "problem": None}


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as raw:
        compressed = raw.read(len(_GZIP)) == _GZIP
    with gzip.open(file) if compressed else file.open("rb") as lines:
        first = lines.readline()
        yield first.removeprefix(_BYTE_ORDER_MARK)
        yield from lines


def _spans_lines(first: bytes) -> bool:
    """Whether JSON that starts so is an indented object or a list of objects, both of which `datasets` reads."""
    return first in (b"[", b"{") or first.startswith(b"[{")


def _read(line: bytes, builder: str, field: str) -> str | None:
    """A line of a text file, or the document in a JSON line (None: blank). Raises ValueError saying what is wrong."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})") from error
    if builder == "text":
        return text
    if not (text := text.strip(_BLANK)):
        return None
    try:
        record: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not usable JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{_kind(record)}, not an object")
    if field not in record:
        raise ValueError(f"no field {field!r}")
    if not isinstance(value := record[field], str):
        raise ValueError(f"the field {field!r} holds {_kind(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the field {field!r} holds half of a surrogate pair") from error
    return value


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")
