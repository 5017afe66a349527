"""The configuration of an encoder-decoder with mixtures of attention heads (MoA, section 4.1)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .configuration_checks import POSITIVE_INTEGER, SHARE, TOKEN, Check, one_of
from .configuration_transformer import TransformerMixtureConfig


class BamoeEncoderDecoderConfig(TransformerMixtureConfig):
    r"""Configuration of `BamoeEncoderDecoderModel` and `BamoeForConditionalGeneration`; the other fields are described
    at `TransformerMixtureConfig`, those of the mixture of attention at `AttentionExpertsConfig`.

        num_decoder_layers: layers of the decoder, whose self-attention and cross-attention are mixtures both.
        decoder_start_token_id: what the decoder reads first; None is bos_token_id.
        label_smoothing: share of the target probability that goes to all tokens alike, in the training loss.
            (`Trainer`'s own takes the labels away from the model, and the router losses with them.)
    """

    model_type = "bamoe_encoder_decoder"
    keys_to_ignore_at_inference = [  # noqa: RUF012
        *("past_key_values", "encoder_attention_router_logits"),
        *("decoder_attention_router_logits", "cross_attention_router_logits"),
    ]
    default_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_bamoe_encoder_decoder.BamoeEncoderDecoderConfig",
        "AutoModel": "modeling_bamoe_encoder_decoder.BamoeEncoderDecoderModel",
        "AutoModelForSeq2SeqLM": "modeling_bamoe_encoder_decoder.BamoeForConditionalGeneration",
    }
    checks: ClassVar[Mapping[str, Check]] = {
        **TransformerMixtureConfig.checks,
        "num_decoder_layers": POSITIVE_INTEGER,
        "is_encoder_decoder": one_of(True),
        "decoder_start_token_id": TOKEN,
        "label_smoothing": SHARE,
    }
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}  # the model's own: its layers are in two stacks

    num_decoder_layers: int = 6
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = None
    label_smoothing: float = 0.0

    @property
    def task_blind_routers(self) -> tuple[str, ...]:
        """Routers whose gates have no gradient from the task."""
        return ("self_attn.gate", "encoder_attn.gate") if self.task_blind_attention else ()

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """As in transformers: with `decoder`, a copy that counts the decoder's layers, by which caches are sized."""
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        if decoder and not encoder:
            config.num_hidden_layers = self.num_decoder_layers
        return config

    def _validate(self) -> None:
        super()._validate()
        for name in ("decoder_start_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} {token} is not among the {self.vocab_size} tokens")


__all__ = ["BamoeEncoderDecoderConfig"]
