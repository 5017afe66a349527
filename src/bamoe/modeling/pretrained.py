"""What a model of this folder is to transformers: how attention experts start, and that none of them is invented."""

from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .attention import HeadNorm, MixtureOfAttention
from .parallel import check_expert_parallel
from .routing import Router


def real_tokens(attention_mask: Any, length: int) -> torch.Tensor | None:
    """Which of the last `length` tokens are real (B, T), by a mask (B, cached + T); None for masks of other kinds."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -length:]
    return None


class MixturePreTrainedModel(PreTrainedModel):
    """A model with `MixtureOfAttention` layers: initialisation, loading, what transformers may do with it."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Completes the refusal of a checkpoint that lacks weights.
    _complete_checkpoints: ClassVar[str] = "Use a directory made by save_pretrained of the same class"

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for a decorator in the source text of the class's module, and would else choose the eager
        # path for attention experts (attention.py).
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            std = self.config.router_initializer_range
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range if std is None else std)
        elif isinstance(module, HeadNorm):
            init.ones_(module.weight)
        elif isinstance(module, MixtureOfAttention) and self.config.attention_output_bias:
            init.zeros_(module.output_bias)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Self | tuple[Self, Any]:
        """Load a checkpoint, as in transformers, but refuse one that lacks weights instead of inventing them.

        Raises:
            ValueError: weights are missing (routers above all: random ones would silently route to any expert), or
                the model cannot be spread over as many processes as `distributed_config` asks for.
        """
        check_expert_parallel(kwargs.get("distributed_config"))
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            routers = [name for name in missing if ".gate." in name]
            what = f"the router weights {routers[:3]}" if routers else f"the weights {missing[:3]}"
            more = len(missing) - len((routers or missing)[:3])
            raise ValueError(
                f"{args[0] if args else 'the checkpoint'} lacks {what}{f' and {more} more' if more else ''}. "
                f"A mixture with invented weights would run and be wrong. {cls._complete_checkpoints}."
            )
        return (model, info) if output_loading_info else model


__all__ = ["MixturePreTrainedModel", "real_tokens"]
