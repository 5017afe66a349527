"""How the encoder-decoder of MoA generates: caches, their limits, greedy and beam search."""

import itertools

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from bamoe.modeling import BamoeForConditionalGeneration
from tests.modeling.conftest import random_tokens
from tests.modeling.moa_models import DENSE, translator
from tests.modeling.test_encoder_decoder import padded_source

ENDLESS = {"eos_token_id": None}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_past_the_positions_is_refused(cache):
    model, source = translator(), padded_source()
    settings = {"do_sample": False, "cache_implementation": cache, **ENDLESS}
    with pytest.raises(ValueError, match=r"65 tokens is longer than max_position_embeddings \(64\)"):
        model.generate(**source, max_new_tokens=65, **settings)
    assert model.generate(**source, max_new_tokens=64, **settings).shape == (2, 65)  # the last one is not read


def test_a_cache_longer_than_the_positions_is_refused():
    model = translator()
    cache = EncoderDecoderCache(*(StaticCache(config=model.config, max_cache_len=length) for length in (65, 9)))
    with pytest.raises(ValueError, match="65 tokens is longer"):
        model(**padded_source(), decoder_input_ids=random_tokens(2, 3), past_key_values=cache)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("changes", [{}, {"attention_key_value": "experts"}, DENSE], ids=["MoA", "KV experts", "dense"])
def test_greedy_decoding_from_the_cache_is_the_whole_forward(cache, changes):
    model, source = translator(**changes), padded_source()
    generated = model.generate(
        **source,
        max_new_tokens=6,
        do_sample=False,
        cache_implementation=cache,
        output_logits=True,
        return_dict_in_generate=True,
        **ENDLESS,
    )
    whole = model(**source, decoder_input_ids=generated.sequences[:, :-1], use_cache=False).logits
    assert torch.allclose(torch.stack(generated.logits, dim=1), whole, atol=1e-5)
    assert torch.equal(generated.sequences[:, 1:], whole.argmax(-1))


def test_decoding_in_pieces_keeps_the_caches_of_one_expert():
    model, source, target = translator(), padded_source(), random_tokens(2, 7)
    whole = model(**source, decoder_input_ids=target)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first = model(**source, decoder_input_ids=target[:, :4], past_key_values=cache)
    rest = model(
        attention_mask=source["attention_mask"],
        encoder_outputs=(first.encoder_last_hidden_state,),
        decoder_input_ids=target[:, 4:],
        past_key_values=cache,
    )
    logits = torch.cat([first.logits, rest.logits], dim=1)
    assert torch.allclose(logits, whole.logits, atol=1e-5)
    shapes = {
        (each.layers[i].keys.shape, each.layers[i].values.shape)
        for each in (cache.self_attention_cache, cache.cross_attention_cache)
        for i in range(3)
    }
    assert shapes == {((2, 1, 7, 8),) * 2, ((2, 1, 9, 8),) * 2}  # one head of 8, whatever E and k are


def log_probability(model, source, tokens: torch.Tensor) -> torch.Tensor:
    """Of each token of `tokens` (N, T) after the start token, by a forward pass of the whole."""
    given = {name: value.expand(len(tokens), -1) for name, value in source.items()}
    logits = model(**given, decoder_input_ids=tokens[:, :-1], use_cache=False).logits
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_sequences():
    model = translator(vocab_size=6)
    source = {"input_ids": random_tokens(1, 5, vocab_size=6)}
    every = torch.tensor([[2, *tokens] for tokens in itertools.product(range(6), repeat=3)])
    scores = log_probability(model, source, every).sum(-1)
    best = model.generate(
        **source,
        num_beams=36,
        max_new_tokens=3,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **ENDLESS,
    )
    assert torch.equal(best.sequences[0], every[scores.argmax()])
    assert best.sequences_scores[0].item() == pytest.approx(scores.max().item() / 3, rel=1e-4)


def test_beam_scores_are_those_of_the_whole_forward():
    model, source = translator(), padded_source()
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "do_sample": False}
    end = int(model.generate(**source, **settings, **ENDLESS)[0, 3])  # so that some beams end early
    output = model.generate(
        **source,
        **settings,
        eos_token_id=end,
        length_penalty=0.6,
        output_scores=True,
        return_dict_in_generate=True,
    )
    lengths = set()
    for row, (tokens, score) in enumerate(zip(output.sequences, output.sequences_scores, strict=True)):
        sentence = {name: value[row // 3][None] for name, value in source.items()}
        ends = (tokens == end).nonzero()
        length = int(ends[0]) if len(ends) else len(tokens) - 1
        total = log_probability(model, sentence, tokens[None, : length + 1]).sum()
        assert score.item() == pytest.approx(total.item() / length**0.6, rel=1e-4)
        lengths.add(length)
    assert len(lengths) > 1


def test_beam_search_with_router_logits_on_request():
    model, source = translator(output_router_logits=True), padded_source()
    expected = translator_like(model, output_router_logits=False).generate(**source, num_beams=2, max_new_tokens=4)
    assert torch.equal(model.generate(**source, num_beams=2, max_new_tokens=4), expected)


def translator_like(model: BamoeForConditionalGeneration, **changes) -> BamoeForConditionalGeneration:
    """The same weights under a changed config."""
    other = translator(**changes)
    other.load_state_dict(model.state_dict())
    return other
