"""In which order the heads of attention experts stand, and how to get from one order to another.

Shapes: A attention experts, K of them selected, H query and J key/value heads of one expert, G = H / J, d head width.

Grouped-query attention repeats each key/value head for a run of neighbouring query heads, so the query heads stand
    KV experts:  (expert, kv head, group)    over the keys and values (expert, kv head)
    KV sharing:  (kv head, expert, group)    over the keys and values (kv head)
and every query head meets the right keys with no copy. With top-k routing and shared keys, only the K selected experts'
heads attend, (kv head, slot, group): slot-major order, (slot, kv head, group), would be a silent error for J > 1. With
keys of their own, experts differ from token to token in which keys they need; there all A experts' heads attend, and
those of experts that were not selected do not count.
"""

from dataclasses import dataclass, fields
from typing import Self, TypeAlias

import torch

from .configuration_attention import AttentionExpertsConfig


@dataclass(frozen=True)
class HeadLayout:
    """What these functions ask of a config, read once: a layer would wait longer for a config's attributes than for
    the products of a token."""

    attention_key_value: str
    num_attention_experts: int
    num_attention_experts_per_tok: int | None
    num_dense_heads: int
    num_dense_key_value_heads: int
    num_key_value_heads: int
    num_key_value_experts: int

    @classmethod
    def of(cls, config: AttentionExpertsConfig) -> Self:
        """That of a config."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


Layout: TypeAlias = AttentionExpertsConfig | HeadLayout


def expand_to_heads(per_expert: torch.Tensor, layout: Layout, dim: int) -> torch.Tensor:
    """Repeat values per attention expert (A along `dim`) for every query head, in the order of the query heads."""
    if layout.attention_key_value == "experts":
        return per_expert.repeat_interleave(layout.num_dense_heads, dim)
    group = layout.num_dense_heads // layout.num_dense_key_value_heads
    return torch.cat([per_expert.repeat_interleave(group, dim)] * layout.num_dense_key_value_heads, dim)


def expand_to_key_value_heads(per_expert: torch.Tensor, layout: Layout, dim: int) -> torch.Tensor:
    """Repeat values per expert with keys and values of its own, along `dim`, for every key/value head."""
    return per_expert.repeat_interleave(layout.num_key_value_heads // layout.num_key_value_experts, dim)


def by_expert(values: torch.Tensor, layout: Layout, dim: int = 0) -> torch.Tensor:
    """Values of query heads, A·J·n along `dim`, as (A, ...) with J and n there: each expert's, in the order (kv head,
    group), as a view. With KV experts, whose heads lie side by side, J counts as 1."""
    shared = layout.attention_key_value == "shared"
    heads = (layout.num_dense_key_value_heads if shared else 1, layout.num_attention_experts)
    return values.unflatten(dim, (*heads, -1)).movedim(dim + 1, 0)


def only_some_run(layout: Layout) -> bool:
    """Whether a token selects fewer attention experts than there are."""
    return (layout.num_attention_experts_per_tok or layout.num_attention_experts) < layout.num_attention_experts


def only_selected_attend(layout: Layout) -> bool:
    """Whether the attention itself is of the selected experts' heads only: top-k over shared keys and values."""
    return only_some_run(layout) and layout.attention_key_value == "shared"


def select_heads(heads: torch.Tensor, indices: torch.Tensor, layout: Layout) -> torch.Tensor:
    """From all experts' heads (B, T, A·H, d), those that attend when experts `indices` (B, T, K) are selected."""
    if not only_selected_attend(layout):
        return heads
    grouped = _grouped(heads, layout.num_attention_experts, layout)
    return grouped.gather(3, _over_heads(indices, grouped)).flatten(2, 4)


def spread_heads(heads: torch.Tensor, indices: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The inverse of `select_heads`, to (B, T, A·H, d) with zeros for experts that were not selected."""
    if not only_selected_attend(layout):
        return heads
    grouped = _grouped(heads, indices.shape[-1], layout)
    shape = (*grouped.shape[:3], layout.num_attention_experts, *grouped.shape[4:])
    return grouped.new_zeros(shape).scatter(3, _over_heads(indices, grouped), grouped).flatten(2, 4)


def place_slots(slots: torch.Tensor, indices: torch.Tensor, layout: Layout) -> torch.Tensor:
    """From the heads of the selected experts (B, T, K, H, d) to the heads that attend, in their order."""
    if only_selected_attend(layout):
        per_head = slots.unflatten(3, (layout.num_dense_key_value_heads, -1))
        return per_head.transpose(2, 3).flatten(2, 4)
    wide = slots.new_zeros(*slots.shape[:2], layout.num_attention_experts, *slots.shape[3:])
    return wide.scatter(2, indices[..., None, None].expand_as(slots), slots).flatten(2, 3)


def take_slots(heads: torch.Tensor, indices: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The inverse of `place_slots`: from the heads that attended to (B, T, K, H, d)."""
    if only_selected_attend(layout):
        return _grouped(heads, indices.shape[-1], layout).transpose(2, 3).flatten(3, 4)
    wide = heads.unflatten(2, (layout.num_attention_experts, -1))
    return wide.gather(2, indices[..., None, None].expand(*indices.shape, *wide.shape[3:]))


def _grouped(heads: torch.Tensor, experts: int, layout: Layout) -> torch.Tensor:
    """Heads (B, T, J·experts·G, d) as (B, T, J, experts, G, d), whatever share of the J this process has."""
    group = layout.num_dense_heads // layout.num_dense_key_value_heads
    return heads.unflatten(2, (-1, experts, group))


def _over_heads(indices: torch.Tensor, grouped: torch.Tensor) -> torch.Tensor:
    """Indices (B, T, K) of experts for `grouped` heads (B, T, J, ·, G, d)."""
    batch, tokens, key_value_heads, _, group, width = grouped.shape
    return indices[:, :, None, :, None, None].expand(batch, tokens, key_value_heads, -1, group, width)
