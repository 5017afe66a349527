"""Where a built checkpoint comes from."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from bamoe.checkpoints.reader import CheckpointReader

PROVENANCE_FILE = "bamoe_provenance.json"


def provenance(
    recipe: Mapping[str, Any],
    sources: Mapping[str, tuple[str, CheckpointReader]],
    overrides: Iterable[str] = (),
    router_seed: int | None = None,
) -> dict[str, Any]:
    """All that is needed to make a build again: recipe as resolved, sources with SHA-256 of their files, versions.

    `sources`: per label, the source as the recipe names it and its checkpoint; `overrides`: refusals that the user
    allowed. Reads every source once for its hashes.
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": dict(recipe),
        "router_seed": router_seed,
        "overrides": list(overrides),
        "sources": {
            label: {"source": source, "path": str(reader.path.resolve()), "sha256": reader.hashes()}
            for label, (source, reader) in sources.items()
        },
        "versions": {name: version(name) for name in ("bamoe", "torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
    }
