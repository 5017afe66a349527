"""What the routers of mixtures of attention heads did on one text: load per head, and what the heads prefer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bamoe.reports.document import Block, Details, Figure, Figures, Paragraph, Section, Subheading, TableBlock
from bamoe.reports.heat_maps import HeatMap, heat_maps_svg
from bamoe.reports.plots import Curve, Panel, curve_looks, panel_svg
from bamoe.reports.routing_section import (
    ROUTER_KINDS,
    TOKEN_INFORMATION,
    RoutedRow,
    collapse_findings,
    entropies,
    load_in_words,
    overall_load,
    top_tokens,
)
from bamoe.reports.table import Column, Table

_EXPLAINED = (
    "The share of a held-out text's assignments (k per token) that each layer's router gives to each head, of the "
    "first seed: heads of another seed have nothing in common but their number."
)
_CAPTION = (
    "Load entropy: how evenly a layer's heads are used, as a part of its maximum; 100% is even, 0% one head. Token "
    "entropy: how undecided the router is about a token, 0% being certain. Means over layers and random seeds; least "
    "even: the layer with the lowest load entropy. Token information: what the choice of head says about the token, "
    "mutual information in nats; by chance: what a text of this length would show were the choice independent of the "
    "token."
)
_HEALTHY = (
    "No router collapsed in any seed: every head gets at least a tenth of its uniform share, and none more than 80%."
)


def attention_heads_section(rows: Sequence[RoutedRow]) -> Section:
    """The section on mixtures of attention heads, each of which was seen on one text as a whole."""
    blocks: list[Block] = [
        Paragraph(_EXPLAINED),
        Figures([_load_figure(row, index) for index, row in enumerate(rows)]),
        Subheading("Entropy, collapse and token information"),
        TableBlock(entropies(rows, TOKEN_INFORMATION), "Entropy of the routers", _CAPTION),
        collapse_findings(rows, _HEALTHY),
    ]
    if informed := [row for row in rows if row.specializations]:
        blocks.append(Figures([_information_figure(informed)]))
    blocks += [_layers(row) for row in rows]
    blocks += [details for row in rows if (details := top_tokens(row))]
    return Section("Attention heads", blocks)


def _load_figure(row: RoutedRow, index: int) -> Figure:
    loads = {kind: overall_load(row.routings[0], kind) for kind in row.kinds}
    heads = max(load.shape[1] for load in loads.values())
    darkest = max(float(load.max()) for load in loads.values())
    maps = [HeatMap(ROUTER_KINDS.get(kind, kind), load.tolist()) for kind, load in loads.items()]
    words = "; ".join(f"{ROUTER_KINDS.get(kind, kind)} {load_in_words(load)}" for kind, load in loads.items())
    return Figure(
        f"head-load-{index}.svg",
        heat_maps_svg([(row.name, maps)], darkest),
        f"Heat maps of layers by heads for {row.name}. Mean over layers, share of heads 0 to {heads - 1}: {words}.",
        f"{row.name}: white is 0%, the darkest {darkest:.1%}, and {1 / heads:.1%} were even.",
    )


def _information_figure(rows: Sequence[RoutedRow]) -> Figure:
    curves, words = [], []
    for row in rows:
        for kind in row.kinds:
            name = f"{row.name}: {ROUTER_KINDS.get(kind, kind)}" if len(row.kinds) > 1 else row.name
            found = _per_layer(row, kind, "token_information")
            layers, mean = list(range(found.shape[1])), found.mean(axis=0)
            spread = {"low": found.min(axis=0).tolist(), "high": found.max(axis=0).tolist()} if len(found) > 1 else {}
            chance = _per_layer(row, kind, "chance_information").mean(axis=0)
            curves += [
                Curve(name, layers, mean.tolist(), **spread),
                Curve(f"{name}, by chance", layers, chance.tolist(), faint=True),
            ]
            words.append(f"{name} {', '.join(f'{value:.3g}' for value in mean)}")
    panel = Panel(
        "What the choice of heads says about the token", "layer", "mutual information, nats", curves, whole_x=True
    )
    looks = curve_looks(curve.name for curve in curves if not curve.faint)
    alt = f"Line plot of {panel.y_label} over {panel.x_label}. From the first layer to the last: {'; '.join(words)}."
    caption = "Mutual information of token and head, among the tokens that are frequent enough. Grey: by chance."
    if any(len(row.specializations) > 1 for row in rows):
        caption += " The shaded range is from the lowest to the highest seed."
    return Figure("head-information.svg", panel_svg(panel, looks), alt, caption)


def _per_layer(row: RoutedRow, kind: str, field: str) -> np.ndarray:
    """(seeds, layers)."""
    return np.array([[layer[field] for layer in found[kind]] for found in row.specializations], dtype=float)


def _layers(row: RoutedRow) -> Details:
    columns = [
        Column("kind", "router", "text"),
        Column("layer", "layer", "text"),
        Column("least", "least used head"),
        Column("most", "most used head"),
        Column("load_entropy", "load entropy", "fine"),
        Column("token_entropy", "token entropy", "fine"),
        *(Column(key, title, "fine") for key, title in TOKEN_INFORMATION.items()),
    ]
    records: list[dict[str, Any]] = []
    for kind in row.kinds:
        for number, load in enumerate(overall_load(row.routings[0], kind)):
            (layers,) = row.routings[0][kind].values()
            informed = row.specializations[0][kind][number] if row.specializations else {}
            records.append(
                {
                    "kind": ROUTER_KINDS.get(kind, kind),
                    "layer": number,
                    "least": load.min() * len(load),
                    "most": load.max() * len(load),
                    **{key: layers[number][key] for key in ("load_entropy", "token_entropy")},
                    **{key: informed.get(key) for key in TOKEN_INFORMATION},
                }
            )
    summary = f"{row.name}: every layer, first seed"
    caption = "Heads: their part of the assignments, 1 being an even one. Entropies and information in nats."
    return Details(summary, [TableBlock(Table(columns, records), summary, caption)])
