"""Corpora that any Python installation carries, so that the demo needs no download: general, code, law, math.

What is installed differs from machine to machine; the sizes and hashes returned here say what a run really read.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bamoe.data.word_problems import word_problems
from bamoe.errors import DataError

DOMAINS = ("general", "code", "law", "math")

# Tables, tests and third-party code say little about the language; config-* holds the build's Makefile.
_NOT_LIBRARY = {
    *("test", "tests", "idle_test", "encodings", "lib2to3", "turtledemo", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__"),
}
_LICENCE = re.compile(r"(?i)^(licen[cs]e|copying|notice)")
_COMMON_LICENCES = Path("/usr/share/common-licenses")  # Debian and its descendants carry them
_MIN_DOCUMENT = 200  # characters; less is a heading or what a duplicate left behind
_VALID_SHARE, _VALID_CHARACTERS = 0.12, 60_000


@dataclass(frozen=True)
class BuiltinFile:
    """One written corpus file: documents as JSON lines {"text": ...}."""

    path: str
    documents: int
    characters: int
    sha256: str


def write_builtin_corpora(
    directory: str | Path, seed: int = 0, max_characters: int = 4_000_000
) -> dict[str, dict[str, BuiltinFile]]:
    """Write NAME.train.jsonl and NAME.valid.jsonl for every domain; returns {domain: {"train" | "valid": file}}.

    No document and no paragraph of a training file is in its validation file: repeated paragraphs are removed over
    the whole domain before documents are split. The same installation and seed give the same bytes.
    `max_characters` bounds each domain. Raises DataError where an installation carries too little of a domain.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written: dict[str, dict[str, BuiltinFile]] = {}
    for domain in DOMAINS:
        documents = _without_repeats(_take(_SOURCES[domain](seed), max_characters))
        train, valid = _split(documents, seed)
        if not train or not valid:
            raise DataError(
                f"this Python installation carries only {len(documents)} documents of {domain} text, too few for the "
                "demo; use a regular CPython with its standard library sources and its packages' licence files"
            )
        written[domain] = {
            part: _write(directory / f"{domain}.{part}.jsonl", texts)
            for part, texts in (("train", train), ("valid", valid))
        }
    return written


def describe(written: dict[str, dict[str, BuiltinFile]]) -> dict[str, Any]:
    """The same as plain data, for a JSON record."""
    return {domain: {part: asdict(file) for part, file in parts.items()} for domain, parts in written.items()}


def _code(seed: int) -> Iterator[str]:
    """Standard library modules as the parser sees them: no comments, and docstrings taken out."""
    for tree in _library(seed):
        for node in _documented(tree):
            node.body = node.body[1:] or [ast.Pass()]
        yield ast.unparse(tree)


def _general(seed: int) -> Iterator[str]:
    """The language reference that `help()` shows, and the standard library's docstrings."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for tree in _library(seed):
        yield "\n\n".join(ast.get_docstring(node) or "" for node in _documented(tree))


def _law(seed: int) -> Iterator[str]:
    """Licence texts of the installed distributions and, where there are any, of the operating system."""
    paths = {path for path in _COMMON_LICENCES.glob("*") if path.is_file() and not path.is_symlink()}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or []:
            if _LICENCE.match(file.name) and file.suffix.lower() in ("", ".txt", ".md", ".rst"):
                paths.add(Path(str(file.locate())))
    # By content, not by path: the same packages in another directory give the same corpus.
    texts = sorted(path.read_text("utf-8", errors="ignore") for path in paths if path.is_file())
    random.Random(seed).shuffle(texts)
    yield from texts


def _math(seed: int) -> Iterator[str]:
    problems = word_problems(seed)
    while True:
        yield "\n\n".join(islice(problems, 10))


_SOURCES: dict[str, Callable[[int], Iterator[str]]] = {
    "general": _general,
    "code": _code,
    "law": _law,
    "math": _math,
}


def _library(seed: int) -> Iterator[ast.Module]:
    """Parsed standard library modules, in an order that depends on nothing but their names and the seed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    random.Random(seed).shuffle(names)
    for name in names:
        folders = name.split("/")[:-1]
        if _NOT_LIBRARY.isdisjoint(folders) and not any(folder.startswith("config-") for folder in folders):
            yield ast.parse((root / name).read_bytes())


def _documented(tree: ast.Module) -> list[Any]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node) is not None]


def _take(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def paragraph_key(paragraph: str) -> str:
    """What makes two paragraphs the same: their letters and digits, whatever the case, spacing or line breaks."""
    return re.sub(r"[\W_]+", "", paragraph.casefold())


def _without_repeats(texts: Iterator[str]) -> list[str]:
    """Documents with only the first occurrence of each paragraph; what is then too short is left out."""
    seen = {""}
    documents = []
    for text in texts:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            if (key := paragraph_key(paragraph)) not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
        if len(document := "\n\n".join(kept)) >= _MIN_DOCUMENT:
            documents.append(document)
    return documents


def _split(documents: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Whole documents for training and for validation; one too large for validation stays with training."""
    wanted = min(_VALID_CHARACTERS, int(_VALID_SHARE * sum(map(len, documents))))
    train, valid, held = [], [], 0
    for document in random.Random(seed).sample(documents, len(documents)):
        if held < wanted and len(document) <= wanted - held + _MIN_DOCUMENT:
            valid.append(document)
            held += len(document)
        else:
            train.append(document)
    return train, valid


def _write(path: Path, documents: list[str]) -> BuiltinFile:
    data = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.write_bytes(data)
    return BuiltinFile(str(path), len(documents), sum(map(len, documents)), hashlib.sha256(data).hexdigest())
