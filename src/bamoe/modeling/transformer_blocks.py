"""The original Transformer's trunk (Vaswani et al., 2017) with mixtures of attention heads (MoA, section 3.2).

Shapes: B batch, T tokens, S source tokens, D model width, A attention experts.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import MixtureOfAttention
from .configuration_attention import task_blind_message
from .configuration_transformer import TransformerMixtureConfig
from .pretrained import MixturePreTrainedModel


@dataclass
class TransformerEncoderOutput(BaseModelOutput):
    """`attention_router_logits`: one (B·T, A) per layer, float32, on request."""

    attention_router_logits: tuple[torch.Tensor, ...] | None = None


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times √D: rows of length about 1 serve the head as they are, and the trunk at the size of
    the positions (Transformer, section 3.4)."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed input_ids (B, T) as (B, T, D)."""
        return super().forward(input_ids) * math.sqrt(self.embedding_dim)


def sinusoidal_positions(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Encodings (..., D), float32, of positions (...): sines and cosines in turn (Transformer, section 3.5)."""
    channels = torch.arange(0, width, 2, device=positions.device)
    angles = positions[..., None] * torch.exp(channels * (-math.log(10000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class FeedForward(nn.Module):
    """W_2 act(W_1 x + b_1) + b_2 (Transformer, eq. 2)."""

    def __init__(self, config: TransformerMixtureConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D)."""
        output: torch.Tensor = self.fc2(self.act_fn(self.fc1(hidden_states)))
        return output


class TransformerLayer(GradientCheckpointingLayer):
    """The residual stream of a layer: x' = norm(x + f(x)), or with `norm_first` x' = x + f(norm(x))."""

    def __init__(self, config: TransformerMixtureConfig):
        super().__init__()
        self.norm_first = config.norm_first
        self.dropout = nn.Dropout(config.dropout)

    def read(self, hidden_states: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """What f reads of the residual stream (B, T, D)."""
        return norm(hidden_states) if self.norm_first else hidden_states

    def add(self, hidden_states: torch.Tensor, update: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """The residual stream (B, T, D) with the output of f added."""
        hidden_states = hidden_states + self.dropout(update)
        return hidden_states if self.norm_first else norm(hidden_states)


class EncoderLayer(TransformerLayer):
    """Bidirectional self-attention and a feed-forward.

    Layers return their router logits, hooks do not record them: under reentrant checkpointing a hook sees tensors
    without a graph, and the router losses would silently train nothing.
    """

    def __init__(self, config: TransformerMixtureConfig, layer_idx: int):
        super().__init__(config)
        self.self_attn = MixtureOfAttention(config, layer_idx, is_causal=False)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map hidden_states (B, T, D) to the next ones, with this layer's router logits (B·T, A)."""
        attended, _, router_logits = self.self_attn(
            self.read(hidden_states, self.self_attn_layer_norm), attention_mask=attention_mask, **kwargs
        )
        hidden_states = self.add(hidden_states, attended, self.self_attn_layer_norm)
        fed = self.mlp(self.read(hidden_states, self.final_layer_norm))
        return self.add(hidden_states, fed, self.final_layer_norm), router_logits


class DecoderLayer(TransformerLayer):
    """Causal self-attention, attention to the encoder's output, and a feed-forward."""

    def __init__(self, config: TransformerMixtureConfig, layer_idx: int):
        super().__init__(config)
        self.self_attn = MixtureOfAttention(config, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.encoder_attn = MixtureOfAttention(config, layer_idx, is_causal=False)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        # Positional, for its gradient under reentrant checkpointing.
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Map hidden_states (B, T, D), given encoder_hidden_states (B, S, D), to the next ones.

        Returns:
            hidden states (B, T, D); router logits (B·T, A) of self-attention, and of cross-attention.
        """
        attended, _, router_logits = self.self_attn(
            self.read(hidden_states, self.self_attn_layer_norm),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = self.add(hidden_states, attended, self.self_attn_layer_norm)
        attended, _, cross_router_logits = self.encoder_attn(
            self.read(hidden_states, self.encoder_attn_layer_norm),
            attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            key_value_states=encoder_hidden_states,
            **kwargs,
        )
        hidden_states = self.add(hidden_states, attended, self.encoder_attn_layer_norm)
        fed = self.mlp(self.read(hidden_states, self.final_layer_norm))
        return self.add(hidden_states, fed, self.final_layer_norm), router_logits, cross_router_logits


class TransformerPreTrainedModel(MixturePreTrainedModel):
    """A model of `EncoderLayer` and `DecoderLayer`."""

    config: TransformerMixtureConfig
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012

    def warn_of_task_blind_routers(self) -> None:
        """Warn when the task cannot train the routers."""
        if self.config.task_blind_routers:
            warnings.warn(task_blind_message(self.config.task_blind_routers), stacklevel=3)


class TransformerStack(TransformerPreTrainedModel):
    """Embeddings, layers, and with `norm_first` a last norm."""

    def __init__(self, config: TransformerMixtureConfig, layers: list[TransformerLayer]):
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps) if config.norm_first else nn.Identity()
        self.gradient_checkpointing = False

    def embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        cache: Cache | None = None,
        position_ids: Any = None,
        token_type_ids: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Embeddings (B, T, D) of tokens (B, T), or given ones, with their positions, after what `cache` holds.

        Raises:
            ValueError: not exactly one of the two; positions or token types, which this architecture does not read; or
                a sequence, or a cache of fixed length, longer than max_position_embeddings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if position_ids is not None or token_type_ids is not None:
            given = "token_type_ids" if position_ids is None else "position_ids"
            raise ValueError(
                f"{given} is not read here: positions count from the start of a sequence, and tokens have no types; "
                "leave it out, and give packed sequences one by one"
            )
        embeds: torch.Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = embeds.shape[1]
        seen = 0 if cache is None else cache.get_seq_length()
        if isinstance(seen, int):
            self.config.refuse_longer(seen + length)
        if cache is not None:  # of a fixed length, it knows on the device alone how much it holds: that would take long
            self.config.refuse_longer(cache.get_max_length(0))
        positions = sinusoidal_positions(torch.arange(length, device=embeds.device) + seen, embeds.shape[-1])
        summed: torch.Tensor = self.dropout(embeds + positions.to(embeds))
        return summed


class TransformerEncoder(TransformerStack):
    """The encoder: a stack of `EncoderLayer`."""

    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": MixtureOfAttention}  # noqa: RUF012

    def __init__(self, config: TransformerMixtureConfig):
        super().__init__(config, [EncoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> TransformerEncoderOutput:
        """Encode input_ids (B, T), or inputs_embeds (B, T, D) as `get_input_embeddings()` makes them.

        `attention_mask` (B, T) is 0 at padding, which no token sees. Padding may be at either end, but positions
        count it. `output_router_logits` defaults to the config's.
        """
        hidden_states = self.embed(input_ids, inputs_embeds, **kwargs)
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        router_logits = []
        for layer in self.layers:
            hidden_states, logits = layer(hidden_states, attention_mask=mask, **kwargs)
            router_logits.append(logits)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return TransformerEncoderOutput(
            last_hidden_state=self.norm(hidden_states),
            attention_router_logits=routers_of(router_logits) if output_router_logits else None,
        )


def routers_of(logits: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...] | None:
    """The router logits of the layers that have a router; None without any."""
    return tuple(layer for layer in logits if layer is not None) or None


__all__ = [
    "DecoderLayer",
    "EncoderLayer",
    "ScaledEmbedding",
    "TransformerEncoder",
    "TransformerEncoderOutput",
    "TransformerPreTrainedModel",
    "TransformerStack",
    "routers_of",
]
