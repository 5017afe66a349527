"""An encoder-decoder with mixtures of attention heads (MoA, section 4.1): `BamoeEncoderDecoderModel`,
`BamoeForConditionalGeneration`.

Shapes: B batch, S source tokens, T target tokens, D model width, V vocabulary, A attention experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import MixtureOfAttention
from .configuration_bamoe_encoder_decoder import BamoeEncoderDecoderConfig
from .losses import RouterLosses, RouterLossMixin, cross_entropy, router_losses, sum_router_losses
from .pretrained import real_tokens
from .transformer_blocks import (
    DecoderLayer,
    ScaledEmbedding,
    TransformerEncoder,
    TransformerPreTrainedModel,
    TransformerStack,
    routers_of,
)


@dataclass
class TransformerDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Router logits of self-attention and of cross-attention: one (B·T, A) per layer, float32, on request."""

    attention_router_logits: tuple[torch.Tensor, ...] | None = None
    cross_attention_router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class BamoeSeq2SeqModelOutput(Seq2SeqModelOutput):
    """Router logits, float32, on request: one (B·S, A) per layer of the encoder, and of the decoder one (B·T, A) per
    self-attention and per cross-attention."""

    encoder_attention_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_attention_router_logits: tuple[torch.Tensor, ...] | None = None
    cross_attention_router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class BamoeSeq2SeqLMOutput(Seq2SeqLMOutput):
    """Adds to the output the routers' losses, before their coefficients, summed over all mixtures of attention, and the
    router logits of `BamoeSeq2SeqModelOutput`.

    `aux_loss` is the load-balance loss (1 per mixture when uniform), `z_loss` the mean squared log-sum-exp.
    """

    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    encoder_attention_router_logits: tuple[torch.Tensor, ...] | None = None
    decoder_attention_router_logits: tuple[torch.Tensor, ...] | None = None
    cross_attention_router_logits: tuple[torch.Tensor, ...] | None = None


