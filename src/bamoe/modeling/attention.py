"""A mixture of attention experts: Σ_i g_i(u) · MHA_i(u) (BAM, section 3).

Shapes: B batch, T tokens, D model width, A attention experts, d head width; H query and J key/value heads per expert.

With every expert active the sum is one grouped-query attention with A times the heads, whose heads are scaled by their
expert's gate before a single output projection. So the projections are ordinary `nn.Linear`s, there is one attention
call, and quantisers, adapters and serving engines work on them unchanged. Heads are ordered so that "repeat each
key/value head" gives every query head the right keys, with no copy:
    KV experts:  query heads (expert, kv head, group), key/value heads (expert, kv head)
    KV sharing:  query heads (kv head, expert, group), key/value heads (kv head)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.cohere import modeling_cohere as interleaved_rope
from transformers.models.llama import modeling_llama as half_split_rope

from .configuration_bamoe import BamoeConfig
from .parallel import LocalHeads
from .routing import AttentionRouter


def expand_to_heads(per_expert: torch.Tensor, config: BamoeConfig, dim: int) -> torch.Tensor:
    """Repeat values per attention expert (A along `dim`) for every query head, in the order of the query heads."""
    if config.attention_key_value == "experts":
        return per_expert.repeat_interleave(config.num_dense_heads, dim)
    key_value_heads = config.num_dense_key_value_heads
    group = config.num_dense_heads // key_value_heads
    return torch.cat([per_expert.repeat_interleave(group, dim)] * key_value_heads, dim)


def expand_to_key_value_heads(per_expert: torch.Tensor, config: BamoeConfig, dim: int) -> torch.Tensor:
    """Repeat values per expert with keys and values of its own, along `dim`, for every key/value head."""
    return per_expert.repeat_interleave(config.num_key_value_heads // config.num_key_value_experts, dim)


class HeadNorm(nn.Module):
    """Norm over each head's width d, in float32, of queries or keys (..., heads, d).

    One weight vector per expert, shared by its heads, with RMS (Qwen3), or one per head, mean-centred (Cohere).
    """

    def __init__(self, vectors: int, head_dim: int, eps: float, centred: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(vectors, head_dim))
        self.eps = eps
        self.centred = centred

    def forward(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Normalise heads (..., heads, d); `weight` is this norm's, expanded to (heads, d)."""
        values = heads.float()
        if self.centred:
            values = values - values.mean(-1, keepdim=True)
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)
        if self.centred:
            return (weight.float() * values).to(heads.dtype)
        return weight * values.to(heads.dtype)


class MixtureOfAttention(nn.Module):
    """Attention experts with a soft or top-k gate; plain attention when there is one expert."""

    def __init__(self, config: BamoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.window_of(layer_idx)

        width, bias = config.hidden_size, config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_value_width, bias=bias)
        self.v_proj = nn.Linear(width, key_value_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=False)
        self.local_heads = LocalHeads(config)
        if config.attention_output_bias:
            self.output_bias = nn.Parameter(torch.zeros(config.num_attention_experts, width))
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            queries = config.num_attention_heads if per_head else config.num_attention_experts
            keys = config.num_key_value_heads if per_head else config.num_key_value_experts
            self.q_norm = HeadNorm(queries, config.head_dim, config.norm_eps, centred=per_head)
            self.k_norm = HeadNorm(keys, config.head_dim, config.norm_eps, centred=per_head)
        if config.num_attention_experts > 1:
            self.gate = AttentionRouter(
                width,
                config.num_attention_experts,
                config.num_attention_experts_per_tok,
                gate_norm=config.attention_gate_norm or "none",
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attend over hidden_states (B, T, D).

        Returns:
            output (B, T, D); attention weights (B, A·H, T, S), or None where the backend does not give them; router
            logits (B·T, A), or None with one expert.
        """
        gates, output_bias, router_logits = self._route(hidden_states)
        query, key, value = self._project(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, half_split_rope.eager_attention_forward
        )
        heads, attention_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )  # (B, T, A·H, d)
        if gates is not None:
            heads = heads * self.local_heads(gates, -1, expand_to_heads)[..., None]
        output = self.o_proj(heads.flatten(-2))
        if output_bias is not None:
            output = output + output_bias
        return output, attention_weights, router_logits

    def _route(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gates (B, T, A), the mixed output bias (B, T, D) or (D,), and the router logits (B·T, A)."""
        biases = self.output_bias if self.config.attention_output_bias else None
        if self.config.num_attention_experts == 1:
            return None, None if biases is None else biases[0], None
        routed = self.gate(hidden_states.flatten(0, -2))
        weights = torch.zeros_like(routed.logits).scatter(-1, routed.indices, routed.weights)
        gates = weights.to(hidden_states.dtype).unflatten(0, hidden_states.shape[:-1])
        return gates, None if biases is None else gates @ biases, routed.logits

    def _project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, A·H, T, d), keys and values (B, cached heads, T, d), normalised and rotated."""
        per_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(per_head)
        key = self.k_proj(hidden_states).view(per_head)
        value = self.v_proj(hidden_states).view(per_head)
        if self.config.qk_norm == "head":
            query = self.q_norm(query, self.local_heads(self.q_norm.weight, 0))
            key = self.k_norm(key, self.local_heads(self.k_norm.weight, 0))
        elif self.config.qk_norm == "expert":
            query = self.q_norm(query, self.local_heads(self.q_norm.weight, 0, expand_to_heads))
            key = self.k_norm(key, self.local_heads(self.k_norm.weight, 0, expand_to_key_value_heads))
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        rope = interleaved_rope if self.config.rope_interleaved else half_split_rope
        query, key = rope.apply_rotary_pos_emb(query, key, *position_embeddings)
        return query, key, value
