"""A model spread over the processes of a run, by transformers' own engine or by the FSDP2 of accelerate's config."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import ParallelismConfig
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from bamoe.errors import ConfigError
from bamoe.modeling.parallel import check_tensor_parallel
from bamoe.training.config import Parallel, TrainConfig

if TYPE_CHECKING:
    from transformers.distributed import DistributedConfig

# The first with which the Trainer takes a model that was sharded while it was loaded.
OLDEST_TRANSFORMERS = (5, 23)
# Before, two weights packed into one, as gate and up are, could be sharded but not gathered, so not be saved.
OLDEST_TORCH_FOR_TENSOR_PARALLEL = (2, 13)


class ParallelismOnCpu(ParallelismConfig):
    """How accelerate hands the same batch to tensor-parallel processes, also on a CPU, which it would refuse."""

    def _validate_accelerator(self, accelerator: Any) -> None:
        """Nothing: `distributed_config` has compared the sizes with the processes."""


def distributed_config(config: TrainConfig, model_config: PreTrainedConfig, processes: int) -> DistributedConfig | None:
    """What transformers needs to know to load the model in its parts; None when every process holds all of it.

    Raises:
        ConfigError: processes, heads or experts that do not divide, a version without what is asked for, or an
            accelerate config whose sharding would not happen.
    """
    _check_launcher(config)
    parallel = config.parallel
    if parallel is None or (processes == 1 and parallel.fsdp in (None, 1) and parallel.tensor == 1):
        return None
    fsdp = parallel.fsdp or max(1, processes // parallel.tensor)
    if parallel.tensor * fsdp != processes:
        raise ConfigError(
            f"parallel: tensor ({parallel.tensor}) times fsdp ({fsdp}) is {parallel.tensor * fsdp} processes, and "
            f"{processes} were started; start as many (torchrun --nproc_per_node ...), or leave fsdp out"
        )
    _check_versions(parallel)
    _check_sizes(parallel, model_config, processes)

    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_size=parallel.tensor, fsdp_size=fsdp, ep_size=parallel.expert)


def _check_launcher(config: TrainConfig) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if config.parallel is not None:
        raise ConfigError(
            "parallel and the FSDP of accelerate's config both shard the model; leave parallel out, or launch with a "
            "config without FSDP"
        )
    if not torch.accelerator.is_available():
        raise ConfigError(
            "accelerate's FSDP needs GPUs; on CPUs it would silently copy the whole model to every process. Use "
            "parallel: {fsdp: N} and a launcher without FSDP, for instance torchrun"
        )
    needed = {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    if wrong := [f"{name.lower()}: {value}" for name, value in needed.items() if os.environ.get(name) != value]:
        raise ConfigError(f"fsdp_config of accelerate's config must have {' and '.join(wrong)}")


def _check_versions(parallel: Parallel) -> None:
    if _version(transformers.__version__) < OLDEST_TRANSFORMERS:
        raise ConfigError(
            f"parallel needs transformers {_dotted(OLDEST_TRANSFORMERS)} or later, and this is "
            f"{transformers.__version__}; upgrade it, or leave parallel out"
        )
    if parallel.tensor > 1 and _version(torch.__version__) < OLDEST_TORCH_FOR_TENSOR_PARALLEL:
        raise ConfigError(
            f"parallel.tensor needs torch {_dotted(OLDEST_TORCH_FOR_TENSOR_PARALLEL)} or later to save the model, and "
            f"this is {torch.__version__}; upgrade it, or use parallel.fsdp"
        )


def _check_sizes(parallel: Parallel, model_config: PreTrainedConfig, processes: int) -> None:
    try:
        check_tensor_parallel(model_config, parallel.tensor)
    except ValueError as error:
        raise ConfigError(f"parallel.tensor: {error}") from error
    if parallel.expert == 1:
        return
    experts = getattr(model_config, "num_experts", None)
    if not isinstance(experts, int) or getattr(model_config, "base_model_ep_plan", None) is None:
        raise ConfigError(f"parallel.expert ({parallel.expert}): {model_config.model_type} has no experts to divide")
    if experts % parallel.expert or processes % parallel.expert or parallel.expert % parallel.tensor:
        raise ConfigError(
            f"parallel.expert ({parallel.expert}) must divide the {experts} experts and the {processes} processes, and "
            f"be a multiple of parallel.tensor ({parallel.tensor})"
        )


def _version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@torch.no_grad()
def all_finite(model: torch.nn.Module) -> bool:
    """Whether no weight is NaN or infinite, on any process: every process gets the same answer."""
    parameters = list(model.parameters())
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]
    # One number fetched from the device, not one per parameter.
    finite = torch.stack([part.isfinite().all() for part in local]).all()
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        finite = finite.int()
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)
