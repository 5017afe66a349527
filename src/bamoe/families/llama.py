"""Llama 1 to 3: sequential blocks, RMS norms, half-split rotary pairs."""

from __future__ import annotations

from bamoe.families.family import Config, DenseFamily


def _refusals(config: Config) -> list[str]:
    return ["mlp_bias true: feed-forward experts have no biases"] if config.mlp_bias else []


LLAMA = DenseFamily(
    model_type="llama",
    projection_bias=lambda config: bool(config.attention_bias),
    output_bias=lambda config: bool(config.attention_bias),
    extra_refusals=_refusals,
)
