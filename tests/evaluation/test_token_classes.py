"""Classes of tokens in vocabularies of every kind, and the routing of each class against a count by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from bamoe.checkpoints.loading import load_model
from bamoe.evaluation import TOKEN_CLASSES, evaluate
from bamoe.evaluation.token_classes import token_classes
from tests.evaluation.test_routing import zero_computation
from tests.training.tiny import corpus, tokenizer


def wrapped(vocabulary: list[str], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(vocabulary)}, merges=[]))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=vocabulary[0])


def classes(wrapped: PreTrainedTokenizerFast, size: int) -> list[str]:
    return [TOKEN_CLASSES[index] for index in token_classes(wrapped, size)]


def test_byte_level_bpe() -> None:
    # Ġ is a space, Ċ a line break, Ã the first byte of é.
    vocabulary = ["<eos>", "\u0120the", "ing",
                  "\u010a", "\u0120", "\u0120\u0120", "42", "\u01207", "(", "\u0120=", "3rd",
                  "\u00c3", "\u00c3\u00a9", "\u0120\u00c3\u00a9t"]  # fmt: skip
    assert classes(wrapped(vocabulary, decoders.ByteLevel()), len(vocabulary) + 2) == [
        "special", "word start", "word continuation", "white space", "white space", "white space", "number", "number",
        "punctuation", "punctuation", "word continuation", "part of a character", "word continuation", "word start",
        "special", "special",  # rows of the embeddings that no token has
    ]  # fmt: skip


def test_sentencepiece_with_bytes() -> None:
    vocabulary = ["</s>", "\u2581the", "ing", "\u2581", "<0x0A>", "<0xC3>", "\u25817", "7", "\u2581(", ".", "\u2581été"]
    decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert classes(wrapped(vocabulary, decoder), len(vocabulary)) == [
        "special", "word start", "word continuation", "white space", "white space", "part of a character", "number",
        "number", "punctuation", "punctuation", "word start",
    ]  # fmt: skip


def test_word_pieces_are_marked_where_they_continue() -> None:
    vocabulary = ["[SEP]", "the", "##ing", "7", "##7", "."]
    assert classes(wrapped(vocabulary, decoders.WordPiece()), len(vocabulary)) == [
        "special", "word start", "word continuation", "number", "number", "punctuation",
    ]  # fmt: skip


def test_routing_by_class_is_that_of_the_tokens_counted_one_by_one(tmp_path: Path) -> None:
    directory = zero_computation(tmp_path / "model")
    data = {name: corpus(tmp_path / f"{name}.jsonl", name, documents=6) for name in ("sea", "code")}
    result = evaluate(directory, data, sequence_length=16, batch_tokens=48, specialization=True)
    assert result.token_classes is not None
    model, names = load_model(directory), classes(tokenizer(), 300)
    tokens: Counter[str] = Counter()
    load: dict[str, torch.Tensor] = {}
    for path in data.values():
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        ids = [token for text in texts for token in [*tokenizer()(text)["input_ids"], 0]]
        for start in range(0, len(ids) - 1, 16):
            block = ids[start : min(start + 16, len(ids) - 1)]
            with torch.no_grad():
                logits = model(torch.tensor([block]), output_router_logits=True).router_logits
            for position, token in enumerate(block):
                tokens[names[token]] += 1
                for number, layer in enumerate(logits):
                    table = load.setdefault(names[token], torch.zeros(2, 6))
                    table[number, layer[position].topk(2).indices] += 0.5
    found = result.token_classes["feed_forward"]
    assert {name: each.tokens for name, each in found.items()} == dict(tokens)
    assert len(found) >= 4
    for name, each in found.items():
        expected = load[name] / tokens[name]
        torch.testing.assert_close(torch.tensor(each.load), expected)
        assert each.experts_per_token == pytest.approx((2 * expected[:, :3].sum(-1)).tolist())
    for each in result.token_classes["attention"].values():
        assert each.experts_per_token == [3, 3]  # soft: all of them
    assert result.to_dict()["token_classes"]["feed_forward"]["special"]["tokens"] == tokens["special"]
    assert "token_classes" not in evaluate(directory, data, sequence_length=16).to_dict()
