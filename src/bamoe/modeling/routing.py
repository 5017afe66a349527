"""Routers: which experts see a token, and with what weight.

Shapes: N tokens, D model width, E experts, K selected experts.
Router arithmetic is float32 whatever the dtype of the model: a softmax over bfloat16 logits changes which experts win.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
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
        normalize: gates of the selected experts sum to 1.
        scale: factor on the gates.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int | None,
        normalize: bool = False,
        scale: float = 1.0,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.top_k = top_k
        self.normalize = normalize
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor) -> RouterOutput:
        """Route hidden_states (..., D)."""
        # Autocast would run this product in bfloat16, float32 inputs or not.
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
            weights, indices = select_experts(logits.softmax(dim=-1), self.top_k)
            if self.normalize and self.top_k is not None:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            return RouterOutput(logits, weights * self.scale, indices)

    def extra_repr(self) -> str:
        experts, width = self.weight.shape
        return (
            f"{width} -> {experts} experts, top_k={self.top_k or 'all'}, normalize={self.normalize}, scale={self.scale}"
        )


class AttentionRouter(Router):
    """The router over attention experts; a class of its own, so that hooks and adapters can tell the two apart."""

    def forward(self, hidden_states: torch.Tensor) -> RouterOutput:
        """Route hidden_states (..., D); `weights` are dense gates (..., E), zero for experts that are not selected."""
        routed = super().forward(hidden_states)
        if self.top_k is not None:
            routed.weights = torch.zeros_like(routed.logits).scatter(-1, routed.indices, routed.weights)
        return routed


class FeedForwardRouter(Router):
    """The router over feed-forward experts."""


def select_experts(probabilities: torch.Tensor, top_k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest of probabilities (..., E) and their indices; all E, in order, when top_k is None."""
    if top_k is None:
        experts = torch.arange(probabilities.shape[-1], device=probabilities.device)
        return probabilities, experts.expand_as(probabilities)
    weights, indices = probabilities.topk(top_k, dim=-1)
    return weights, indices


@dataclass
class RouterLosses:
    """Losses of the routers of all layers, summed over layers; their mean over data-parallel ranks is the value of
    the global batch."""

    load_balance: torch.Tensor
    z: torch.Tensor


def router_losses(
    logits: Sequence[torch.Tensor],
    top_k: int,
    token_mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> RouterLosses:
    """Load-balance and z losses of one kind of router (BAM, section 3).

    Per layer, over the tokens of all ranks in `group` together:
        load balance = E · Σ_i f_i P_i     f_i = share of the K·N assignments that went to expert i,
                                           P_i = mean probability of expert i; 1 when uniform
        z            = mean over tokens of (logsumexp of the logits)²

    f carries no gradient, so the counts of all ranks are summed; P and z are means over tokens, so each rank keeps its
    own share of them and the ranks' losses average to the global value, gradients included.

    Args:
        logits: one (N, E) per layer.
        top_k: K.
        token_mask: (N,), 1 for real tokens and 0 for padding; None when all are real.
        group: data-parallel ranks; None for one process.
    """
    stacked = torch.stack([layer.to(logits[0].device) for layer in logits])  # (layers, N, E)
    num_experts = stacked.shape[-1]
    mask = stacked.new_ones(stacked.shape[1]) if token_mask is None else token_mask.reshape(-1).to(stacked)
    probabilities = stacked.softmax(dim=-1)
    with torch.no_grad():
        _, selected = select_experts(probabilities, top_k)
        assignments = F.one_hot(selected, num_experts).sum(dim=-2)
        counts = torch.einsum("lne,n->le", assignments.to(mask), mask)
        totals = sum_over_ranks(torch.cat([counts.flatten(), mask.sum()[None]]), group)
        num_tokens = totals[-1].clamp_min(1.0)
        fractions = totals[:-1].view_as(counts) / (top_k * num_tokens)
    # This rank's share of each mean, times the number of ranks, so that averaging over ranks adds the shares up.
    weights = mask * (num_ranks(group) / num_tokens)
    mean_probabilities = torch.einsum("lne,n->le", probabilities, weights)
    squared_z = stacked.logsumexp(dim=-1).square()
    return RouterLosses(
        load_balance=num_experts * (fractions * mean_probabilities).sum(),
        z=(squared_z * weights).sum(),
    )


def num_ranks(group: dist.ProcessGroup | None) -> int:
    """Size of a process group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum a tensor over the ranks of `group`, in place; carries no gradient."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values
