"""A linear layer per expert, each applied to the tokens that selected it: `ExpertOrder` sorts them for one grouped
matrix product, `ExpertLoop` for one product each, `FewRows` brings a few of them their weights for one batched product.

Shapes: N tokens, K selected experts, A experts, M rows, one per pair of a token and one of its K slots: N·K, or fewer
where some reach no expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  # defines the operator `grouped_mm_fallback`
from torch import nn

# The compiler knows the kernel in bfloat16 alone; transformers' operator in its place had a gradient that does not
# compile before it had one that is an operator too.
GRADIENT_COMPILES = hasattr(torch.ops.transformers, "grouped_mm_fallback_backward")


@dataclass
class ExpertOrder:
    """The (token, slot) pairs that reach an expert, sorted by expert: rows for one grouped product over all of them.

    experts: (M,) the expert of each row. slots: (M,) its pair, token · K + slot. rows: (N·K,) the row of each pair.
    offsets: (A,) int32, the row after each expert's last. kept: (N·K, 1), the pairs that reach an expert; None for all.
    """

    experts: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor
    kept: torch.Tensor | None = None

    def of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows (M, in) of tokens (N, in), each once for each of its experts."""
        output: torch.Tensor = _Repeated.apply(tokens, self.slots, self.rows, self.kept)
        return output

    def of_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows (M, in) of pairs (N·K, in)."""
        output: torch.Tensor = _Sorted.apply(slots, self.slots, self.rows, self.kept)
        return output

    def to_slots(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (M, out) back in the order of the pairs (N·K, out), 0 for those that reach no expert."""
        output: torch.Tensor = _Unsorted.apply(rows, self.slots, self.rows, self.kept)
        return output

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, heads: int | None = None
    ) -> torch.Tensor:
        """Rows (M, in) through each one's weight (A, out, in) and bias (A, out): (M, out).

        Rows after the last offset, if any, are not computed: they hold anything.

        Args:
            heads: where `out` (1) or `in` (2) is two dimensions, the experts' key/value heads and what each has, which
                need not lie side by side in memory.
        """
        dtype = compute_dtype(weight)
        weight = (weight if heads is None else weight.flatten(heads, heads + 1)).to(dtype).transpose(1, 2)
        kernel = F.grouped_mm
        if torch.compiler.is_compiling() and dtype != torch.bfloat16:
            kernel = torch.ops.transformers.grouped_mm_fallback
        output: torch.Tensor = kernel(rows.to(dtype), weight, offs=self.offsets)
        return output if bias is None else output + bias.to(dtype).index_select(0, self.experts)


@dataclass
class ExpertLoop(ExpertOrder):
    """The same on a CPU without gradients: an expert after the other, with weights as they lie.

    The grouped product wants them side by side, and copying all experts' takes longer than a few tokens need.
    """

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, heads: int | None = None
    ) -> torch.Tensor:
        """As of `ExpertOrder`."""
        dtype, start, pieces = compute_dtype(weight), 0, []
        for expert, stop in enumerate(self.offsets.tolist()):
            if start < stop:
                matrix, piece = weight[expert].to(dtype), rows[start:stop].to(dtype)
                if heads == 1:  # (J, n, in): a product per head, side by side
                    products = piece.expand(len(matrix), -1, -1) @ matrix.transpose(1, 2)
                    output = products.transpose(0, 1).flatten(1)
                elif heads == 2:  # (out, J, n): a product per head, summed
                    apart = piece.unflatten(1, matrix.shape[1:]).transpose(0, 1)
                    output = torch.bmm(apart, matrix.permute(1, 2, 0)).sum(dim=0)
                else:
                    output = piece @ matrix.T
                pieces.append(output if bias is None else output + bias[expert].to(dtype))
                start = stop
        return torch.cat(pieces)


@dataclass
class FewRows:
    """The (token, slot) pairs as they stand, few enough to bring each the weight of its expert, as when decoding.

    experts: (M,) the expert of each pair, with M = N·K.
    """

    experts: torch.Tensor

    def of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows (M, in) of tokens (N, in), each once for each of its experts."""
        return tokens.repeat_interleave(len(self.experts) // len(tokens), dim=0)

    def of_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows (M, in) of pairs (N·K, in): themselves."""
        return slots

    def to_slots(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (M, out) in the order of the pairs: themselves."""
        return rows

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, heads: int | None = None
    ) -> torch.Tensor:
        """As of `ExpertOrder`."""
        dtype = compute_dtype(weight)
        chosen = weight.index_select(0, self.experts).to(dtype)
        chosen = chosen if heads is None else chosen.flatten(heads, heads + 1)
        output = (rows.to(dtype)[:, None] @ chosen.transpose(1, 2))[:, 0]
        return output if bias is None else output + bias.to(dtype).index_select(0, self.experts)


def order_by_expert(indices: torch.Tensor, num_experts: int, some_reach_none: bool = False) -> ExpertOrder:
    """Sort the selections (N, K), once for all products over them; with `some_reach_none`, those of experts from
    number A on are left out."""
    experts, slots = indices.flatten().sort(stable=True)
    ends = torch.arange(1, num_experts + 1, device=indices.device)
    offsets = torch.searchsorted(experts, ends).int()
    rows = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
    if not some_reach_none:
        return ExpertOrder(experts, slots, rows, offsets)
    kept = (rows < offsets[-1])[:, None]
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        # Elsewhere the number would have to be waited for, and so these rows stay, at the end, uncomputed.
        experts, slots = experts[: offsets[-1]], slots[: offsets[-1]]
    last = max(len(slots) - 1, 0)
    return ExpertOrder(experts.clamp_max(num_experts - 1), slots, rows.clamp_max(last), offsets, kept)


def _to_pairs(values: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Values of rows (M, D) as values of pairs (N·K, D)."""
    pairs = values.index_select(0, rows)
    return pairs if kept is None else pairs.masked_fill(~kept, 0)


# A gather's gradient adds up rows one by one, since any row may have been taken twice. Here each is taken once, and the
# gradient is a gather in the other direction.


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: torch.Tensor, slots: torch.Tensor, *back: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*back)
        return pairs.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _to_pairs(gradient, *ctx.saved_tensors), None, None, None


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, kept)
        ctx.tokens = len(tokens)
        return tokens.index_select(0, slots // (len(rows) // len(tokens)))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pairs = _to_pairs(gradient, *ctx.saved_tensors)
        return sum_over_slots(pairs.unflatten(0, (ctx.tokens, -1))), None, None, None


class _Unsorted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(slots)
        return _to_pairs(values, rows, kept)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return gradient.index_select(0, slots), None, None, None


def sum_over_slots(slots: torch.Tensor) -> torch.Tensor:
    """Sum of slots (N, K, D) over K."""
    return slots[:, 0] if slots.shape[1] == 1 else slots.sum(dim=1)


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
    "GRADIENT_COMPILES",
    "ExpertLoop",
    "ExpertOrder",
    "FewRows",
    "can_group",
    "is_plain",
    "order_by_expert",
    "sum_over_slots",
]
