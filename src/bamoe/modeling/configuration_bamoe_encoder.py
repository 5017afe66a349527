"""The configuration of a masked language model with mixtures of attention heads (MoA, section 4.2)."""

from typing import ClassVar

from .configuration_transformer import TransformerMixtureConfig


class BamoeEncoderConfig(TransformerMixtureConfig):
    r"""Configuration of `BamoeEncoderModel` and `BamoeForMaskedLM`; the fields are described at
    `TransformerMixtureConfig`, those of the mixture of attention at `AttentionExpertsConfig`."""

    model_type = "bamoe_encoder"
    keys_to_ignore_at_inference = ["attention_router_logits"]  # noqa: RUF012
    default_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_bamoe_encoder.BamoeEncoderConfig",
        "AutoModel": "modeling_bamoe_encoder.BamoeEncoderModel",
        "AutoModelForMaskedLM": "modeling_bamoe_encoder.BamoeForMaskedLM",
    }

    num_hidden_layers: int = 8


__all__ = ["BamoeEncoderConfig"]
