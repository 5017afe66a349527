"""Qwen3: RMS norms on queries and keys (one vector for all heads), optional biases on all four projections."""

from __future__ import annotations

from bamoe.families.family import DenseFamily

QWEN3 = DenseFamily(
    model_type="qwen3",
    projection_bias=lambda config: bool(config.attention_bias),
    output_bias=lambda config: bool(config.attention_bias),
    qk_norm=lambda config: "expert",
    sliding=lambda config: (config.sliding_window, list(config.layer_types)),
)
