"""Load and information of attention routers against counts made one token at a time, padding left out."""

import math
from collections import Counter, defaultdict

import pytest
import torch

from bamoe.evaluation.attention_heads import attention_heads
from bamoe.evaluation.specialization import MIN_COUNT
from bamoe.modeling import (
    BamoeEncoderConfig,
    BamoeEncoderDecoderConfig,
    BamoeForConditionalGeneration,
    BamoeForMaskedLM,
)
from tests.training.tiny import tokenizer

VOCABULARY, EXPERTS, SELECTED, LAYERS = 40, 5, 2, 2
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "head_dim": 8,
    "num_attention_heads": EXPERTS, "num_attention_experts": EXPERTS, "num_attention_experts_per_tok": SELECTED,
    "initializer_range": 0.5, "router_initializer_range": None, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def sentences(count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Random tokens, few of them frequent, of random lengths."""
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [(3 + 36 * torch.rand(length, generator=generator).square()).long() for length in lengths]


def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def check(model, batches, kind, logits_name, tokens_of):
    """`tokens_of(batch)`: for each sentence, the row of its tokens in the batch, without padding."""
    found = attention_heads(model, batches, tokenizer())
    pairs: list[Counter] = [Counter() for _ in range(LAYERS)]
    seen: Counter = Counter()
    for batch in batches:
        with torch.no_grad():
            logits = getattr(model(**batch, output_router_logits=True), logits_name)
        ids, real = tokens_of(batch)
        for row, column in real.nonzero().tolist():
            token = int(ids[row, column])
            seen[token] += 1
            for layer in range(LAYERS):
                scores = logits[layer].view(*ids.shape, EXPERTS)[row, column].tolist()
                for expert in sorted(range(EXPERTS), key=lambda expert: -scores[expert])[:SELECTED]:
                    pairs[layer][token, expert] += 1
    total = sum(seen.values())
    frequent = {token for token, count in seen.items() if count >= MIN_COUNT}
    assert 0 < len(frequent) < len(seen)
    for layer in range(LAYERS):
        load = [sum(n for (_, chosen), n in pairs[layer].items() if chosen == e) / SELECTED / total
                for e in range(EXPERTS)]  # fmt: skip
        assert found.routing[kind][layer].load == pytest.approx(load, abs=1e-6)
        assert sum(found.routing[kind][layer].gate) == pytest.approx(1, abs=1e-6)
        among = {pair: n for pair, n in pairs[layer].items() if pair[0] in frequent}
        weight = sum(among.values())
        rows, columns = defaultdict(float), defaultdict(float)
        for (token, expert), n in among.items():
            rows[token] += n / weight
            columns[expert] += n / weight
        information = sum(n / weight * math.log(n / weight / rows[t] / columns[e]) for (t, e), n in among.items())
        layer_found = found.specialization[kind][layer]
        assert layer_found.token_information == pytest.approx(information, abs=1e-6)
        for expert, listed in enumerate(layer_found.tokens):
            for affinity in listed:
                share = pairs[layer][affinity.token, expert] / SELECTED / seen[affinity.token]
                assert affinity.pmi == pytest.approx(math.log(share / load[expert]), abs=1e-6)
                assert affinity.count == seen[affinity.token]
    return found


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_masked_language_model(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model = BamoeForMaskedLM(BamoeEncoderConfig(**COMMON)).eval()
    batches = []
    for _ in range(3):
        rows = sentences(12, generator)
        batches.append({"input_ids": padded(rows, 0), "attention_mask": padded([torch.ones_like(r) for r in rows], 0)})
    found = check(model, batches, "attention", "attention_router_logits",
                  lambda batch: (batch["input_ids"], batch["attention_mask"] == 1))  # fmt: skip
    assert list(found.routing) == ["attention"]
    whole = [{"input_ids": batch["input_ids"]} for batch in batches]  # without a mask every position is a token
    check(model, whole, "attention", "attention_router_logits",
          lambda batch: (batch["input_ids"], torch.ones_like(batch["input_ids"]) == 1))  # fmt: skip


def test_encoder_decoder(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model = BamoeForConditionalGeneration(BamoeEncoderDecoderConfig(num_decoder_layers=LAYERS, **COMMON)).eval()
    batches = []
    for _ in range(3):
        source, target = sentences(12, generator), sentences(12, generator)
        labels = padded(target, -100)
        batches.append({
            "input_ids": padded(source, 0), "attention_mask": padded([torch.ones_like(r) for r in source], 0),
            "labels": labels, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels),
        })  # fmt: skip
    for kind, name, ids, marks, padding in (
        ("encoder", "encoder_attention_router_logits", "input_ids", "attention_mask", 0),
        ("decoder", "decoder_attention_router_logits", "decoder_input_ids", "labels", -100),
        ("cross", "cross_attention_router_logits", "decoder_input_ids", "labels", -100),
    ):

        def tokens_of(batch, ids=ids, marks=marks, padding=padding):
            return batch[ids], batch[marks] != padding

        found = check(model, batches, kind, name, tokens_of)
        assert set(found.routing) == set(found.specialization) == {"encoder", "decoder", "cross"}


def test_the_mode_of_the_model_stays_and_a_dense_one_has_nothing() -> None:
    dense = COMMON | {"num_attention_experts": 1, "num_attention_heads": 2, "num_attention_experts_per_tok": None}
    model = BamoeForMaskedLM(BamoeEncoderConfig(attention_routing="soft", **dense)).train()
    found = attention_heads(model, [{"input_ids": torch.randint(3, VOCABULARY, (2, 5))}], tokenizer())
    assert (found.routing, found.specialization) == ({}, {})
    assert model.training
