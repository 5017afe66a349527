"""What an experiment may start from: a tokenizer learnt from the corpora, and a small Llama with random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bamoe.data.corpora import Corpus, read_documents

if TYPE_CHECKING:
    from transformers import LlamaConfig

_END_OF_TEXT = "<|endoftext|>"
_TOKENIZER_CHARACTERS = 1_000_000


def llama_config(architecture: Mapping[str, Any], sequence_length: int, end: int | None = None) -> LlamaConfig:
    """The config of a Llama with the widths and depth of `architecture`; `end` is the id that separates documents."""
    from transformers import LlamaConfig

    heads = architecture["num_attention_heads"]
    return LlamaConfig(
        **{key: value for key, value in architecture.items() if key != "num_key_value_heads"},
        num_key_value_heads=architecture.get("num_key_value_heads") or heads,
        max_position_embeddings=sequence_length,
        tie_word_embeddings=False,
        bos_token_id=end,
        eos_token_id=end,
    )


def write_untrained(
    corpora: Mapping[str, Mapping[str, str]],
    shares: Mapping[str, float],
    out: Path,
    architecture: Mapping[str, Any],
    *,
    sequence_length: int,
    seed: int,
) -> dict[str, Any]:
    """Write an untrained checkpoint with its tokenizer to `out`; returns its number of parameters.

    corpora: each domain's training text, as the fields of a `Corpus`.
    shares: of each domain in the text that the byte-level BPE is learnt from.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=architecture["vocab_size"],
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(_mixed_text(corpora, shares), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END_OF_TEXT, model_max_length=sequence_length
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(architecture, sequence_length, wrapped.eos_token_id))
    model.save_pretrained(out)
    wrapped.save_pretrained(out)
    return {"parameters": model.num_parameters()}


def _mixed_text(corpora: Mapping[str, Mapping[str, str]], shares: Mapping[str, float]) -> Iterator[str]:
    whole = sum(shares.values())
    for domain, share in shares.items():
        left = share / whole * _TOKENIZER_CHARACTERS
        for document in read_documents(Corpus(**corpora[domain])):
            yield document["text"][: int(left)]
            left -= len(document["text"])
            if left <= 0:
                break
