"""Mistral: Llama's block; when a sliding window is set, every layer uses it."""

from __future__ import annotations

from bamoe.families.family import DenseFamily

# BamoeConfig reads a window without layer_types as "in every layer".
MISTRAL = DenseFamily(model_type="mistral", sliding=lambda config: (config.sliding_window, None))
