"""A linear layer per expert, each applied to the tokens that selected it, as one grouped matrix product.

Shapes: N tokens, K selected experts, A experts, M = N·K rows, one per token and slot.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class ExpertOrder:
    """The N·K (token, slot) pairs sorted by expert.

    experts: (M,) the expert of each row. slots: (M,) its place among the pairs before sorting, token · K + slot.
    offsets: (A,) int32, the row after each expert's last.
    """

    experts: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor

    def unsorted(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (M, ...) in the order of the pairs before sorting."""
        return rows[torch.argsort(self.slots)]


def order_by_expert(indices: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sort the selections (N, K)."""
    experts, slots = indices.flatten().sort(stable=True)
    ends = torch.arange(1, num_experts + 1, device=indices.device)
    return ExpertOrder(experts, slots, torch.searchsorted(experts, ends).int())


def grouped_linear(
    rows: torch.Tensor, order: ExpertOrder, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows (M, in), sorted by expert, through each one's weight (A, in, out) and bias (A, out): (M, out)."""
    device = rows.device.type
    # The kernel is not among those that autocast knows.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    output = F.grouped_mm(rows.to(dtype), weight.to(dtype), offs=order.offsets)
    return output if bias is None else output + bias.to(dtype)[order.experts]


def can_group(*weights: torch.Tensor) -> bool:
    """Whether the kernel can run weights (A, out, in): rows of 16 bytes, and compiled only in bfloat16."""
    if torch.compiler.is_compiling() and any(weight.dtype != torch.bfloat16 for weight in weights):
        return False
    if any(weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0) for weight in weights):
        return False
    return all(size * weight.element_size() % 16 == 0 for weight in weights for size in weight.shape[1:])


__all__ = ["ExpertOrder", "can_group", "grouped_linear", "order_by_expert"]
