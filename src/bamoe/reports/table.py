"""Records as a table: on the terminal through rich, in documents as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Column:
    """One column: the record's key, its heading, how a value is written and which value is the best.

    kind: "text"; "amount" (a count with an SI prefix); "number" (two decimals).
    """

    key: str
    title: str
    kind: Literal["text", "amount", "number"] = "number"
    best: Literal["min", "max"] | None = None


@dataclass(frozen=True)
class Table:
    """Records in the order of their rows. A missing or None value is an empty cell.

    A record with a true value under "aside" is shown, but does not compete for the best of a column.
    """

    columns: Sequence[Column]
    records: Sequence[Mapping[str, Any]]

    def markdown(self) -> str:
        """A Markdown table, best values in bold."""
        rules = ["---" if column.kind == "text" else "---:" for column in self.columns]
        lines = [[_escape(column.title) for column in self.columns], rules]
        for record in self.records:
            cells = [(_escape(_format(record, column)), self._is_best(record, column)) for column in self.columns]
            lines.append([f"**{text}**" if best else text for text, best in cells])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def rich(self, title: str | None = None) -> RichTable:
        """A table for `rich.console.Console.print`, best values in bold."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        # One space between columns, so that ten of them fit on a terminal of 80 characters; only text wraps.
        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        for column in self.columns:
            text = column.kind == "text"
            least = 12 if text else None  # on a narrow terminal numbers are cut before the names of the rows
            table.add_column(column.title, justify="left" if text else "right", no_wrap=not text, min_width=least)
        for record in self.records:
            styles = ["bold" if self._is_best(record, column) else "" for column in self.columns]
            table.add_row(
                *(Text(_format(record, column), style) for column, style in zip(self.columns, styles, strict=True))
            )
        return table

    def _is_best(self, record: Mapping[str, Any], column: Column) -> bool:
        if column.best is None or record.get("aside") or record.get(column.key) is None:
            return False
        values = [
            other[column.key] for other in self.records if not other.get("aside") and other.get(column.key) is not None
        ]
        best = min(values) if column.best == "min" else max(values)
        # As printed: two rows that read the same are both the best.
        return _write(record[column.key], column.kind) == _write(best, column.kind)


def amount(value: float) -> str:
    """A count with three significant digits and an SI prefix: 229952 is "230k"."""
    rounded = float(f"{value:.3g}")
    for size, prefix in _PREFIXES:
        if abs(rounded) >= size:
            return f"{rounded / size:#.3g}".rstrip(".") + prefix
    return f"{value:.3g}"


def _format(record: Mapping[str, Any], column: Column) -> str:
    value = record.get(column.key)
    return "" if value is None else _write(value, column.kind)


def _write(value: Any, kind: str) -> str:
    if kind == "amount":
        return amount(value)
    return f"{value:.2f}" if kind == "number" else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
