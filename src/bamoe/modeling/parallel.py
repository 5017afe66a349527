"""Attention heads spread over processes: the one entry of the tensor-parallel plan that transformers does not have."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from .configuration_attention import AttentionExpertsConfig
from .head_layout import HeadLayout

OLDEST_WITH_EXPERT_PARALLELISM = (5, 23)


class LocalHeads(nn.Module):
    """From values that every process has to those of the heads it computes: all heads, until a tensor-parallel plan
    gives this process a share.

    `ranks` processes hold equal runs of heads; this one holds run number `rank`. With KV sharing as with KV experts a
    run of query heads belongs to the same run of key/value heads.
    """

    def __init__(self, config: AttentionExpertsConfig):
        super().__init__()
        self.config = config
        self.layout = HeadLayout.of(config)
        self.rank, self.ranks = 0, 1

    def forward(
        self,
        values: torch.Tensor,
        dim: int,
        expand: Callable[[torch.Tensor, Any, int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The local part along `dim` of values per head, or of values that `expand` repeats for every head."""
        per_head = values if expand is None else expand(values, self.layout, dim)
        return per_head.chunk(self.ranks, dim)[self.rank]


class LocalHeadsParallel(TensorParallelLayer):
    """The plan's style for `LocalHeads`: identity forward, sum over processes backward.

    Gates and norm weights act on local heads, so each process has a part of their gradient. For gates it is the
    router's output that needs the sum: summing its weight's gradient would leave that of its input incomplete.
    """

    def install_forward(self, module: Any, mesh: Any) -> Any:
        check_tensor_parallel(module.config, mesh.size())
        module.rank, module.ranks = mesh.get_local_rank(), mesh.size()
        return super().install_forward(module, mesh)

    def transform_inputs_pre_forward(self, module: Any, args: Any, kwargs: Any, mesh: Any) -> tuple[Any, Any]:
        # Not every build of torch has it, and only a tensor-parallel model needs it.
        from torch.distributed.tensor import DTensor, Partial, Replicate

        values, *rest = args
        if torch.is_grad_enabled() and values.requires_grad:
            replicated = DTensor.from_local(values, mesh, [Replicate()], run_check=False)
            values = replicated.to_local(grad_placements=[Partial()])
        return (values, *rest), kwargs


ALL_PARALLEL_STYLES.register("local_heads", LocalHeadsParallel())


def check_tensor_parallel(config: PreTrainedConfig, ranks: int) -> None:
    """Refuse a number of tensor-parallel processes by which heads or feed-forward width do not divide.

    Raises:
        ValueError: with the sizes seen and the numbers that would do.
    """
    names = ("num_key_value_heads", "num_attention_heads", "intermediate_size")
    sizes = {name: size for name in names if isinstance(size := getattr(config, name, None), int)}
    if uneven := [f"{name} = {size}" for name, size in sizes.items() if size % ranks]:
        possible = [str(n) for n in range(1, min(sizes.values()) + 1) if not any(size % n for size in sizes.values())]
        raise ValueError(
            f"tensor parallelism over {ranks} processes: {' and '.join(uneven)} cannot be divided by {ranks}; "
            f"this model can be spread over {' or '.join(possible)}"
        )


def check_expert_parallel(distributed_config: Any) -> None:
    """Refuse expert parallelism where transformers cannot exchange tokens between processes.

    Args:
        distributed_config: transformers' DistributedConfig, a dict of its fields, or None.

    Raises:
        ValueError: transformers is too old.
    """
    asked = distributed_config if isinstance(distributed_config, dict) else getattr(distributed_config, "__dict__", {})
    expert_parallel = (asked.get("ep_size") or 1) > 1 or asked.get("enable_expert_parallel")
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if expert_parallel and version < OLDEST_WITH_EXPERT_PARALLELISM:
        oldest = ".".join(map(str, OLDEST_WITH_EXPERT_PARALLELISM))
        raise ValueError(
            f"expert parallelism needs transformers {oldest} or later, and this is {transformers.__version__}; "
            "upgrade it, or use tensor parallelism"
        )


__all__ = ["LocalHeads", "check_expert_parallel", "check_tensor_parallel"]
