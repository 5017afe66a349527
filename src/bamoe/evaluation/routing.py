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
    "attention": ("attention_router_logits", "num_attention_experts_per_tok", "attention_gate_norm"),
}
UNUSED = 0.1  # an expert with less than this part of its uniform share is not used
DOMINANT = 0.8  # an expert with more than this share of all assignments leaves the others none to learn from
_NAMED = 3  # experts in a message


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


def assignments(logits: Sequence[torch.Tensor], top_k: int | None) -> torch.Tensor:
    """Share of each token's assignments that goes to each expert, (L, N, E), from one (N, E) of logits per layer.

    1 / top_k for the selected experts; with soft routing (None) the softmax.
    """
    stacked = torch.stack([layer.detach().float().to(logits[0].device) for layer in logits])
    if top_k is None:
        return stacked.softmax(dim=-1)
    return torch.zeros_like(stacked).scatter(-1, stacked.topk(top_k, dim=-1).indices, 1 / top_k)


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
        load = assignments(logits, self.top_k)
        probabilities = load if self.top_k is None else assignments(logits, None)
        gates = probabilities if self.top_k is None else probabilities * (load > 0)
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


def collapsed(load: Sequence[float]) -> str | None:
    """What is wrong with a router's load (E,) over all the text it is meant for; None when it is healthy.

    Collapsed: an expert gets less than a tenth of its uniform share 1/E, or more than 80% of the assignments. On the
    text of one domain the same load may be what the experts have specialised in.
    """
    experts = len(load)
    if experts < 2:
        return None
    unused = [expert for expert, share in enumerate(load) if share < UNUSED / experts]
    dominant = [expert for expert, share in enumerate(load) if share > DOMINANT]
    if not unused and not dominant:
        return None
    first, *others = [*dominant, *unused]
    shares = [f"expert {expert} gets {load[expert]:.1%}" for expert in others]
    named = [f"expert {first} gets {load[first]:.1%} of the assignments", *shares[: _NAMED - 1]]
    more = [f"{len(shares) - _NAMED + 1} more as little"] if len(shares) >= _NAMED else []
    return f"{', '.join(named + more)} (uniform: {1 / experts:.1%})"


def collapsed_routers(routing: dict[str, dict[str, list[LayerRouting]]] | None) -> list[str]:
    """A sentence for each router, of `routing[kind][domain][layer]`, that has collapsed over all domains together.

    Every domain weighs the same. With fewer than two domains nothing is said: see `collapsed`.
    """
    found = []
    for kind, domains in (routing or {}).items():
        for number, layers in enumerate(zip(*domains.values(), strict=True)):
            load = [sum(shares) / len(layers) for shares in zip(*(layer.load for layer in layers), strict=True)]
            if len(layers) > 1 and (problem := collapsed(load)):
                found.append(f"the {kind.replace('_', '-')} router of layer {number} has collapsed: {problem}")
    return found


def is_mixture(config: PreTrainedConfig) -> bool:
    """Whether models of this config have routers."""
    return hasattr(config, "output_router_logits")


def router_statistics(config: PreTrainedConfig) -> dict[str, RouterStatistics]:
    """An empty `RouterStatistics` for each kind of router a mixture may have; nothing for a dense model."""
    if not is_mixture(config):
        return {}
    return {
        kind: RouterStatistics(
            getattr(config, top_k, None), getattr(config, normalize, None) in (True, "detached", "topk_softmax")
        )
        for kind, (_, top_k, normalize) in ROUTERS.items()
    }


def update_statistics(statistics: dict[str, RouterStatistics], outputs: Any) -> None:
    """Add what a forward pass with `output_router_logits=True` returned."""
    for kind, (logits, _, _) in ROUTERS.items():
        if layers := getattr(outputs, logits, None):
            statistics[kind].update(layers)
