"""What the rows of a report are called."""

from __future__ import annotations

from collections import Counter

from bamoe.reports.record import ExperimentRecord


def row_names(record: ExperimentRecord) -> dict[str, str]:
    """A name for each row's key: its own, with the key where several rows have that name."""
    times = Counter(row.name for row in record.rows)
    return {row.key: f"{row.name} ({row.key})" if times[row.name] > 1 else row.name for row in record.rows}
