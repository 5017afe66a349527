"""Training curves of an experiment: means over its random seeds, with their range."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bamoe.reports.document import Figure
from bamoe.reports.plots import Curve, Panel, curve_looks, panel_svg
from bamoe.reports.record import ExperimentRecord, RowRecord
from bamoe.reports.row_names import row_names

_MOST_POINTS = 200  # of a curve: more cannot be seen, and every reader would load them
_SCALES = ((1e18, "quintillion"), (1e15, "quadrillion"), (1e12, "trillion"), (1e9, "billion"), (1e6, "million"))

Points = Sequence[tuple[float, float]]


def curve_figures(record: ExperimentRecord) -> list[Figure]:
    """Held-out perplexity over all tokens and over all FLOPs behind a model, and the loss on equal batches.

    A figure that no row has points for is left out.
    """
    names = row_names(record)
    looks = curve_looks(names[row.key] for row in record.rows if not row.aside)
    range_note = " The shaded range is from the lowest to the highest seed." if len(record.seeds) > 1 else ""
    figures = []
    tokens = _curves(record, names, lambda row: (row.tokens - row.own_tokens, 1.0))
    flops = _curves(record, names, lambda row: (row.flops - row.own_flops, row.own_flops / max(1, row.own_tokens)))
    title, y_label = "Held-out text, mean over the domains", "perplexity"
    for name, what, curves in (("tokens", "tokens", tokens), ("flops", "FLOPs", flops)):
        curves, unit = _scaled(curves)
        panel = Panel(title, f"{unit}{what} behind the model", y_label, curves, log_scale=True)
        caption = (
            f"Average perplexity on held-out text over all {what} behind a model: its own and those of the models it "
            f"was made from. Grey: the seed and the branches.{range_note}"
        )
        figures.append((name, panel, caption))
    losses = [
        _mean_curve(names[row.key], [_smoothed(run.loss_curve) for run in row.runs])
        for row in record.rows
        if row.same_batches and row.runs and all(run.loss_curve for run in row.runs)
    ]
    losses, unit = _scaled(losses)
    panel = Panel("The rows that read the same batches", f"{unit}tokens of the mixture phase", "training loss", losses)
    caption = (
        "Training loss of the rows that read the same batches: each point the mean over a tenth, and over the seeds."
    )
    figures.append(("loss", panel, caption))
    return [
        Figure(f"curves-{name}.svg", panel_svg(panel, looks), _in_words(panel), caption)
        for name, panel, caption in figures
        if panel.curves
    ]


def _curves(
    record: ExperimentRecord, names: dict[str, str], place: Callable[[RowRecord], tuple[float, float]]
) -> list[Curve]:
    """Validation curves; `place` gives a row's `start` and `step`."""
    return [
        _mean_curve(
            names[row.key], [run.validation_curve for run in row.runs], *place(row), row.aside, spread=not row.aside
        )
        for row in record.rows
        if row.runs and all(run.validation_curve for run in row.runs)
    ]


def _mean_curve(
    name: str, runs: Sequence[Points], start: float = 0.0, step: float = 1.0, faint: bool = False, spread: bool = False
) -> Curve:
    """The mean over seeds, with their range for `spread`, at the points of the shortest run, the others interpolated.

    start, step: where on the x-axis the row's own training starts, and how far a token goes.
    """
    sorted_runs = [np.array(sorted(points), dtype=float) for points in runs]
    grid = min(sorted_runs, key=lambda points: points[-1, 0])[:, 0]
    grid = grid[np.unique(np.linspace(0, len(grid) - 1, min(len(grid), _MOST_POINTS)).round().astype(int))]
    values = np.stack([np.interp(grid, points[:, 0], points[:, 1]) for points in sorted_runs])
    spread = spread and len(runs) > 1
    return Curve(
        name,
        (start + step * grid).tolist(),
        values.mean(axis=0).tolist(),
        faint=faint,
        low=values.min(axis=0).tolist() if spread else (),
        high=values.max(axis=0).tolist() if spread else (),
    )


def _smoothed(points: Points) -> Points:
    """Means over a tenth of the points: one batch differs more from the next than the models do."""
    width = max(1, len(points) // 10)
    means = np.convolve([value for _, value in points], np.full(width, 1 / width), mode="valid")
    return [(tokens, float(mean)) for (tokens, _), mean in zip(points[width - 1 :], means, strict=True)]


def _scaled(curves: list[Curve]) -> tuple[list[Curve], str]:
    """The curves with their x in a unit that keeps its numbers short, and the unit's name ("million ")."""
    largest = max((value for curve in curves for value in curve.x), default=0.0)
    size, name = next(((size, f"{name} ") for size, name in _SCALES if largest >= size), (1.0, ""))
    return [
        Curve(curve.name, [value / size for value in curve.x], curve.y, curve.faint, curve.low, curve.high)
        for curve in curves
    ], name


def _in_words(panel: Panel) -> str:
    ends = "; ".join(f"{curve.name} {curve.y[-1]:.3g}" for curve in panel.curves)
    return f"Line plot of {panel.y_label} over {panel.x_label}. At the end of each line: {ends}."
