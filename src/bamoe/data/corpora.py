"""Corpora: files, folders or hub data sets, read through `datasets` into one column of documents."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

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


def read_documents(corpus: Corpus) -> Dataset:
    """The documents of a corpus, one per row of its single column "text"; a text file is one document.

    Rows stay on disk, in the cache of `datasets` (HF_DATASETS_CACHE).

    Raises:
        DataError: missing, empty, of an unknown kind, unreadable, or without the text field.
    """
    arguments = _builder_arguments(corpus)
    from datasets import load_dataset

    try:
        documents = load_dataset(**arguments)
    except StopIteration:
        raise DataError(f"corpus {corpus.name!r}: {corpus.path} is empty") from None
    except Exception as error:  # datasets, pyarrow, fsspec and the hub client each raise kinds of their own
        reason = error.__cause__ or error
        where = "" if "data_files" in arguments else " (no file or folder here, so asked from the hub)"
        raise DataError(f"corpus {corpus.name!r}: cannot read {corpus.path}{where}: {reason}") from error
    field = "text" if arguments["path"] == "text" else corpus.text_field
    if field not in documents.column_names:
        found = ", ".join(documents.column_names)
        raise DataError(
            f"corpus {corpus.name!r}: {corpus.path} has no field {field!r}; set text_field to one of: {found}"
        )
    kind = getattr(documents.features[field], "dtype", "mixed or nested values")
    if kind not in ("string", "large_string"):
        raise DataError(f"corpus {corpus.name!r}: the field {field!r} of {corpus.path} holds {kind}, not text")
    documents = documents.select_columns([field])
    return documents if field == "text" else documents.rename_column(field, "text")


def _builder_arguments(corpus: Corpus) -> dict[str, Any]:
    """What `load_dataset` needs to read the corpus."""
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
        return {"path": corpus.path, "name": corpus.subset, "split": corpus.split}
    else:
        raise DataError(f"corpus {corpus.name!r}: {path} does not exist")
    builders = {_builder_of(file) for file in files}
    if None in builders:
        raise DataError(f"corpus {corpus.name!r}: {path} is of an unknown kind; known: {_KINDS}")
    if len(builders) > 1:
        raise DataError(f"corpus {corpus.name!r}: the folder {path} mixes kinds of files; keep one kind per folder")
    (builder,) = builders
    arguments = {"path": builder, "data_files": [glob.escape(str(file)) for file in files], "split": "train"}
    return arguments | ({"sample_by": "document"} if builder == "text" else {})


def _builder_of(file: Path) -> str | None:
    return _BUILDERS.get(Path(file.name.removesuffix(".gz")).suffix.lower())
