"""A linear layer per expert, each applied to the tokens that selected it, as one grouped matrix product.

Shapes: N tokens, K selected experts, A experts, M = N·K rows, one per token and slot.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class ExpertOrder:
    """The N·K (token, slot) pairs sorted by expert.

    experts: (M,) the expert of each row. slots: (M,) its place among the pairs before sorting, token · K + slot.
    rows: (M,) the row of each pair. offsets: (A,) int32, the row after each expert's last.
    """

    experts: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor


def order_by_expert(indices: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sort the selections (N, K)."""
    experts, slots = indices.flatten().sort(stable=True)
    ends = torch.arange(1, num_experts + 1, device=indices.device)
    return ExpertOrder(experts, slots, slots.argsort(), torch.searchsorted(experts, ends).int())


class _Permuted(torch.autograd.Function):
    """values[permutation], whose gradient is a gather too; that of an index in general adds up rows one by one."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, permutation: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(permutation, inverse)
        return values.index_select(0, permutation)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        permutation, inverse = ctx.saved_tensors
        return _Permuted.apply(gradient, inverse, permutation), None, None


class _Repeated(torch.autograd.Function):
    """Each token's row once for each of its K experts, sorted by expert; its gradient gathers and sums K rows."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots, rows)
        ctx.tokens = len(tokens)
        return tokens.index_select(0, slots // (len(slots) // len(tokens)))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        slots, rows = ctx.saved_tensors
        by_token = _Permuted.apply(gradient, rows, slots).unflatten(0, (ctx.tokens, -1))
        return by_token.sum(dim=1), None, None


def sort_tokens(tokens: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Rows (M, in) sorted by expert of tokens (N, in), each once for each of its experts."""
    output: torch.Tensor = _Repeated.apply(tokens, order.slots, order.rows)
    return output


def sort_slots(slots: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Rows (M, in) sorted by expert of slots (M, in) in the order token · K + slot."""
    output: torch.Tensor = _Permuted.apply(slots, order.slots, order.rows)
    return output


def unsort(rows: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """The inverse of `sort_slots`."""
    output: torch.Tensor = _Permuted.apply(rows, order.rows, order.slots)
    return output


def grouped_linear(
    rows: torch.Tensor, order: ExpertOrder, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows (M, in), sorted by expert, through each one's weight (A, in, out) and bias (A, out): (M, out)."""
    dtype = compute_dtype(weight)
    output = F.grouped_mm(rows.to(dtype), weight.to(dtype), offs=order.offsets)
    return output if bias is None else output + bias.to(dtype)[order.experts]


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Autocast's dtype, which it does not apply to this kernel by itself; else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def can_group(weight: torch.Tensor, *widths: int) -> bool:
    """Whether the kernel can run a weight like this between rows of these widths: rows of 16 bytes of a type it knows,
    on a device that has it."""
    dtype = compute_dtype(weight)
    if dtype not in (torch.bfloat16, torch.float32, torch.float16):
        return False
    if any(width * dtype.itemsize % 16 for width in widths):
        return False
    if torch.compiler.is_compiling() and weight.dtype != torch.bfloat16:
        return False
    return not weight.is_cuda or torch.cuda.get_device_capability(weight.device) >= (8, 0)


def is_plain(projection: nn.Module) -> bool:
    """Whether a projection is nothing but a product with the weight that it holds.

    Not so with adapters, quantised weights, weights that are made when it is called (offloading, pruning, weight
    norms), and where somebody listens to it.
    """
    return (
        type(projection) is nn.Linear
        and type(projection.weight) in (nn.Parameter, torch.Tensor)
        and not projection.weight.is_meta
        and "forward" not in vars(projection)
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and not projection._backward_hooks
        and not projection._backward_pre_hooks
    )


__all__ = [
    "ExpertOrder",
    "can_group",
    "grouped_linear",
    "is_plain",
    "order_by_expert",
    "sort_slots",
    "sort_tokens",
    "unsort",
]
