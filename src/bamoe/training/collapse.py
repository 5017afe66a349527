"""Routers that send next to nothing to some expert, noticed while a run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from bamoe.evaluation.routing import LayerRouting, collapsed

# With fewer assignments to an expert at its balanced share, a tenth of that may be chance.
ENOUGH_ASSIGNMENTS = 100


class CollapseWarning(UserWarning):
    """A router has collapsed: some expert hardly trains, or nearly alone does."""


class CollapseWatch:
    """Says in every log line which routers have collapsed, and warns of each once until it has recovered.

    Args:
        warns: whether this process is the one that warns.
    """

    def __init__(self, warns: bool) -> None:
        self._warns = warns
        self._known: set[str] = set()

    def logs(self, routers: Mapping[str, LayerRouting], step: int) -> dict[str, Any]:
        """What the log line of `step` says about these routers, by their names."""
        found = {
            router: finding
            for router, layer in routers.items()
            if (finding := collapsed(layer.load, layer.balanced_load)) is not None
        }
        new = [f"{router}: {found[router]}" for router in found if router not in self._known]
        self._known = set(found)
        if new and self._warns:
            warnings.warn(
                f"at step {step} routers have collapsed; if they do not recover, raise router_aux_loss_coef or lower "
                "learning_rate\n  " + "\n  ".join(new),
                CollapseWarning,
                stacklevel=2,
            )
        logs: dict[str, Any] = {"collapsed_routers": len(found)} if routers else {}
        if found:
            logs["warnings"] = "; ".join(f"{router}: {finding}" for router, finding in found.items())
        return logs
