"""Corpora: files, folders or hub data sets, read through `datasets` into one column of documents."""

from __future__ import annotations

import glob
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bamoe.data.lines import first_bad_line, good_documents
from bamoe.errors import DataError
from bamoe.schema import StrictModel

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
_KINDS = "JSON lines (.jsonl, .json), text (.txt), both also with .gz, Parquet (.parquet), a folder of one of these"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Corpus(StrictModel):
    """Text of one domain: a file, a folder of files of one kind, or the name of a hub data set."""

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    text_field: str = Field("text", min_length=1, description="the column with the documents (JSON, Parquet, hub)")
    split: str = Field("train", min_length=1, description="hub data sets only")
    subset: str | None = Field(None, description="hub data sets only: the configuration name")
    on_bad_lines: Literal["refuse", "skip"] = Field(
        "refuse", description="JSON lines and text only: lines that are not UTF-8, not JSON, or have no text"
    )


class SkippedLines(UserWarning):
    """Lines of a file that hold no document and were left out, as the corpus asks: `file` and `count`."""

    def __init__(self, message: str, file: str, count: int) -> None:
        super().__init__(message)
        self.file = file
        self.count = count


def read_documents(corpus: Corpus) -> Dataset:
    """The documents of a corpus, one per row of its single column "text"; a text file is one document.

    Rows stay on disk, in the cache of `datasets` (HF_DATASETS_CACHE). Bad lines are refused by file and number, or
    left out with a `SkippedLines` warning per file; blank lines between JSON lines are neither.

    Raises:
        DataError: missing, empty, of an unknown kind, unreadable, with a bad line, or without the text field.
    """
    files = local_files(corpus)
    builder = _builder_of(files[0]) if files else None
    if corpus.on_bad_lines == "skip":
        return _read_good_lines(corpus, files, builder)
    from datasets import load_dataset

    arguments: dict[str, Any] = {"path": corpus.path, "name": corpus.subset, "split": corpus.split}
    if builder:
        arguments = {"path": builder, "data_files": [glob.escape(str(file)) for file in files], "split": "train"}
    if builder == "text":
        arguments["sample_by"] = "document"
    field = "text" if builder == "text" else corpus.text_field
    try:
        documents = load_dataset(**arguments)
    except StopIteration:
        raise DataError(f"corpus {corpus.name!r}: {corpus.path} is empty") from None
    except Exception as error:  # datasets, pyarrow, fsspec and the hub client each raise kinds of their own
        _refuse_bad_line(corpus, files, builder, field)
        reason = error.__cause__ or error
        where = "" if files else " (no file or folder here, so asked from the hub)"
        raise DataError(f"corpus {corpus.name!r}: cannot read {corpus.path}{where}: {reason}") from error
    if field not in documents.column_names:
        found = ", ".join(documents.column_names)
        raise DataError(
            f"corpus {corpus.name!r}: {corpus.path} has no field {field!r}; set text_field to one of: {found}"
        )
    kind = getattr(documents.features[field], "dtype", "mixed or nested values")
    if kind not in ("string", "large_string"):
        _refuse_bad_line(corpus, files, builder, field)
        raise DataError(f"corpus {corpus.name!r}: the field {field!r} of {corpus.path} holds {kind}, not text")
    if builder == "json":
        _check_strings(corpus, files, documents.data.column(field))
    documents = documents.select_columns([field])
    return documents if field == "text" else documents.rename_column(field, "text")


def _check_strings(corpus: Corpus, files: list[Path], column: Any) -> None:
    """Raises DataError for what the JSON reader of `datasets` lets pass: nulls (no such field), and no UTF-8."""
    try:
        column.validate(full=True)
        if column.null_count == 0:
            return
        problem = f"{column.null_count} records of {corpus.path} have no text in the field {corpus.text_field!r}"
    except ValueError as error:
        problem = f"cannot read {corpus.path}: {error}"
    _refuse_bad_line(corpus, files, "json", corpus.text_field)
    raise DataError(f"corpus {corpus.name!r}: {problem}")


def _refuse_bad_line(corpus: Corpus, files: list[Path], builder: str | None, field: str) -> None:
    """Raises DataError with the first bad line; `datasets` does not say which it is."""
    if builder in ("json", "text") and (found := first_bad_line(files, builder, field)):
        raise DataError(f"corpus {corpus.name!r}: {found}; mend it, or leave such lines out with on_bad_lines: skip")


def _read_good_lines(corpus: Corpus, files: list[Path], builder: str | None) -> Dataset:
    if builder not in ("json", "text"):
        raise DataError(
            f"corpus {corpus.name!r}: on_bad_lines: skip is for JSON lines and text files, which {corpus.path} is not"
        )
    import numpy as np
    from datasets import Dataset, Features, Value

    try:
        rows = Dataset.from_generator(
            good_documents,
            features=Features({column: Value("string") for column in ("text", "file", "problem")}),
            gen_kwargs={
                # Tuples: lists would be taken for shards.
                "files": tuple(str(file) for file in files),
                "builder": builder,
                "field": corpus.text_field,
                "stamps": tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files),
            },
        )
    except ValueError:  # of no row at all; what the reading raises comes as an error of `datasets`
        raise DataError(f"corpus {corpus.name!r}: {corpus.path} is empty") from None
    except Exception as error:
        raise DataError(f"corpus {corpus.name!r}: cannot read {corpus.path}: {error.__cause__ or error}") from error
    bad = rows.data.column("text").is_null().to_numpy()
    skipped = rows.select(np.flatnonzero(bad)).to_dict()
    for file in dict.fromkeys(skipped["file"]):
        count = skipped["file"].count(file)
        first = skipped["problem"][skipped["file"].index(file)]
        message = f"corpus {corpus.name!r}: skipped {count} of the lines of {file}, the first being {first}"
        warnings.warn(SkippedLines(message, file, count), stacklevel=3)
    if bad.all():
        raise DataError(f"corpus {corpus.name!r}: {corpus.path} holds no document")
    return rows.select_columns(["text"]).select(np.flatnonzero(~bad))


def local_files(corpus: Corpus) -> list[Path]:
    """The files of a corpus, all of one kind; none for a hub data set."""
    path = Path(corpus.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _builder_of(file))
        if not files:
            raise DataError(
                f"corpus {corpus.name!r}: the folder {path} holds no file that can be read; known: {_KINDS}"
            )
    elif path.exists():
        files = [path]
    elif _HUB_NAME.fullmatch(corpus.path) and not _builder_of(path):
        return []
    else:
        raise DataError(f"corpus {corpus.name!r}: {path} does not exist")
    builders = {_builder_of(file) for file in files}
    if None in builders:
        raise DataError(f"corpus {corpus.name!r}: {path} is of an unknown kind; known: {_KINDS}")
    if len(builders) > 1:
        raise DataError(f"corpus {corpus.name!r}: the folder {path} mixes kinds of files; keep one kind per folder")
    return files


def _builder_of(file: Path) -> str | None:
    return _BUILDERS.get(Path(file.name.removesuffix(".gz")).suffix.lower())
