"""What routers add to a training loss: load-balance and z losses, exact over ranks and accumulated batches; and the
cross-entropy that transformers' models do not have.

Shapes: N tokens, E experts, K selected experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .configuration_attention import AttentionExpertsConfig, task_blind_message
from .routing import select_experts


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
    expert_weights: Sequence[float] | None = None,
) -> RouterLosses:
    """Load-balance and z losses of one kind of router (BAM, section 3; MoE++).

    Per layer, over the tokens of all ranks in `group` together:
        load balance = E · Σ_i f_i P_i     f_i = share of the K·N assignments that went to expert i,
                                           P_i = mean probability of expert i; 1 when uniform
        z            = mean over tokens of (logsumexp of the logits)²

    With expert_weights η it is MoE++'s heterogeneous load balance, K · Σ_i η_i f_i P_i (the paper's f_i, the share of
    the tokens that selected i, is K times ours): K / E of the plain one where every η_i is 1.

    f carries no gradient, so the counts of all ranks are summed; P and z are means over tokens, so each rank keeps its
    own share of them and the ranks' losses average to the global value, gradients included.

    Args:
        logits: one (N, E) per layer.
        top_k: K.
        token_mask: (N,), 1 for real tokens and 0 for padding; None when all are real.
        group: data-parallel ranks; None for one process.
        expert_weights: (E,), η; None for the plain loss.
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
    if expert_weights is None:
        load_balance = num_experts * (fractions * mean_probabilities).sum()
    else:
        load_balance = top_k * (stacked.new_tensor(expert_weights) * fractions * mean_probabilities).sum()
    squared_z = stacked.logsumexp(dim=-1).square()
    return RouterLosses(
        load_balance=load_balance,
        z=(squared_z * weights).sum(),
    )


def sum_router_losses(losses: Sequence[RouterLosses]) -> RouterLosses | None:
    """The losses of several kinds of routers together; None without any."""
    if not losses:
        return None
    return RouterLosses(
        load_balance=torch.stack([each.load_balance for each in losses]).sum(),
        z=torch.stack([each.z for each in losses]).sum(),
    )


def num_ranks(group: dist.ProcessGroup | None) -> int:
    """Size of a process group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum a tensor over the ranks of `group`, in place; carries no gradient."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None, label_smoothing: float
) -> torch.Tensor:
    """Mean cross-entropy of logits (B, T, V) over labels (B, T) that are not -100, or the sum over num_items_in_batch.

    `loss_function` would shift them: transformers takes every model for conditional generation for a decoder.
    """
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten().to(logits.device),
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class RouterLossMixin:
    """Adds the router losses to the loss of a model with a head; see `add_router_losses`."""

    config: AttentionExpertsConfig
    training: bool
    data_parallel_group: dist.ProcessGroup | None = None
    named_parameters: Callable[[], Iterator[tuple[str, nn.Parameter]]]
    _tp_size: int | None
    _device_mesh: Any

    def add_router_losses(
        self,
        loss: torch.Tensor,
        losses: RouterLosses,
        targets: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Add router_aux_loss_coef · load balance + router_z_loss_coef · z to `loss`, the mean over targets.

        `num_items_in_batch` divides the summed cross-entropy by the label tokens of all accumulated steps and ranks;
        the router losses, which are means, take part in the same proportion. `Trainer` then undoes the averaging over
        ranks, hence the division by their number.

        Args:
            targets: the labels that count in `loss`, -100 for those that do not.
        """
        config = self.config
        weighted = config.router_aux_loss_coef * losses.load_balance + config.router_z_loss_coef * losses.z
        share: torch.Tensor | float = 1.0
        if num_items_in_batch is not None:
            group = self.loss_group()
            share = sum_over_ranks((targets != -100).sum(), group) / (num_items_in_batch * num_ranks(group))
        return loss + share * weighted.to(loss.device)

    def loss_group(self) -> dist.ProcessGroup | None:
        """The data-parallel ranks: `data_parallel_group` if set, else all processes; None for a single process.

        Tensor-parallel ranks see the same tokens, so of a tensor-parallel model it is the ranks along the mesh's
        `fsdp` axis.
        """
        if self.data_parallel_group is not None:
            return self.data_parallel_group
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        if (self._tp_size or 1) == 1:
            return dist.group.WORLD
        if getattr(self.config.distributed_config, "dp_replicate_size", 1) > 1:
            raise ValueError(
                "with dp_replicate_size and tp_size, set data_parallel_group to the ranks that hold batches"
            )
        mesh = self._device_mesh
        both = "fsdp" in (mesh.mesh_dim_names or ()) and mesh["fsdp"].size() > 1
        return mesh["fsdp"].get_group() if both else None

    def trains_with(self, labels: torch.Tensor | None) -> bool:
        """Whether a forward pass with these labels is a training step, to whose loss the router losses belong.

        Raises:
            ValueError: it would train a router whose gate is always 1: the task cannot train it.
        """
        training: bool = self.training and labels is not None and torch.is_grad_enabled()
        if training:
            self._refuse_task_blind_router()
        return training

    def _refuse_task_blind_router(self) -> None:
        # By module, not by parameter: adapters train a router under names of their own.
        training = {
            router
            for router in self.config.task_blind_routers
            for name, parameter in self.named_parameters()
            if f"{router}." in name and parameter.requires_grad
        }
        if training:
            raise ValueError(task_blind_message(sorted(training)) + " To train the rest, freeze these routers.")
