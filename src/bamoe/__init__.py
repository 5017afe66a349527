"""Turn dense language models into mixtures of experts, train them, measure them, and generate text with them.

The names below are imported when first used: `import bamoe` itself loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bamoe.evaluation import evaluate
    from bamoe.modeling.configuration_bamoe import BamoeConfig
    from bamoe.modeling.modeling_bamoe import BamoeForCausalLM, BamoeModel
    from bamoe.recipes.upcycle import upcycle
    from bamoe.training import train

__version__ = version("bamoe")
__all__ = ["BamoeConfig", "BamoeForCausalLM", "BamoeModel", "__version__", "evaluate", "train", "upcycle"]

_HOME = {
    "BamoeConfig": "bamoe.modeling.configuration_bamoe",
    "BamoeForCausalLM": "bamoe.modeling.modeling_bamoe",
    "BamoeModel": "bamoe.modeling.modeling_bamoe",
    "evaluate": "bamoe.evaluation",
    "train": "bamoe.training",
    "upcycle": "bamoe.recipes.upcycle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bamoe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
