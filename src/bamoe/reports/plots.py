"""Plots that can be read in print, by colour-blind readers, on a light page and on a dark one."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's palette, without its yellow, which a white page swallows; the line styles say the same again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_STYLES: tuple[Any, ...] = (":", "--", "-.", (0, (5, 1)), "-", (0, (3, 1, 1, 1, 1, 1)), (0, (1, 2)))
_FAINT, _FAINT_TEXT, _GRID, _PAGE, TEXT = "#A6A6A6", "#666666", "#E4E4E4", "#FFFFFF", "#1F2328"
# What a colour of a light page becomes on a dark one.
_DARK = {
    _PAGE: "#15181C", TEXT: "#E3E6EA", _GRID: "#31363D", _FAINT: "#767D86", _FAINT_TEXT: "#A2A9B2",
    "#0072B2": "#3D8FE8", "#D55E00": "#F2803C", "#009E73": "#35BF95", "#CC79A7": "#DE97C0", "#000000": "#F2F2F2",
    "#56B4E9": "#A5DEFF",
}  # fmt: skip
SVG_INCHES = 4.7  # as wide as a column of a page, and still readable on a telephone
_LEGEND_LINE = 0.15  # inches
_PALE_BAND = 0.15  # the opacity of the range over seeds

Look = tuple[str, Any]


@dataclass(frozen=True)
class Curve:
    """One line of a plot, with the range of each of its points where there is one.

    A faint one is context: grey.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes; `whole_x`: only whole numbers are marked along x."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_scale: bool = False
    whole_x: bool = False


def curve_looks(names: Iterable[str]) -> dict[str, Look]:
    """A colour and a line style for each name; fifty names differ in one or the other."""
    looks = {}
    for index, name in enumerate(dict.fromkeys(names)):
        turn, place = divmod(index, len(_COLOURS))
        looks[name] = (_COLOURS[place], _STYLES[(place + 3 * turn) % len(_STYLES)])
    return looks


def panel_svg(panel: Panel, looks: Mapping[str, Look]) -> bytes:
    """One panel with its legend below, as an SVG that follows the reader's light or dark theme."""
    from matplotlib.figure import Figure

    with svg_settings():
        named = [curve.name for curve in panel.curves if not curve.faint]
        columns = 1 if any(len(name) > 32 for name in named) else 2
        legend = _LEGEND_LINE * -(-len(named) // columns)
        # Places are given rather than found, so that the figures of a page line up.
        left, right, bottom, top = 0.6, SVG_INCHES - 0.1, legend + 0.55, legend + 3.1
        height = top + 0.32
        figure = Figure(figsize=(SVG_INCHES, height), facecolor=_PAGE)
        axes = figure.add_axes(
            (left / SVG_INCHES, bottom / height, (right - left) / SVG_INCHES, (top - bottom) / height), facecolor=_PAGE
        )
        _draw(axes, panel, looks)
        if named:
            handles = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
            figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 0), ncols=columns, frameon=False,
                          fontsize=7.5, handlelength=2.8, columnspacing=1, borderpad=0.2, borderaxespad=0,
                          labelspacing=0.35)  # fmt: skip
        return svg(figure)


@contextmanager
def svg_settings() -> Iterator[None]:
    """Settings under which the same plot gives the same SVG everywhere; names are no mathematics."""
    from matplotlib import rc_context

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings = {"font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False, "axes.linewidth": 0.8}
    with rc_context({"svg.hashsalt": "bamoe", "svg.fonttype": "path", **settings, **dict.fromkeys(ink, TEXT)}):
        yield


def svg(figure: Any) -> bytes:
    """A figure as an SVG without date or version, which a dark theme recolours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    rules = "".join(
        f'[style*="{what}: {light.lower()}"]{{{what}:{dark} !important}}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
        if f"{what}: {light.lower()}" in text
    )
    return text.replace("<defs>", f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>\n <defs>", 1).encode()


def _draw(axes: Any, panel: Panel, looks: Mapping[str, Look]) -> None:
    for curve in panel.curves:
        if curve.faint:
            axes.plot(curve.x, curve.y, color=_FAINT, linewidth=1.2, marker="." if len(curve.x) < 20 else None)
        else:
            colour, style = looks[curve.name]
            if curve.low:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=_PALE_BAND, linewidth=0)
            alone = {"marker": "o", "markersize": 4} if len(curve.x) == 1 else {}
            axes.plot(
                curve.x, curve.y, color=colour, linestyle=style, linewidth=1.8, label=curve_label(curve.name), **alone
            )
    if panel.log_scale:
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if panel.whole_x:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.margins(x=0.08)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curve_label(name: str) -> str:
    """A name in a plot: not too long, and not hidden, as matplotlib does with what starts with an underscore."""
    short = textwrap.shorten(name, 56, placeholder="...") or name[:56]
    return f" {short}" if short.startswith("_") else short
