"""The cross-entropy of a language-model head without its logits: some rows at a time, gradients included.

Shapes: N tokens, D model width, V vocabulary.

Of 8,192 tokens over a vocabulary of 256,000 the logits alone take 8 GiB in float32, and the usual loss holds them,
their log-softmax and their gradient. Here a block of rows is projected, scored and turned into the gradients of hidden
states and weight before the next one, all in the forward pass: nothing is projected twice.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .grouped_linear import compute_dtype

HELD_LOGITS = 2**26  # at a time: 256 MiB in float32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # In float32, because it is a sum over blocks.
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            block, target = hidden[start : start + rows], targets[start : start + rows, None]
            counted, index = target != -100, target.clamp_min(0)
            scores = (block @ weight.T).float()
            log_sum = scores.logsumexp(-1, keepdim=True)
            loss += ((log_sum - scores.gather(1, index)) * counted).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            # d loss / d scores = softmax(scores) - one_hot(target), in the memory of the scores.
            scores.sub_(log_sum).exp_().scatter_add_(1, index, scores.new_tensor(-1.0).expand_as(index))
            gradient = scores.mul_(counted).to(block.dtype)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[start : start + rows])
            if weight_grad is not None and gradient.dtype == torch.float32:
                weight_grad.addmm_(gradient.T, block)
            elif weight_grad is not None:
                weight_grad += gradient.T @ block
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scaled = [None if grad is None else grad.mul_(gradient) for grad in (hidden_grad, weight_grad)]
        return *scaled, None, None


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of hidden (N, D) · weight (V, D) over the targets (N,) that are not -100: a float32.

    At most `HELD_LOGITS` logits exist at a time, and a gradient of the size of the weight from the forward pass on. Its
    backward pass runs once.
    """
    dtype = compute_dtype(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = max(1, HELD_LOGITS // len(weight))
        targets = targets.to(hidden.device)  # with a model spread over devices, labels lie on the first
        loss: torch.Tensor = _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), targets, rows)
        return loss
