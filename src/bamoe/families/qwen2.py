"""Qwen2 and Qwen2.5: biases on queries, keys and values but not on the output; some layers may slide."""

from __future__ import annotations

from bamoe.families.family import DenseFamily

QWEN2 = DenseFamily(
    model_type="qwen2",
    projection_bias=lambda config: True,
    sliding=lambda config: (config.sliding_window, list(config.layer_types)),
)
