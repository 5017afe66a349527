"""Perplexity per domain, bits per byte, routing statistics. Imported with torch; `bamoe.evaluate` waits until used."""

from bamoe.evaluation.perplexity import DomainScore, Evaluation, evaluate
from bamoe.evaluation.routing import LayerRouting

__all__ = ["DomainScore", "Evaluation", "LayerRouting", "evaluate"]