class TransformerDecoder(TransformerStack):
    """The decoder: a stack of `DecoderLayer`."""

    config: BamoeEncoderDecoderConfig
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DecoderLayer,
        "attentions": OutputRecorder(MixtureOfAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(MixtureOfAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: BamoeEncoderDecoderConfig):
        super().__init__(config, [DecoderLayer(config, i) for i in range(config.num_decoder_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        encoder_hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> TransformerDecoderOutput:
        """Decode input_ids (B, T), which follow what `past_key_values` holds, given encoder_hidden_states (B, S, D)."""
        if use_cache and past_key_values is None and not self.training:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        cache = past_key_values
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        hidden_states = self.embed(input_ids, inputs_embeds, cache, **kwargs)
        mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values=cache)
        encoder_mask = create_bidirectional_mask(
            self.config, hidden_states, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
        )
        router_logits, cross_router_logits = [], []
        for layer in self.layers:
            hidden_states, logits, cross_logits = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=mask,
                encoder_attention_mask=encoder_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            router_logits.append(logits)
            cross_router_logits.append(cross_logits)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return TransformerDecoderOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            attention_router_logits=routers_of(router_logits) if output_router_logits else None,
            cross_attention_router_logits=routers_of(cross_router_logits) if output_router_logits else None,
        )


class BamoeEncoderDecoderPreTrainedModel(TransformerPreTrainedModel):
    """What `BamoeEncoderDecoderModel` and `BamoeForConditionalGeneration` share."""

    config: BamoeEncoderDecoderConfig
    config_class = BamoeEncoderDecoderConfig

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers, the decoder's embeddings too if they are not tied."""
        embeddings: nn.Module = super().resize_token_embeddings(*args, **kwargs)
        if not self.config.tie_word_embeddings:
            self.get_decoder().resize_token_embeddings(*args, **kwargs)
        return embeddings


class BamoeEncoderDecoderModel(BamoeEncoderDecoderPreTrainedModel):
    """Encoder and decoder."""

    # The rest is gathered once: embeddings may be one table on both sides.
    _fsdp_plan = {"encoder.layers.*": "free_full_weight", "decoder.layers.*": "free_full_weight"}  # noqa: RUF012
    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BamoeEncoderDecoderConfig):
        super().__init__(config)
        self.warn_of_task_blind_routers()
        self.encoder = TransformerEncoder(config)
        self.decoder = TransformerDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> ScaledEmbedding:
        """The encoder's embeddings, which are the decoder's too if tied."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: ScaledEmbedding) -> None:
        """Replace the encoder's embeddings, and the decoder's if tied."""
        self.encoder.embed_tokens = value
        if self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> BamoeSeq2SeqModelOutput:
        """Decode decoder_input_ids (B, T) given the source input_ids (B, S), or `encoder_outputs` made of it.

        `attention_mask` (B, S) and `decoder_attention_mask` (B, T) are 0 at padding. The encoder's router logits are
        those of its run, or those that `encoder_outputs` holds of the same tokens.
        """
        encoder_router_logits = None
        if encoder_outputs is None:
            encoded = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_router_logits=output_router_logits,
                **kwargs,
            )
            encoder_router_logits = encoded.attention_router_logits
        elif isinstance(encoder_outputs, BaseModelOutput):
            encoded = encoder_outputs
            given = getattr(encoded, "attention_router_logits", None)
            # Beam search repeats hidden states for its beams, and router logits not.
            if given and len(given[0]) == encoded.last_hidden_state.shape[:-1].numel():
                encoder_router_logits = given
        else:
            encoded = BaseModelOutput(last_hidden_state=encoder_outputs[0])
        outputs = self.decoder(
            encoder_hidden_states=encoded.last_hidden_state,
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        return BamoeSeq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            encoder_attention_router_logits=encoder_router_logits,
            decoder_attention_router_logits=outputs.attention_router_logits,
            cross_attention_router_logits=outputs.cross_attention_router_logits,
        )


class BamoeForConditionalGeneration(RouterLossMixin, BamoeEncoderDecoderPreTrainedModel, GenerationMixin):
    """`BamoeEncoderDecoderModel` with a language-model head; adds the router losses to the loss while training."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BamoeEncoderDecoderConfig):
        super().__init__(config)
        self.model = BamoeEncoderDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> BamoeSeq2SeqLMOutput:
        """Predict the target tokens that follow decoder_input_ids (B, T); with `labels` (B, T), -100 at padding, the
        loss too, and decoder_input_ids are the labels shifted right unless they are given.

        While training, the loss is label-smoothed cross-entropy + router_aux_loss_coef · load balance +
        router_z_loss_coef · z, the latter two without padding: what `attention_mask` calls so of the source, and of
        the target `decoder_attention_mask`, or else labels of -100. In evaluation mode it is the cross-entropy alone.
        With `encoder_outputs` the encoder's routers have losses only if it holds their logits, as the encoder gives
        them with `output_router_logits=True`; a tuple, or hidden states alone, adds none.

        Raises:
            ValueError: labels that cannot be shifted for want of a padding or start token; or training a router whose
                gate is always 1 (top-1, renormalised): the task cannot train it.
        """
        training = self.trains_with(labels)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache if labels is None else False,
            output_router_logits=output_router_logits or training,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)

        loss, losses = None, None
        if training or output_router_logits:
            target_mask = self._target_mask(decoder_attention_mask, labels, decoder_input_ids, logits.shape[1])
            group = self.loss_group() if training else None
            source_mask = real_tokens(attention_mask, outputs.encoder_last_hidden_state.shape[1])
            losses = self._router_losses(outputs, source_mask, target_mask, group)
        if labels is not None:
            num_items = kwargs.get("num_items_in_batch")
            smoothing = self.config.label_smoothing if training else 0.0
            loss = cross_entropy(logits, labels, num_items, smoothing)
            if training and losses is not None:
                loss = self.add_router_losses(loss, losses, labels, num_items)
        return BamoeSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            aux_loss=None if losses is None else losses.load_balance,
            z_loss=None if losses is None else losses.z,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            encoder_attention_router_logits=outputs.encoder_attention_router_logits if output_router_logits else None,
            decoder_attention_router_logits=outputs.decoder_attention_router_logits if output_router_logits else None,
            cross_attention_router_logits=outputs.cross_attention_router_logits if output_router_logits else None,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) shifted right behind the start token, -100 replaced by padding.

        Raises:
            ValueError: the config has no pad_token_id, or neither decoder_start_token_id nor bos_token_id.
        """
        config = self.config
        start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
        if start is None or config.pad_token_id is None:
            raise ValueError(
                "labels are shifted right behind decoder_start_token_id (or bos_token_id) and padded with pad_token_id;"
                f" the config has {config.decoder_start_token_id}, {config.bos_token_id} and {config.pad_token_id}"
            )
        shifted = labels.roll(1, dims=-1)
        shifted[:, 0] = start
        return shifted.masked_fill(shifted == -100, config.pad_token_id)

    def _prepare_static_cache(self, *args: Any, max_cache_len: int, **kwargs: Any) -> Cache:
        # Here, before transformers remembers the length: later caches are at least as long.
        self.config.refuse_longer(max_cache_len)
        cache: Cache = super()._prepare_static_cache(*args, max_cache_len=max_cache_len, **kwargs)
        return cache

    def _target_mask(
        self,
        decoder_attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        decoder_input_ids: torch.Tensor | None,
        length: int,
    ) -> torch.Tensor | None:
        """Target tokens (B, T) that count in the router losses; None for all."""
        if decoder_attention_mask is not None:
            return real_tokens(decoder_attention_mask, length)
        if labels is not None:  # where the last token is read but nothing follows, only padding made room for it
            return labels != -100
        if decoder_input_ids is None or self.config.pad_token_id is None:
            return None
        padding = decoder_input_ids == self.config.pad_token_id
        padding[:, 0] = False  # some start with it
        return ~padding

    def _router_losses(
        self,
        outputs: BamoeSeq2SeqModelOutput,
        source_mask: torch.Tensor | None,
        target_mask: torch.Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> RouterLosses | None:
        """Losses of every router that selects experts: encoder, decoder and cross-attention together."""
        top_k = self.config.num_attention_experts_per_tok
        if top_k is None:
            return None
        routers = [
            (outputs.encoder_attention_router_logits, source_mask),
            (outputs.decoder_attention_router_logits, target_mask),
            (outputs.cross_attention_router_logits, target_mask),
        ]
        return sum_router_losses([router_losses(logits, top_k, mask, group) for logits, mask in routers if logits])


BamoeEncoderDecoderConfig.register_for_auto_class()
BamoeEncoderDecoderModel.register_for_auto_class("AutoModel")
BamoeForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")

__all__ = ["BamoeEncoderDecoderModel", "BamoeForConditionalGeneration"]
