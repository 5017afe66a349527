"""A report as files: one self-contained HTML page, and the same as Markdown."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bamoe.reports.content import report
from bamoe.reports.document import FIGURES, Document

if TYPE_CHECKING:
    from bamoe.reports.record import ExperimentRecord

HTML, MARKDOWN = "report.html", "report.md"


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written; `figures` are shown by the Markdown, the page has its own."""

    html: Path
    markdown: Path
    figures: tuple[Path, ...]


def write_report(record: ExperimentRecord, folder: str | Path) -> ReportFiles:
    """Write the report of an experiment to `folder`; see `write_document`. The same record gives the same bytes."""
    return write_document(report(record), folder)


def write_document(document: Document, folder: str | Path) -> ReportFiles:
    """Write `report.html`, `report.md` and the latter's `figures/` to `folder`, in place of an older report there.

    A file is never seen in part: all are written beside their places, then moved.
    """
    folder = Path(folder)
    page, markdown = document.html(), document.markdown()
    figures = {figure.name: figure.svg for figure in document.figures()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as temporary:
        building = Path(temporary)
        (building / HTML).write_text(page, encoding="utf-8", newline="\n")
        (building / MARKDOWN).write_text(markdown, encoding="utf-8", newline="\n")
        (building / FIGURES).mkdir()
        for name, svg in figures.items():
            (building / FIGURES / name).write_bytes(svg)
        if (folder / FIGURES).exists():
            os.rename(folder / FIGURES, building / "older")
        for name in (FIGURES, MARKDOWN, HTML):
            os.replace(building / name, folder / name)
    return ReportFiles(folder / HTML, folder / MARKDOWN, tuple(folder / FIGURES / name for name in figures))
