"""Tables of how many feed-forward experts compute a token, where a router may also choose zero-computation ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bamoe.reports.table import Column, Table

_KIND = "feed_forward"


@dataclass(frozen=True)
class TokenCosts:
    """A model, and what its routers did, one entry per random seed.

    routings: `[kind][domain][layer]`, the fields of `evaluation.routing.LayerRouting`.
    token_classes: `[kind][class]`, the fields of `evaluation.token_classes.TokenClassRouting`, where taken.
    """

    name: str
    routings: Sequence[Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]]
    token_classes: Sequence[Mapping[str, Mapping[str, Mapping[str, Any]]]] = ()

    @property
    def varies(self) -> bool:
        """Whether some tokens are computed by more experts than others."""
        return any(
            layer.get("experts_per_token", 0) % 1  # evaluations of earlier versions do not have it
            for routing in self.routings
            for layers in routing.get(_KIND, {}).values()
            for layer in layers
        )

    def by_domain(self) -> dict[str, float]:
        """The mean over layers and random seeds."""
        domains = self.routings[0][_KIND]
        return {domain: fmean(fmean(layers) for layers in self._layers(domain)) for domain in domains}

    def by_layer(self) -> list[float]:
        """The mean over domains, each counting the same, and random seeds."""
        runs = [layers for domain in self.routings[0][_KIND] for layers in self._layers(domain)]
        return [fmean(layer) for layer in zip(*runs, strict=True)]

    def by_token_class(self) -> dict[str, float]:
        """The mean over layers and random seeds; empty where classes were not taken."""
        found: dict[str, list[float]] = {}
        for classes in self.token_classes:
            for name, routing in classes.get(_KIND, {}).items():
                found.setdefault(name, []).append(fmean(routing["experts_per_token"]))
        return {name: fmean(values) for name, values in found.items()}

    def _layers(self, domain: str) -> list[list[float]]:
        return [[layer["experts_per_token"] for layer in routing[_KIND][domain]] for routing in self.routings]


def experts_per_token_tables(models: Sequence[TokenCosts]) -> dict[str, Table]:
    """By title: mean feed-forward experts per token by domain, token class and layer, a row per model.

    Models that compute every token by the same number of experts are left out; without any other there is no table.
    """
    varying = [model for model in models if model.varies]
    parts: dict[str, list[dict[str, float]]] = {
        "domain": [model.by_domain() for model in varying],
        "class of token": [model.by_token_class() for model in varying],
        "layer": [{str(number): mean for number, mean in enumerate(model.by_layer())} for model in varying],
    }
    return {
        f"Feed-forward experts per token, by {what}": _table([model.name for model in varying], values)
        for what, values in parts.items()
        if any(values)
    }


def _table(names: Sequence[str], values: Sequence[Mapping[str, float]]) -> Table:
    keys = {name: f"mean {name}" for each in values for name in each}  # a domain may be called "model"
    columns = [Column("model", "model", "text"), *(Column(key, name) for name, key in keys.items())]
    records = [
        {"model": model, **{keys[name]: mean for name, mean in each.items()}}
        for model, each in zip(names, values, strict=True)
    ]
    return Table(columns, records)
