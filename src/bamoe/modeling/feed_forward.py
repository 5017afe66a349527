"""A mixture of feed-forward experts: Σ_i p_i(u) · FFN_i(u) over the selected experts (BAM, section 3; BTX, eq. 1).

Shapes: N tokens, D model width, E experts, K selected experts, F width of one expert.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import (
    ExpertsInterface,
    grouped_mm_experts_forward,
    use_experts_implementation,
)

from .configuration_bamoe import BamoeConfig
from .routing import FeedForwardRouter


def grouped_mm_or_eager(
    experts: "FeedForwardExperts", hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Grouped matrix products where their kernel can run, else the eager loop.

    The kernel wants rows of a multiple of 16 bytes. Decided per call: a width of 84 runs in float32 and does not after
    `model.bfloat16()`.
    """
    widths, element = experts.down_proj.shape[1:], experts.down_proj.element_size()
    if all(width * element % 16 == 0 for width in widths):
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    eager = inspect.unwrap(type(experts).forward)
    return eager(experts, hidden_states, top_k_index, top_k_weights)


EXPERTS_BACKENDS = ExpertsInterface()
EXPERTS_BACKENDS["grouped_mm"] = grouped_mm_or_eager


@use_experts_implementation(experts_interface=EXPERTS_BACKENDS)
class FeedForwardExperts(nn.Module):
    """E SwiGLU feed-forwards as two stacked weights: gate_up_proj (E, 2F, D), gate rows first, and down_proj (E, D, F).

    `forward` below is the eager loop, which every faster backend must agree with; transformers puts the backend of
    `config._experts_implementation` (eager, batched_mm, grouped_mm) in its place.
    """

    def __init__(self, config: BamoeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run hidden_states (N, D) through experts top_k_index (N, K), summed with top_k_weights (N, K): (N, D)."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if len(token) == 0:
                continue
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = expert_output * top_k_weights[token, slot, None]
            output = output.index_add(0, token, weighted.to(output.dtype))
        return output


class MixtureOfFeedForward(nn.Module):
    """Router and experts; a plain feed-forward when there is one expert. Soft routing selects every expert."""

    def __init__(self, config: BamoeConfig):
        super().__init__()
        if config.num_routed_experts > 1:
            self.gate = FeedForwardRouter(
                config.hidden_size,
                config.num_routed_experts,
                config.num_experts_per_tok,
                gate_norm="topk_softmax" if config.norm_topk_prob else "none",
                scale=config.routed_scaling_factor,
            )
        self.experts = FeedForwardExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map hidden_states (B, T, D) to the output (B, T, D) and the router logits (B·T, E), None without a router."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not hasattr(self, "gate"):
            index = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
            return self.experts(tokens, index, tokens.new_ones(len(tokens), 1)).view_as(hidden_states), None
        routed = self.gate(tokens)
        output = self.experts(tokens, routed.indices, routed.weights.to(tokens.dtype))
        return output.view_as(hidden_states), routed.logits


# Checkpoints with one tensor per expert, as older mixtures have them, are read too.
register_checkpoint_conversion_mapping(
    BamoeConfig.model_type,
    [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)
