"""What the routers of an experiment's mixtures did: heat maps, entropies, collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bamoe.reports.document import Block, Bullets, Details, Figure, Figures, Paragraph, Section, Subheading, TableBlock
from bamoe.reports.heat_maps import HeatMap, heat_maps_svg
from bamoe.reports.record import ExperimentRecord, RowRecord
from bamoe.reports.row_names import row_names
from bamoe.reports.table import Column, Table

_KINDS = {"feed_forward": "feed-forward", "attention": "attention"}
Routing = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


def routing_section(record: ExperimentRecord) -> Section | None:
    """The section on routing; None where no row has routers."""
    names = row_names(record)
    rows = [row for row in record.rows if _routings(row)]
    if not rows:
        return None
    figures = [_heat_maps(row, names[row.key], index) for index, row in enumerate(rows)]
    blocks: list[Block] = [Paragraph(_EXPLAINED + _expert_order(record)), Figures(figures)]
    informed = any(_specializations(row) for row in rows)
    caption = _ENTROPY_CAPTION + (_INFORMATION_CAPTION if informed else "")
    blocks += [
        Subheading("Entropy and collapse"),
        TableBlock(_entropies(rows, names, informed), "Entropy of the routers", caption),
    ]
    if findings := [finding for row in rows for finding in _collapses(row, names[row.key])]:
        blocks.append(Bullets(findings))
    elif len(record.domains) > 1:
        blocks.append(Paragraph(_HEALTHY))
    blocks += [details for row in rows if (details := _top_tokens(row, names[row.key]))]
    return Section("Routing", blocks)


_EXPLAINED = (
    "The share of the tokens of a domain that each layer's router sends to each expert, in percent, mean over the "
    "random seeds; for a soft router, which sends every token to all experts, the share of the weight."
)
_ENTROPY_CAPTION = (
    "Load entropy: how evenly a layer's experts are used over all domains together, as a part of its maximum; 100% is "
    "even, 0% one expert. Token entropy: how undecided the router is about a token, 0% being certain. Means over "
    "layers and random seeds; least even: the layer with the lowest load entropy."
)
_INFORMATION_CAPTION = (
    " Domain and token information: what the choice of expert says about the domain and about the token, mutual "
    "information in nats, mean over layers and random seeds; by chance: the token information that a text of this "
    "length would show were the choice independent of the token."
)
_HEALTHY = (
    "No router collapsed in any seed: over all domains together every expert gets at least a tenth of its uniform "
    "share, and none more than 80%."
)
_TOP_TOKENS = 5
_INFORMATION = {
    "domain_information": "domain info",
    "token_information": "token info",
    "chance_information": "by chance",
}


def _expert_order(record: ExperimentRecord) -> str:
    names = row_names(record)
    behind = [names[row.key] for row in record.rows if row.aside]
    if len(behind) < 2:
        return ""
    order = ", ".join(f"{index} {name}" for index, name in enumerate(behind))
    return (
        f" The experts of a mixture of the branches are in this order: {order}; where it has more, the copies of the "
        "first follow it."
    )


def _routings(row: RowRecord) -> list[Routing]:
    return [run.routing for run in row.runs if run.routing]


def _field(routing: Routing, kind: str, domain: str, name: str) -> np.ndarray:
    """One field of all layers: (layers,) or (layers, experts)."""
    return np.array([layer[name] for layer in routing[kind][domain]], dtype=float)


def _mean(row: RowRecord, kind: str, domain: str, name: str) -> np.ndarray:
    return np.mean([_field(routing, kind, domain, name) for routing in _routings(row)], axis=0)


def _heat_maps(row: RowRecord, name: str, index: int) -> Figure:
    groups, words = [], []
    for kind, domains in _routings(row)[0].items():
        loads = {domain: _mean(row, kind, domain, "load") for domain in domains}
        groups.append(
            (
                f"{name}: {_KINDS.get(kind, kind)} router",
                [HeatMap(domain, load.tolist()) for domain, load in loads.items()],
            )
        )
        shares = "; ".join(
            f"{domain} " + ", ".join(f"{100 * share:.0f}%" for share in load.mean(axis=0))
            for domain, load in loads.items()
        )
        words.append(
            f"{_KINDS.get(kind, kind)} router, mean over layers, share of experts 0 to {_last(loads)}: {shares}"
        )
    alt = f"Heat maps of layers by experts for {name}. {'. '.join(words)}."
    return Figure(f"routing-{index}.svg", heat_maps_svg(groups), alt)


def _last(loads: Mapping[str, np.ndarray]) -> int:
    return max(load.shape[1] for load in loads.values()) - 1


def _entropies(rows: Sequence[RowRecord], names: Mapping[str, str], informed: bool) -> Table:
    columns = [
        Column("name", "model", "text"),
        Column("kind", "router", "text"),
        Column("load", "load entropy", "share"),
        Column("least", "least even", "share"),
        Column("layer", "in layer", "text"),
        Column("token", "token entropy", "share"),
        *(Column(key, title, "fine") for key, title in _INFORMATION.items() if informed),
    ]
    records = []
    for row in rows:
        for kind, domains in _routings(row)[0].items():
            loads = np.stack([_overall_load(routing, kind) for routing in _routings(row)])  # (seeds, layers, experts)
            most = math.log(max(2, loads.shape[-1]))
            entropies = -(loads * np.log(loads, where=loads > 0, out=np.zeros_like(loads))).sum(-1).mean(0) / most
            token = np.mean([_mean(row, kind, domain, "token_entropy") for domain in domains]) / most
            records.append({
                "name": names[row.key], "kind": _KINDS.get(kind, kind), "load": entropies.mean(),
                "least": entropies.min(), "layer": int(entropies.argmin()), "token": token,
                **_information(row, kind),
            })  # fmt: skip
    return Table(columns, records)


def _specializations(row: RowRecord) -> list[Mapping[str, Sequence[Mapping[str, Any]]]]:
    """`[kind][layer]`, the fields of `evaluation.specialization.LayerSpecialization`, of each run that has them."""
    return [run.specialization for run in row.runs if run.specialization]


def _information(row: RowRecord, kind: str) -> dict[str, float]:
    layers = [layer for found in _specializations(row) for layer in found.get(kind, ())]
    return {key: float(np.mean([layer[key] for layer in layers])) for key in _INFORMATION} if layers else {}


def _top_tokens(row: RowRecord, name: str) -> Details | None:
    """The tokens that each expert is preferred for, of the first seed: other seeds have other ones."""
    columns = [
        Column("kind", "router", "text"),
        Column("layer", "layer", "text"),
        Column("expert", "expert", "text"),
        Column("tokens", "tokens", "code"),
    ]
    records = [
        {"kind": _KINDS.get(kind, kind), "layer": number, "expert": expert,
         "tokens": "  ".join(repr(token["text"]) for token in tokens[:_TOP_TOKENS])}
        for found in _specializations(row)[:1]
        for kind, layers in found.items()
        for number, layer in enumerate(layers)
        for expert, tokens in enumerate(layer["tokens"])
    ]  # fmt: skip
    if not records:
        return None
    summary = f"{name}: tokens with the highest mutual information with each expert, first seed"
    return Details(summary, [TableBlock(Table(columns, records), summary)])


def _overall_load(routing: Routing, kind: str) -> np.ndarray:
    """(layers, experts): the load over the text of all domains, each counting the same."""
    return np.mean([_field(routing, kind, domain, "load") for domain in routing[kind]], axis=0)


def _collapses(row: RowRecord, name: str) -> list[tuple[str, str]]:
    from bamoe.evaluation.routing import collapsed  # with torch, which a report of dense models does not need

    found = []
    for run in row.runs:
        for kind, domains in (run.routing or {}).items():
            if len(domains) < 2:
                continue  # on one domain's text an uneven load may be what the experts have specialised in
            for layer, load in enumerate(_overall_load(run.routing or {}, kind)):
                if problem := collapsed(load.tolist()):
                    found.append((name, f"{_KINDS.get(kind, kind)} router, layer {layer}, seed {run.seed}: {problem}"))
    return found
