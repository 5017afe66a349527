"""What a dense architecture must tell so that its models can become experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bamoe.errors import CompatibilityError

Config = Any  # a transformers PreTrainedConfig of the family
Shape = tuple[int, ...]

# Hugging Face's names for the tensors of a decoder; a family that differs gives its own table.
STANDARD_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "input_norm": "model.layers.{layer}.input_layernorm.weight",
    "post_attention_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "query": "model.layers.{layer}.self_attn.q_proj.weight",
    "key": "model.layers.{layer}.self_attn.k_proj.weight",
    "value": "model.layers.{layer}.self_attn.v_proj.weight",
    "output": "model.layers.{layer}.self_attn.o_proj.weight",
    "query_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "key_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "value_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "output_bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "query_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "key_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
}

# The types that transformers' LlamaRotaryEmbedding, which the mixture uses, can compute.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
# More than any model has, and few enough that a list of all tensors is cheap.
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class DenseFamily:
    """One dense architecture of transformers, described; functions take the family's own config object.

    names: key of each role's tensor, with {layer} where there is one per layer.
    projection_bias: whether queries, keys and values have biases; output_bias: whether the output has one.
    qk_norm, norm_type, parallel_block, rope_interleaved: as the fields of BamoeConfig.
    logit_scale: factor on the logits.
    sliding: (sliding_window, layer_types) as BamoeConfig takes them.
    extra_refusals: what this family can ask for and a mixture does not have.
    always_ignored: patterns (fnmatch) of stored tensors that carry no weights of the model.
    """

    model_type: str
    norm_eps: Callable[[Config], float] = lambda config: config.rms_norm_eps
    norm_type: str = "rms_norm"
    parallel_block: bool = False
    rope_interleaved: bool = False
    projection_bias: Callable[[Config], bool] = lambda config: False
    output_bias: Callable[[Config], bool] = lambda config: False
    qk_norm: Callable[[Config], str | None] = lambda config: None
    logit_scale: Callable[[Config], float] = lambda config: 1.0
    sliding: Callable[[Config], tuple[int | None, list[str] | None]] = lambda config: (None, None)
    extra_refusals: Callable[[Config], list[str]] = lambda config: []
    names: Mapping[str, str] = field(default_factory=lambda: dict(STANDARD_NAMES))
    always_ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)

    def read_config(self, config: dict[str, Any]) -> Config:
        """The family's config object from config.json, with transformers' defaults.

        Raises CompatibilityError when transformers cannot read it.
        """
        from transformers import CONFIG_MAPPING

        layers = config.get("num_hidden_layers")
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise CompatibilityError(f"num_hidden_layers is {layers}, more than the {_MOST_LAYERS} that are supported")
        try:
            # A copy, since transformers completes the rope parameters in place.
            return CONFIG_MAPPING[self.model_type].from_dict(copy.deepcopy(config))
        except Exception as error:  # validation raises several kinds
            raise CompatibilityError(f"config.json is not a valid {self.model_type} config: {error}") from error

    def translate(self, config: Config) -> dict[str, Any]:
        """The dense fields of BamoeConfig, with heads counted for one dense model."""
        sliding_window, layer_types = self.sliding(config)
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": _head_dim(config),
            "hidden_act": config.hidden_act,
            "max_position_embeddings": config.max_position_embeddings,
            "initializer_range": config.initializer_range,
            "pad_token_id": None if has_alien_padding(config) else config.pad_token_id,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "tie_word_embeddings": config.tie_word_embeddings,
            "rope_parameters": _rope_parameters(config),
            "rope_interleaved": self.rope_interleaved,
            "sliding_window": sliding_window,
            "layer_types": layer_types,
            "attention_dropout": config.attention_dropout or 0.0,
            "use_parallel_block": self.parallel_block,
            "norm_type": self.norm_type,
            "norm_eps": self.norm_eps(config),
            "qk_norm": self.qk_norm(config),
            "attention_bias": self.projection_bias(config),
            "attention_output_bias": self.output_bias(config),
            "logit_scale": self.logit_scale(config),
        }

    def shapes(self, config: Config) -> dict[str, Shape]:
        """Shape of the tensor of each role that exists under this config."""
        width, inner, head_dim = config.hidden_size, config.intermediate_size, _head_dim(config)
        heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
        queries, keys = heads * head_dim, key_value_heads * head_dim
        shapes: dict[str, Shape] = {
            "embedding": (config.vocab_size, width),
            "final_norm": (width,),
            "input_norm": (width,),
            "query": (queries, width),
            "key": (keys, width),
            "value": (keys, width),
            "output": (width, queries),
            "gate": (inner, width),
            "up": (inner, width),
            "down": (width, inner),
        }
        if not config.tie_word_embeddings:
            shapes["head"] = (config.vocab_size, width)
        if not self.parallel_block:
            shapes["post_attention_norm"] = (width,)
        if self.projection_bias(config):
            shapes |= {"query_bias": (queries,), "key_bias": (keys,), "value_bias": (keys,)}
        if self.output_bias(config):
            shapes["output_bias"] = (width,)
        if self.qk_norm(config) == "expert":
            shapes |= {"query_norm": (head_dim,), "key_norm": (head_dim,)}
        elif self.qk_norm(config) == "head":
            shapes |= {"query_norm": (heads, head_dim), "key_norm": (key_value_heads, head_dim)}
        return shapes

    def name(self, role: str, layer: int | None = None) -> str:
        """Key of a role's tensor."""
        return self.names[role].format(layer=layer)

    def dense_tensors(self, config: Config) -> dict[str, Shape]:
        """Every tensor that a checkpoint with this config must hold, with its shape."""
        tensors: dict[str, Shape] = {}
        for role, shape in self.shapes(config).items():
            per_layer = "{layer}" in self.names[role]
            for layer in range(config.num_hidden_layers if per_layer else 1):
                tensors[self.name(role, layer)] = shape
        return tensors

    def ignored(self, config: Config) -> tuple[str, ...]:
        """Patterns (fnmatch) of stored tensors that are not weights: buffers, a tied head's second copy."""
        return (*self.always_ignored, *((self.names["head"],) if config.tie_word_embeddings else ()))

    def refusals(self, config: Config) -> list[str]:
        """Every feature that this config asks for and a mixture does not have, each by its name and value."""
        from transformers.activations import ACT2FN

        found = list(self.extra_refusals(config))
        if config.hidden_act not in ACT2FN:
            found.append(f"hidden_act {config.hidden_act!r} is unknown to transformers")
        if getattr(config, "quantization_config", None):
            found.append("quantization_config: the weights are quantised; save a dequantised copy first")
        rope = config.rope_parameters or {}
        if rope.get("rope_type", "default") not in ROPE_TYPES:
            found.append(f"rope_type {rope.get('rope_type')!r}; supported: {', '.join(ROPE_TYPES)}")
        if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            found.append(f"partial_rotary_factor {rope['partial_rotary_factor']}: rotary embeddings must span the head")
        sliding_window, layer_types = self.sliding(config)
        for kind in sorted(set(layer_types or ())):
            if kind not in ("full_attention", "sliding_attention"):
                found.append(f"layer_types has {kind!r}; supported: full_attention, sliding_attention")
            elif kind == "sliding_attention" and sliding_window is None:
                found.append("layer_types has 'sliding_attention' but sliding_window is not set")
        return found


def has_alien_padding(config: Config) -> bool:
    """Whether the padding id lies outside the vocabulary, as in old Llama models: -1, or a token never embedded."""
    return config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size


def rotates_by_length(rope: Mapping[str, Any] | None) -> bool:
    """Whether max_position_embeddings changes the rotation (`modeling_rope_utils` of transformers)."""
    rope = rope or {}
    if rope.get("rope_type") in ("yarn", "longrope"):
        return not (rope.get("factor") and rope.get("original_max_position_embeddings"))
    return rope.get("rope_type") == "dynamic"


def _rope_parameters(config: Config) -> dict[str, Any] | None:
    rope = copy.deepcopy(config.rope_parameters)
    if rope and "rope_type" in rope:
        rope.pop("type", None)  # the older spelling, which transformers leaves beside the newer
    return rope


def _head_dim(config: Config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
