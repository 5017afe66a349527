"""The wide attention against transformers' Llama attention run expert by expert, outputs mixed by the gates."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from bamoe.modeling.attention import MixtureOfAttention
from bamoe.modeling.head_layout import expand_to_heads
from tests.modeling.conftest import tiny_config

EXPERTS, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 3, 4, 2, 8


def dense_attention() -> LlamaAttention:
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        attn_implementation="eager",
    )
    return LlamaAttention(config, layer_idx=0)


def wide_attention(experts: list[LlamaAttention], **changes) -> MixtureOfAttention:
    """Put dense attentions into the wide layer, one head at a time, by the documented order of heads."""
    key_value = changes.pop("key_value")
    config = tiny_config(key_value, EXPERTS, attn_implementation="eager", **changes)
    wide = MixtureOfAttention(config, layer_idx=0)
    group = HEADS // KEY_VALUE_HEADS

    def rows(head: int) -> slice:
        return slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)

    with torch.no_grad():
        for e, expert in enumerate(experts):
            for j in range(KEY_VALUE_HEADS):
                for g in range(group):
                    source = rows(j * group + g)
                    if key_value == "experts":
                        target = rows((e * KEY_VALUE_HEADS + j) * group + g)
                    else:
                        target = rows((j * EXPERTS + e) * group + g)
                    wide.q_proj.weight[target] = expert.q_proj.weight[source]
                    wide.o_proj.weight[:, target] = expert.o_proj.weight[:, source]
                if key_value == "experts" or e == 0:
                    target = rows(e * KEY_VALUE_HEADS + j if key_value == "experts" else j)
                    wide.k_proj.weight[target] = expert.k_proj.weight[rows(j)]
                    wide.v_proj.weight[target] = expert.v_proj.weight[rows(j)]
        torch.nn.init.normal_(wide.gate.weight)
    return wide


def causal_inputs(length: int = 10):
    hidden_states = torch.randn(2, length, 32, requires_grad=True)
    rope = LlamaRotaryEmbedding(tiny_config())(hidden_states, torch.arange(length)[None])
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    return hidden_states, rope, mask


@pytest.mark.parametrize("key_value", ["experts", "shared"])
@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"attention_routing": "top_k", "num_attention_experts_per_tok": 2, "attention_gate_norm": "none"},
        {"attention_routing": "top_k", "num_attention_experts_per_tok": 2, "attention_gate_norm": "topk_softmax"},
        {"attention_routing": "top_k", "num_attention_experts_per_tok": 1, "attention_gate_norm": "none"},
    ],
    ids=["soft", "top2", "top2-normalised", "top1"],
)
def test_equals_separate_experts_mixed_by_the_gates(key_value, routing):
    experts = [dense_attention() for _ in range(EXPERTS)]
    if key_value == "shared":
        for expert in experts[1:]:
            expert.k_proj, expert.v_proj = experts[0].k_proj, experts[0].v_proj
    wide = wide_attention(experts, key_value=key_value, **routing)
    hidden_states, rope, mask = causal_inputs()
    output = wide(hidden_states, rope, mask)[0]

    gates = torch.softmax(hidden_states @ wide.gate.weight.T, -1)
    top_k = routing.get("num_attention_experts_per_tok")
    if top_k:
        kept = gates >= gates.sort(descending=True).values[..., top_k - 1 : top_k]
        gates = gates * kept
        if routing["attention_gate_norm"] == "topk_softmax":
            gates = gates / gates.sum(-1, keepdim=True)
    mixed = sum(gates[..., e, None] * experts[e](hidden_states, rope, mask)[0] for e in range(EXPERTS))
    assert torch.allclose(output, mixed, rtol=1e-5, atol=1e-6)

    direction = torch.randn_like(output)
    inputs = [hidden_states, wide.gate.weight]
    ours = torch.autograd.grad((output * direction).sum(), inputs)
    theirs = torch.autograd.grad((mixed * direction).sum(), inputs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key_value", ["experts", "shared"])
def test_identical_experts_are_the_dense_attention_for_any_router(key_value):
    dense = dense_attention()
    wide = wide_attention([dense] * EXPERTS, key_value=key_value)
    hidden_states, rope, mask = causal_inputs()
    for scale in (0.0, 1.0, 10.0):
        torch.nn.init.normal_(wide.gate.weight, std=scale)
        expected = dense(hidden_states, rope, mask)[0]
        assert torch.allclose(wide(hidden_states, rope, mask)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key_value", ["experts", "shared"])
def test_values_per_expert_follow_the_order_of_the_query_heads(key_value):
    config = tiny_config(key_value)
    expanded = expand_to_heads(torch.arange(3), config, dim=0).tolist()
    if key_value == "experts":
        assert expanded == [0] * 4 + [1] * 4 + [2] * 4
    else:
        assert expanded == [0, 0, 1, 1, 2, 2] * 2
