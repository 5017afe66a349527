"""Tiny dense models of every supported family, made and saved by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Every family, with each switch that adds, removes or shares tensors.
VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 8, "tie_word_embeddings": True, "head_dim": 12}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    ("cohere", {}),
    ("cohere", {"use_qk_norm": True, "attention_bias": True, "num_key_value_heads": 1}),
    ("cohere", {"use_qk_norm": True, "tie_word_embeddings": False}),
]


def variant_name(variant: tuple[str, dict[str, Any]]) -> str:
    return "-".join([variant[0], *(f"{key}={value}" for key, value in variant[1].items())])


def dense_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model whose every tensor is random, norms and biases too, so that a mixed-up one shows."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(TINY | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def save_dense(directory: Path, model_type: str = "llama", seed: int = 0, shards: str = "5GB", **changes: Any) -> Path:
    """Save a tiny model with a tokenizer in a new directory."""
    dense_model(model_type, seed, **changes).save_pretrained(directory, max_shard_size=shards)
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
