"""What the demo starts from: a tokenizer learnt from the corpora, and a small Llama with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_END_OF_TEXT = "<|endoftext|>"
_TOKENIZER_CHARACTERS = 1_000_000


def write_untrained(
    data: Path,
    shares: dict[str, float],
    out: Path,
    *,
    vocab_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    sequence_length: int,
    seed: int,
) -> dict[str, Any]:
    """Write an untrained checkpoint with its tokenizer to `out`; returns its number of parameters.

    shares: of each domain's training text in the text that the byte-level BPE is learnt from.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(_mixed_text(data, shares), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END_OF_TEXT, model_max_length=sequence_length
    )
    torch.manual_seed(seed)
    end = wrapped.eos_token_id
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            max_position_embeddings=sequence_length,
            tie_word_embeddings=False,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    model.save_pretrained(out)
    wrapped.save_pretrained(out)
    return {"parameters": model.num_parameters()}


def _mixed_text(data: Path, shares: dict[str, float]) -> Iterator[str]:
    for domain, share in shares.items():
        left = share * _TOKENIZER_CHARACTERS
        with (data / f"{domain}.train.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                yield text[: int(left)]
                left -= len(text)
                if left <= 0:
                    break
