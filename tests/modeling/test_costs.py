"""The paper's counts, and the closed forms against models built on the meta device."""

import itertools

import pytest
import torch

from bamoe.modeling import BamoeConfig, BamoeForCausalLM
from bamoe.modeling.costs import count_parameters, flops_per_token, kv_cache_bytes_per_token
from tests.modeling.conftest import random_tokens, tiny_config


def paper_small(attention_experts: int, key_value: str, experts: int = 4, top_k: int = 1) -> BamoeConfig:
    """BAM's 590M model (arXiv 2408.08274): its FFN dimension counts gate and up, so the inner size is 2048."""
    return BamoeConfig(
        vocab_size=256_000,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8 * attention_experts,
        num_key_value_heads=8 * (attention_experts if key_value == "experts" else 1),
        head_dim=128,
        num_attention_experts=attention_experts,
        attention_key_value=key_value,
        num_experts=experts,
        num_experts_per_tok=top_k,
        use_parallel_block=True,
    )


def parameters_on_meta(config: BamoeConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in BamoeForCausalLM(config).parameters())


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (paper_small(1, "experts"), 700_480_512),
        (paper_small(4, "shared"), 738_253_824),
        (paper_small(4, "experts"), 776_002_560),
    ],
    ids=["BTX", "BAM KV sharing", "BAM KV experts"],
)
def test_parameter_counts_of_the_paper(config, total):
    assert parameters_on_meta(config) == total
    assert count_parameters(config).total == total


def test_dense_seed_of_the_paper():
    assert parameters_on_meta(paper_small(1, "experts", experts=1)) == 587_209_728


@pytest.mark.parametrize(
    ("config", "mega_flops"),
    [
        (paper_small(4, "experts"), 48.26),
        (paper_small(1, "experts"), 21.51),
        (paper_small(1, "experts", experts=6, top_k=3), 46.69),
    ],
    ids=["BAM", "BTX-4", "BTX-6 top-3"],
)
def test_flops_per_layer_of_the_paper(config, mega_flops):
    flops = flops_per_token(config, context_length=256)
    assert (flops.attention + flops.feed_forward) / 6e6 == pytest.approx(mega_flops, rel=1e-3)


def test_flops_split_of_the_paper():
    flops = flops_per_token(paper_small(4, "experts"), context_length=256)
    assert flops.attention / 6e6 == pytest.approx(35.65, rel=1e-3)
    assert flops.feed_forward / 6e6 == pytest.approx(12.59, rel=1e-3)
    assert flops.head == 2 * 1024 * 256_000


@pytest.mark.parametrize(
    ("key_value", "qk_norm", "parallel", "tied", "biases"),
    list(
        itertools.product(("experts", "shared"), (None, "expert", "head"), (True, False), (True, False), (True, False))
    ),
)
def test_closed_form_counts_every_parameter(key_value, qk_norm, parallel, tied, biases):
    config = tiny_config(
        key_value,
        qk_norm=qk_norm,
        use_parallel_block=parallel,
        tie_word_embeddings=tied,
        attention_bias=biases,
        attention_output_bias=biases,
    )
    assert count_parameters(config).total == parameters_on_meta(config)


@pytest.mark.parametrize("key_value", ["experts", "shared"])
@pytest.mark.parametrize("window", [None, 5])
def test_flops_agree_with_the_profiler(key_value, window):
    """torch counts the products really run: all of the attention core, so twice the causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(key_value, sliding_window=window, attn_implementation="eager", experts_implementation="eager")
    length = 24
    with FlopCounterMode(display=False) as counter:
        BamoeForCausalLM(config).eval()(random_tokens(1, length))
    flops = flops_per_token(config, length)
    core = 2 * 2 * 2 * config.num_attention_heads * config.head_dim * (length / 2)
    attended = length / 2 if window is None else window - window**2 / (2 * length)
    expected = flops.total + 2 * core - core * attended / (length / 2)
    assert counter.get_total_flops() / length == pytest.approx(
        expected, rel=2e-4
    )  # transformers 5.17 rotates by a small product


def test_active_parameters_leave_out_what_is_not_selected():
    config = tiny_config(num_experts_per_tok=1, attention_routing="top_k", num_attention_experts_per_tok=1)
    counts = count_parameters(config)
    idle_feed_forward = 2 * 3 * 32 * 48
    idle_query_output = 2 * 2 * 32 * 32
    assert counts.total - counts.active == 2 * (idle_feed_forward + idle_query_output)


def test_cache_bytes_are_those_of_a_real_cache():
    for key_value in ("experts", "shared"):
        config = tiny_config(key_value)
        cache = BamoeForCausalLM(config).eval()(random_tokens(1, 10), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == 10 * kv_cache_bytes_per_token(config, bytes_per_value=4)
