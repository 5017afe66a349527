"""The dense architectures that can become experts, a small file each (docs/families.md: how to add one)."""

from __future__ import annotations

from typing import Any

from bamoe.errors import CompatibilityError
from bamoe.families.cohere import COHERE
from bamoe.families.family import DenseFamily
from bamoe.families.llama import LLAMA
from bamoe.families.mistral import MISTRAL
from bamoe.families.qwen2 import QWEN2
from bamoe.families.qwen3 import QWEN3

SUPPORTED: dict[str, DenseFamily] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, COHERE)}


def family_of(config: dict[str, Any]) -> DenseFamily:
    """The family of a config.json. Raises CompatibilityError that lists the supported ones."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in SUPPORTED:
        raise CompatibilityError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(SUPPORTED))}"
        )
    return SUPPORTED[model_type]


__all__ = ["SUPPORTED", "DenseFamily", "family_of"]
