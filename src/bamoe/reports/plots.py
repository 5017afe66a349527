"""Plots that can be read in print, by colour-blind readers and on a light page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, without its yellow, which a white page swallows; the line styles say the same again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_STYLES: tuple[Any, ...] = (":", "--", "-.", (0, (5, 1)), "-", (0, (3, 1, 1, 1, 1, 1)), (0, (1, 2)))
_FAINT, _FAINT_TEXT = "#A6A6A6", "#666666"


@dataclass(frozen=True)
class Curve:
    """One line of a plot. A faint one is context: grey, and named at its higher end."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_scale: bool = False


def training_curves(panels: Sequence[Panel], path: str | Path) -> Path:
    """Draw the panels side by side into a PNG and return its path; a name has one colour in all of them."""
    # The object interface needs no display and leaves the caller's matplotlib state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = dict.fromkeys(curve.name for panel in panels for curve in panel.curves if not curve.faint)
    looks = dict(zip(names, cycle(zip(_COLOURS, _STYLES, strict=True)), strict=False))
    figure = Figure(figsize=(6.4 * len(panels), 4.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel, looks)
    path = Path(path)
    figure.savefig(path)
    return path


def _draw(axes: Any, panel: Panel, looks: dict[str, tuple[str, Any]]) -> None:
    for curve in panel.curves:
        if curve.faint:
            axes.plot(curve.x, curve.y, color=_FAINT, linewidth=1.2, marker="." if len(curve.x) < 20 else None)
            end = max((0, -1), key=lambda index: curve.y[index])
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(curve.name, (curve.x[end], curve.y[end]), color=_FAINT_TEXT, fontsize=8, **place)
        else:
            colour, style = looks[curve.name]
            axes.plot(curve.x, curve.y, color=colour, linestyle=style, linewidth=1.8, label=curve.name)
    if panel.log_scale:
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.margins(x=0.08)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if any(not curve.faint for curve in panel.curves):
        axes.legend(frameon=False, fontsize=9)
