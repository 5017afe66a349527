"""What routers do over a text: load, probability, gate and entropy per layer and expert.

Shapes: L layers, N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What a mixture's output calls its router logits, and what its config calls how they are used.
ROUTERS = {
    "feed_forward": ("router_logits", "num_experts_per_tok", "norm_topk_prob"),
    "attention": ("attention_router_logits", "num_attention_experts_per_tok", "attention_norm_topk_prob"),
}


@dataclass(frozen=True)
class LayerRouting:
    """One layer's router over a text; entropies are in nats, at most ln(E).

    load: (E,) share of the assignments (k per token) that went to each expert; soft routing: share of the weight.
    probability: (E,) mean of the softmax.
    gate: (E,) mean weight in the layer's output before any fixed scale, 0 for tokens that did not select the expert.
    load_entropy: of `load`; ln(E) when all experts are used equally.
    token_entropy: mean over tokens of the softmax's entropy; 0 when every token has a certain expert.
    """

    load: list[float]
    probability: list[float]
    gate: list[float]
    load_entropy: float
    token_entropy: float


class RouterStatistics:
    """Sums over tokens of one kind of router, all layers, kept on the device where the logits are.

    Args:
        top_k: experts per token; None for soft routing.
        normalize: gates of the selected experts sum to 1.
    """

    def __init__(self, top_k: int | None, normalize: bool = False) -> None:
        self.top_k = top_k
        self.normalize = normalize
        self.sums: torch.Tensor | None = None

    @torch.no_grad()
    def update(self, logits: Sequence[torch.Tensor]) -> None:
        """Add the tokens of one forward pass: one (N, E) per layer."""
        stacked = torch.stack([layer.detach().float().to(logits[0].device) for layer in logits])  # (L, N, E)
        probabilities = stacked.softmax(dim=-1)
        gates, load = probabilities, probabilities
        if self.top_k is not None:
            selected = torch.zeros_like(probabilities).scatter(-1, stacked.topk(self.top_k, dim=-1).indices, 1.0)
            gates, load = probabilities * selected, selected / self.top_k
        if self.normalize:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        entropy = torch.special.entr(probabilities)
        tokens = torch.ones_like(probabilities)
        sums = torch.stack([values.sum(dim=1) for values in (load, probabilities, gates, entropy, tokens)]).double()
        self.sums = sums if self.sums is None else self.sums + sums

    def layers(self) -> list[LayerRouting]:
        """The means over all tokens so far, one entry per layer."""
        if self.sums is None:
            return []
        load, probability, gate, entropy, _ = (self.sums / self.sums[-1]).cpu()
        return [
            LayerRouting(
                load=load[layer].tolist(),
                probability=probability[layer].tolist(),
                gate=gate[layer].tolist(),
                load_entropy=float(torch.special.entr(load[layer]).sum()),
                token_entropy=float(entropy[layer].sum()),
            )
            for layer in range(len(load))
        ]


def is_mixture(config: PreTrainedConfig) -> bool:
    """Whether models of this config have routers."""
    return hasattr(config, "output_router_logits")


def router_statistics(config: PreTrainedConfig) -> dict[str, RouterStatistics]:
    """An empty `RouterStatistics` for each kind of router a mixture may have; nothing for a dense model."""
    if not is_mixture(config):
        return {}
    return {
        kind: RouterStatistics(getattr(config, top_k, None), bool(getattr(config, normalize, False)))
        for kind, (_, top_k, normalize) in ROUTERS.items()
    }


def update_statistics(statistics: dict[str, RouterStatistics], outputs: Any) -> None:
    """Add what a forward pass with `output_router_logits=True` returned."""
    for kind, (logits, _, _) in ROUTERS.items():
        if layers := getattr(outputs, logits, None):
            statistics[kind].update(layers)
