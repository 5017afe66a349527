"""What may be said of a difference, in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bamoe.reports.row_names import row_names
from bamoe.reports.table import change, interval, signed

if TYPE_CHECKING:
    from bamoe.reports.record import DifferenceRecord, ExperimentRecord, Interval, ParameterMatch


def verdict(record: ExperimentRecord, difference: DifferenceRecord) -> str:
    """The difference of a row, without the row's name: lower or higher only where its interval excludes zero."""
    against = row_names(record)[difference.against]
    decisive = difference.over_seeds or difference.over_text
    direction = 0 if decisive is None else _direction(decisive)
    moved = abs(difference.relative) >= 0.0005  # what is 0.0% as printed has no direction
    if direction == 0:
        return (
            f"not distinguishable from {against} (average perplexity {change(difference.relative)}, "
            f"{_measured(difference)})"
        )
    word = "lower" if direction < 0 else "higher"
    if moved and (difference.relative < 0) == (direction < 0):
        size = change(abs(difference.relative)).lstrip("+")
        return f"{size} {word} average perplexity than {against} ({_measured(difference)})"
    # Means of perplexities and of their logarithms need not agree: one bad domain weighs more in the former.
    return (
        f"{word} mean log perplexity than {against} ({_measured(difference)}), but not {word} average perplexity "
        f"({change(difference.relative)})"
    )


def verdicts(record: ExperimentRecord) -> list[tuple[str, str]]:
    """The name of the row and the verdict, for every difference of the record."""
    names = row_names(record)
    return [(names[difference.row], verdict(record, difference)) for difference in record.differences]


def parameter_verdict(match: ParameterMatch) -> str:
    """Both differences; "matched" only where both are small enough for the word."""
    sizes = f"total {change(match.total, 2)}, active {change(match.active, 2)}"
    return f"parameters matched ({sizes})" if match.matched else f"parameters not matched ({sizes})"


def _measured(difference: DifferenceRecord) -> str:
    seeds, text = difference.over_seeds, difference.over_text
    if seeds is None:
        if text is None:
            return "one random seed and one block of text: no interval"
        return (
            f"log perplexity {signed(text.mean, 3)}, 95% interval {_bounds(text)}, over the held-out text only: "
            "one random seed"
        )
    measured = f"log perplexity {signed(seeds.mean, 3)}, 95% interval over {seeds.count} seeds {_bounds(seeds)}"
    if text is not None and _direction(seeds) != 0 and _direction(text) != _direction(seeds):
        measured += f"; over the held-out text {_bounds(text)}"
    return measured


def _bounds(found: Interval) -> str:
    return interval((found.low, found.high))


def _direction(found: Interval) -> int:
    """-1, 0 or 1, of the bounds as they are printed."""
    return (round(found.low, 3) > 0) - (round(found.high, 3) < 0)
