"""Routers: which experts see a token, and with what weight.

Shapes: N tokens, D model width, E experts, K selected experts.
Router arithmetic is float32 whatever the dtype of the model: a softmax over bfloat16 logits changes which experts win.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class RouterOutput:
    """What a router decided.

    logits: (..., E) float32, before the softmax, with their graph (the losses need it).
    weights: (..., K) float32, the gates of the selected experts.
    indices: (..., K) int64, the selected experts.
    """

    logits: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor


class Router(nn.Module):
    """A linear router without bias: softmax over all experts, then the top k (BAM, section 3; all of them when soft).

    Not an `nn.Linear`, so that quantisers and "all linear layers" adapters leave it alone.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K, or None for soft routing: every expert, gates from the softmax.
        gate_norm: of the selected experts' gates, see `normalize_gates`; soft routing has none.
        scale: factor on the gates.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None,
        gate_norm: str = "none",
        scale: float = 1.0,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.top_k = top_k
        self.gate_norm = gate_norm
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor) -> RouterOutput:
        """Route hidden_states (..., D)."""
        # Autocast would run this product in bfloat16, float32 inputs or not.
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
            weights, indices = select_experts(logits.softmax(dim=-1), self.top_k)
            if self.top_k is not None:
                weights = normalize_gates(weights, self.gate_norm)
            return RouterOutput(logits, weights * self.scale, indices)

    def extra_repr(self) -> str:
        experts, width = self.weight.shape
        return (
            f"{width} -> {experts} experts, top_k={self.top_k or 'all'}, gate_norm={self.gate_norm}, scale={self.scale}"
        )


class AttentionRouter(Router):
    """The router over attention experts; a class of its own, so that hooks and adapters can tell the two apart."""


class FeedForwardRouter(Router):
    """The router over feed-forward experts."""


def select_experts(probabilities: torch.Tensor, top_k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest of probabilities (..., E) and their indices; all E, in order, when top_k is None."""
    if top_k is None:
        experts = torch.arange(probabilities.shape[-1], device=probabilities.device)
        return probabilities, experts.expand_as(probabilities)
    weights, indices = probabilities.topk(top_k, dim=-1)
    return weights, indices


def normalize_gates(gates: torch.Tensor, gate_norm: str) -> torch.Tensor:
    """Gates of the selected experts from their probabilities (..., K).

    "none": as they are. "detached": over their sum, which carries no gradient, so dw_i/dp_i = 1/sum and dw_i/dp_j = 0
    (MoA, section 3.1). "topk_softmax": the same with the gradient of the whole, which is the softmax over the selected
    logits.
    """
    if gate_norm == "none":
        return gates
    total = gates.sum(dim=-1, keepdim=True)
    return gates / (total.detach() if gate_norm == "detached" else total)
