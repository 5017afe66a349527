"""Attention experts and feed-forward experts of every kind together, in one model each.

Soft or top-k attention, with keys and values of its own or shared, beside plain experts or MoE++'s.
"""

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from bamoe.modeling import BamoeForCausalLM
from tests.modeling.conftest import random_tokens, tiny_config, tiny_model
from tests.modeling.naive import assert_same, naive_logits
from tests.modeling.stranger import run_without_bamoe

ATTENTION: dict[str, dict[str, Any]] = {
    "soft": {},
    "top-k": {"attention_routing": "top_k", "num_attention_experts_per_tok": 2},
}
FEED_FORWARD: dict[str, dict[str, Any]] = {
    "one": {"num_experts": 1, "num_experts_per_tok": 1},
    "plain": {"num_experts": 3, "num_experts_per_tok": 2},
    "moe++": {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2},
    "moe++ as released": {
        "num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2, "feed_forward_router": "tanh_mlp",
        "norm_topk_prob": True, "drop_zero_gates": True, "expert_input_scale": 2.0,
    },
}  # fmt: skip
GRID = list(itertools.product(ATTENTION, ("experts", "shared"), FEED_FORWARD))


def combined(attention: str, key_value: str, feed_forward: str) -> BamoeForCausalLM:
    """A model of one cell of the grid, every parameter random."""
    config = tiny_config(
        key_value, 4, use_parallel_block=feed_forward == "plain", **ATTENTION[attention], **FEED_FORWARD[feed_forward]
    )
    model = tiny_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "residual_weight" in name:  # zero at the start
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(params=GRID, ids=["-".join(case) for case in GRID])
def model(request):
    return combined(*request.param)


def test_forward_and_gradients_equal_the_loops(model):
    tokens = random_tokens(2, 5)
    assert_same(model(tokens).logits, naive_logits(model, tokens), dict(model.named_parameters()))


def test_decoding_from_a_cache_equals_the_full_forward(model):
    tokens, past = random_tokens(2, 9), DynamicCache()
    with torch.no_grad():
        full = model(tokens).logits
        pieces = [
            model(tokens[:, a:b], past_key_values=past, use_cache=True).logits for a, b in ((0, 4), (4, 5), (5, 9))
        ]
    assert torch.allclose(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


# Runs where bamoe cannot be imported: loads every directory by the code that travels with it.
STRANGER = """
from pathlib import Path
from transformers import AutoModelForCausalLM
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.load(Path(folder) / "tokens.pt")
    torch.save(model(tokens).logits.detach(), Path(folder) / "logits.pt")
"""


def test_loaded_where_bamoe_is_absent(tmp_path):
    folders = []
    for number, case in enumerate(GRID):
        model, tokens, folder = combined(*case), random_tokens(), tmp_path / f"model{number}"
        model.save_pretrained(folder)
        torch.save(tokens, folder / "tokens.pt")
        folders.append((folder, model(tokens).logits))
    run_without_bamoe(STRANGER, *(folder for folder, _ in folders))
    for folder, logits in folders:
        assert torch.allclose(torch.load(folder / "logits.pt"), logits, rtol=1e-5, atol=1e-6)
