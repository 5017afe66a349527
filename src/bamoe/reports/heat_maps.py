"""Routing as heat maps: which expert gets how much, per layer and domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bamoe.reports.plots import SVG_INCHES, curve_label, svg, svg_settings

_ACROSS = 4  # maps side by side
_NUMBERED = 8  # with more experts the numbers would not fit into their cells
_LIGHT_INK, _DARK_INK = "#FEFEFE", "#101010"  # on the maps' own colours, the same on a light and a dark page
# Inches. Places are given rather than found: all figures of a page line up, and are drawn several times faster.
_LEFT, _GAP, _WIDEST, _LAYER, _ABOVE, _BELOW = 0.36, 0.1, 1.5, 0.19, 0.42, 0.38


@dataclass(frozen=True)
class HeatMap:
    """Shares of at most 1, one row per layer and one column per expert."""

    title: str
    shares: Sequence[Sequence[float]]


def heat_maps_svg(groups: Sequence[tuple[str, Sequence[HeatMap]]], darkest: float = 1.0) -> bytes:
    """Groups of maps below one another, each with its name; percentages are written where there is room.

    All maps have one scale of colours, from 0 to the share `darkest`.
    """
    from matplotlib.figure import Figure

    lines = [
        (name if start == 0 else "", maps[start : start + _ACROSS])
        for name, maps in groups
        for start in range(0, len(maps), _ACROSS)
    ]
    across = max(len(maps) for _, maps in lines)
    width = min(_WIDEST, (SVG_INCHES - _LEFT) / across - _GAP)
    heights = [_LAYER * max(len(heat_map.shares) for heat_map in maps) for _, maps in lines]
    whole = sum(height + _ABOVE + _BELOW for height in heights)
    with svg_settings():
        figure = Figure(figsize=(SVG_INCHES, whole), facecolor="#FFFFFF")
        top = whole
        for (name, maps), height in zip(lines, heights, strict=True):
            figure.text(0.02 / SVG_INCHES, (top - 0.03) / whole, curve_label(name), fontsize=9, va="top")
            bottom = top - _ABOVE - height
            for index, heat_map in enumerate(maps):
                left = _LEFT + index * (width + _GAP)
                box = (left / SVG_INCHES, bottom / whole, width / SVG_INCHES, height / whole)
                _draw(figure.add_axes(box), heat_map, darkest, first=index == 0)
            top = bottom - _BELOW
        return svg(figure)


def _draw(axes: Any, heat_map: HeatMap, darkest: float, first: bool) -> None:
    layers, experts = len(heat_map.shares), len(heat_map.shares[0])
    axes.pcolormesh(heat_map.shares, cmap="Blues", vmin=0.0, vmax=darkest, linewidth=0)
    if experts <= _NUMBERED:
        for layer, row in enumerate(heat_map.shares):
            for expert, share in enumerate(row):
                ink = _DARK_INK if share < 0.7 * darkest else _LIGHT_INK
                axes.text(expert + 0.5, layer + 0.5, f"{100 * share:.0f}", color=ink, fontsize=7.5,
                          ha="center", va="center_baseline")  # fmt: skip
    axes.invert_yaxis()  # the first layer at the top, as text is read
    axes.set_title(curve_label(heat_map.title), fontsize=8, pad=3)
    step = 1 if experts <= _NUMBERED else -(-experts // 4)
    axes.set_xticks([expert + 0.5 for expert in range(0, experts, step)], [str(e) for e in range(0, experts, step)])
    step = 1 if layers <= _NUMBERED else -(-layers // 6)
    axes.set_yticks([layer + 0.5 for layer in range(0, layers, step)], [str(e) for e in range(0, layers, step)])
    axes.tick_params(length=0, labelsize=7, labelleft=first, pad=2)
    axes.set_xlabel("expert", fontsize=7.5, labelpad=1)
    if first:
        axes.set_ylabel("layer", fontsize=7.5, labelpad=2)
    axes.spines[:].set_visible(False)
