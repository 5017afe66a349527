"""The models that are compared: a dense Llama, mixtures that upcycling would make of it, peers of the same sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from harness import Bench
from transformers import JetMoeConfig, LlamaConfig, MixtralConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from bamoe.modeling import BamoeConfig, BamoeForCausalLM
from bamoe.modeling.costs import flops_per_token

DENSE = "dense Llama"
EXPERTS = 4  # of attention and of feed-forward, as in the paper (BAM, section 4)


@dataclass(frozen=True)
class Shape:
    """A dense model and what it reads."""

    width: int
    depth: int
    heads: int
    inner: int
    vocabulary: int
    batch: int
    context: int

    def settings(self) -> dict[str, int]:
        """For the page."""
        return asdict(self)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.context


def dense_config(shape: Shape) -> LlamaConfig:
    """transformers' Llama."""
    return LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(2048, shape.context),
    )


def mixture_config(
    shape: Shape, attention_experts: int = 1, key_value: str = "experts", experts: int = 1, **changes: Any
) -> BamoeConfig:
    """A mixture of dense models of this shape, with Llama's sequential blocks."""
    return BamoeConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.depth,
        head_dim=shape.width // shape.heads,
        num_attention_experts=attention_experts,
        num_attention_heads=shape.heads * attention_experts,
        num_key_value_heads=shape.heads * (attention_experts if key_value == "experts" else 1),
        attention_key_value=key_value,
        num_experts=experts,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(2048, shape.context),
        **{"num_experts_per_tok": 1, "norm_topk_prob": False} | changes,
    )


def mixtures(shape: Shape) -> dict[str, BamoeConfig]:
    """One mixture of each kind."""
    sparse: dict[str, Any] = {"attention_routing": "top_k", "num_attention_experts_per_tok": 2}
    zero_computation: dict[str, Any] = {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2}
    return {
        "BAM, KV experts": mixture_config(shape, EXPERTS, "experts", EXPERTS),
        "BAM, KV sharing": mixture_config(shape, EXPERTS, "shared", EXPERTS),
        "BTX": mixture_config(shape, experts=EXPERTS),
        "MoA": mixture_config(shape, 2 * EXPERTS, "shared", **sparse),
        "MoE++": mixture_config(shape, experts=2 * EXPERTS, num_experts_per_tok=2, **zero_computation),
    }


def counted(shape: Shape) -> dict[str, BamoeConfig]:
    """The dense model and every mixture as the cost model counts them: the dense one as a mixture of one."""
    return {DENSE: mixture_config(shape), **mixtures(shape)}


def built(shape: Shape) -> dict[str, PreTrainedConfig]:
    """The same as they are built: the dense one as transformers' Llama."""
    return {DENSE: dense_config(shape), **mixtures(shape)}


def mixtral_config(shape: Shape, experts: int = EXPERTS, top_k: int = 2) -> MixtralConfig:
    """transformers' Mixtral with experts of this shape."""
    return MixtralConfig(
        **_peer(shape),
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        output_router_logits=True,
    )


def jetmoe_config(shape: Shape, experts: int = 2 * EXPERTS, top_k: int = 2) -> JetMoeConfig:
    """transformers' JetMoE: `top_k` of `experts` attention experts and feed-forward experts."""
    return JetMoeConfig(
        **_peer(shape),
        num_key_value_heads=shape.heads,
        kv_channels=shape.width // shape.heads,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        output_router_logits=True,
        tie_word_embeddings=False,
    )


def _peer(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.depth,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": max(2048, shape.context),
        "sliding_window": None,
    }


def model_of(config: PreTrainedConfig, bench: Bench, **options: Any) -> Any:
    """A model with random weights on the benchmark's device."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        if isinstance(config, BamoeConfig):
            model = BamoeForCausalLM._from_config(config, dtype=bench.dtype, **options)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=bench.dtype, **options)
    return model


def step_flops(config: BamoeConfig, shape: Shape) -> float:
    """FLOPs of one training step over the shape's batch."""
    return 3 * flops_per_token(config, shape.context).total * shape.tokens


def batch_of(shape: Shape, bench: Bench) -> torch.Tensor:
    """Random token ids (batch, context)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocabulary, (shape.batch, shape.context), generator=generator).to(bench.device)
