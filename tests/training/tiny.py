"""Tiny models with a tokenizer, saved as directories, for tests of training and evaluation."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bamoe.modeling.configuration_bamoe import BamoeConfig
from bamoe.modeling.modeling_bamoe import BamoeForCausalLM

VOCABULARY = 300

WORDS = {
    "sea": "the tide carried the boat over the bar, and the gulls cried above the harbour mouth",
    "code": "def total(values): return sum(value * weight for value, weight in values if weight > 0)",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens with an EOS, id 0."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_tokenizer_json()), eos_token="<eos>")


@cache
def _tokenizer_json() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(WORDS.values(), trainer)
    return backend.to_str()


def dense(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A two-layer Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": None,
            "eos_token_id": 0,
        }
        | changes
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def mixture(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A two-layer BAM with three feed-forward and three attention experts."""
    torch.manual_seed(seed)
    config = BamoeConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "num_key_value_heads": 6,
            "max_position_embeddings": 64,
            "num_experts": 3,
            "num_attention_experts": 3,
            "eos_token_id": 0,
        }
        | changes
    )
    BamoeForCausalLM(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def corpus(path: Path, name: str, documents: int = 40) -> Path:
    """JSON lines, plain or .gz, of documents of different lengths on one subject."""
    words = WORDS[name].split()
    lines = [
        json.dumps({"text": " ".join(words[(3 * i + j * j) % len(words)] for j in range(5 + i % 11))})
        for i in range(documents)
    ]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def run_config(directory: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A run of 10 steps of 4 blocks over two corpora written below `directory`."""
    return {
        "model": str(model),
        "output": str(directory / "run"),
        "data": [
            {"name": "code", "path": str(corpus(directory / "code.jsonl.gz", "code")), "weight": 0.75},
            {"name": "sea", "path": str(corpus(directory / "sea.jsonl", "sea")), "weight": 0.25},
        ],
        "sequence_length": 16,
        "tokens": 640,
        "batch_tokens": 64,
        "learning_rate": 1e-2,
        "schedule": {"warmup_tokens": 128, "decay": "cosine", "final": 0.1},
        "log_every_steps": 1,
    } | changes
