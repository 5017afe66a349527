"""Rotary positions of queries and keys in three passes over memory each way (RoFormer, arXiv 2104.09864, 3.4.2).

transformers' functions of the same name are the obvious twins: they build the rotated halves first, and autograd goes
back over every step. A mixture rotates the heads of all its attention experts, so here it counts.
"""

from typing import Any

import torch
from transformers.models.cohere import modeling_cohere as interleaved
from transformers.models.llama import modeling_llama as half_split


class _Rotated(torch.autograd.Function):
    """Channels i and i + d/2 of heads (..., T, d) are a pair, and turn by an angle of cosine c and sine s (T, d)."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        (first, second), (sine_first, sine_second) = heads.chunk(2, -1), sine.chunk(2, -1)
        output = heads * cosine
        low, high = output.chunk(2, -1)
        low.addcmul_(second, sine_first, value=-1)
        high.addcmul_(first, sine_second)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        # The transposed map: back by the same angle, with each half's sine acting on the other half.
        return _Rotated.apply(gradient, cosine, -sine.roll(sine.shape[-1] // 2, -1)), None, None


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, pairs_interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query (B, heads, T, d) and key (B, cached heads, T, d) by angles of cosine and sine (B or 1, T, d).

    Pairs are channels i and i + d/2 (Llama), or neighbours with `pairs_interleaved` (Cohere).
    """
    if pairs_interleaved or torch.compiler.is_compiling() or not query.dtype == key.dtype == cosine.dtype:
        twin = interleaved if pairs_interleaved else half_split
        rotated: tuple[torch.Tensor, torch.Tensor] = twin.apply_rotary_pos_emb(query, key, cosine, sine)
        return rotated
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    return _Rotated.apply(query, cosine, sine), _Rotated.apply(key, cosine, sine)


__all__ = ["apply_rotary_pos_emb"]
