"""Top-k attention routing (Mixture of Attention Heads) against a loop over tokens and experts."""

from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bamoe.modeling import grouped_linear
from bamoe.modeling.attention import MixtureOfAttention
from bamoe.modeling.losses import router_losses
from tests.modeling.conftest import random_tokens, tiny_config, tiny_model
from tests.modeling.naive import assert_same, head_rows, key_rows, naive_attention

WIDTH, HEAD_DIM = 32, 8


def sparse_layer(
    key_value: str = "shared", experts: int = 5, top_k: int = 2, heads: int = 4, kv_heads: int = 2, **changes: Any
) -> MixtureOfAttention:
    """A layer with every parameter random; `heads` and `kv_heads` are those of one expert."""
    is_causal = changes.pop("is_causal", True)
    config = tiny_config(
        key_value,
        experts,
        num_attention_heads=heads * experts,
        num_key_value_heads=kv_heads * (1 if key_value == "shared" else experts),
        attention_routing="top_k",
        num_attention_experts_per_tok=top_k,
        attn_implementation="sdpa",
        **changes,
    )
    layer = MixtureOfAttention(config, layer_idx=0, is_causal=is_causal)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


CASES: dict[str, dict[str, Any]] = {
    "moa": {"heads": 1, "kv_heads": 1},
    "heads-share-keys": {"heads": 4, "kv_heads": 1},
    "several-key-heads": {"heads": 4, "kv_heads": 2, "qk_norm": "expert"},
    "as-many-key-heads": {"heads": 2, "kv_heads": 2, "attention_bias": True, "attention_output_bias": True},
    "head-norms": {"heads": 4, "kv_heads": 2, "qk_norm": "head"},
    "top1": {"top_k": 1},
    "all": {"top_k": 5},
    "none": {"attention_gate_norm": "none"},
    "topk-softmax": {"attention_gate_norm": "topk_softmax"},
    "scaled": {"attention_scaling_factor": 2.0},
}


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("key_value", ["shared", "experts"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_a_loop_over_tokens_and_experts(case, key_value, implementation):
    layer = sparse_layer(key_value, **case)
    layer.config._experts_implementation = implementation
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)
    rope = LlamaRotaryEmbedding(layer.config)(hidden, torch.arange(5).expand(2, -1))
    mask = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    assert_same(
        layer(hidden, rope, mask)[0],
        naive_attention(layer, hidden, rope=rope),
        {"hidden": hidden, **dict(layer.named_parameters())},
    )


@pytest.mark.parametrize("key_value", ["shared", "experts"])
@pytest.mark.parametrize("across", [False, True], ids=["bidirectional", "cross"])
def test_without_rotation_in_both_directions_and_across(across, key_value):
    layer = sparse_layer(key_value, is_causal=False)
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)
    source = torch.randn(2, 7, WIDTH, requires_grad=True) if across else None
    ours = layer(hidden, key_value_states=source)[0]
    inputs = {"hidden": hidden, **({} if source is None else {"source": source}), **dict(layer.named_parameters())}
    assert_same(ours, naive_attention(layer, hidden, source, causal=False), inputs)


def test_experts_that_no_token_selects():
    layer = sparse_layer(experts=6, top_k=2)
    direction = torch.randn(WIDTH)
    with torch.no_grad():
        layer.gate.weight[:2] = direction
        layer.gate.weight[2:] = -direction
    hidden = (direction + 0.01 * torch.randn(2, 5, WIDTH)).requires_grad_()
    output, _, logits = layer(hidden)
    assert set(logits.topk(2).indices.flatten().tolist()) == {0, 1}
    assert_same(output, naive_attention(layer, hidden), {"hidden": hidden, **dict(layer.named_parameters())})


def test_the_kernel_runs_only_the_selected_rows(monkeypatch):
    layer, products = sparse_layer(), []
    kernel = torch.nn.functional.grouped_mm

    def counted(rows, weight, offs):
        products.append((len(rows), int(offs[-1]), weight.shape[0]))
        return kernel(rows, weight, offs=offs)

    monkeypatch.setattr(grouped_linear.F, "grouped_mm", counted)
    layer(torch.randn(2, 5, WIDTH))
    assert products == [(2 * 5 * 2, 2 * 5 * 2, 5)] * 2


def test_all_heads_with_equal_gates_are_multi_query_attention():
    experts = 4
    layer = sparse_layer(experts=experts, top_k=experts, heads=1, kv_heads=1)
    torch.nn.init.zeros_(layer.gate.weight)
    hidden = torch.randn(2, 6, WIDTH)
    heads = layer.q_proj(hidden).view(2, 6, experts, HEAD_DIM).transpose(1, 2)
    key, value = layer.k_proj(hidden)[:, None], layer.v_proj(hidden)[:, None]
    attended = torch.nn.functional.scaled_dot_product_attention(
        heads, key.expand_as(heads), value.expand_as(heads), is_causal=True
    )
    expected = layer.o_proj(attended.transpose(1, 2).flatten(2))
    assert torch.allclose(layer(hidden)[0] * experts, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_detached_gates():
    layer = sparse_layer(experts=5, top_k=2, attention_gate_norm="detached")
    routed = layer.gate(torch.randn(1, WIDTH))
    first, second = routed.weights[0]
    logits, (i, j) = routed.logits, routed.indices[0].tolist()
    p = logits[0].softmax(-1)
    total = p[i] + p[j]
    # dw_i/dp_i = 1 / S and dw_i/dp_j = 0: with respect to the logits, the softmax's own row over S.
    for weight, chosen in ((first, i), (second, j)):
        (gradient,) = torch.autograd.grad(weight, logits, retain_graph=True)
        expected = p[chosen] * ((torch.arange(5) == chosen).float() - p) / total
        assert torch.allclose(gradient[0], expected, atol=1e-6)
    alone = sparse_layer(experts=5, top_k=1, attention_gate_norm="detached").gate(torch.randn(1, WIDTH))
    assert alone.weights.item() == 1.0
    (gradient,) = torch.autograd.grad(alone.weights.sum(), alone.logits)
    assert gradient.abs().sum() > 0  # the whole normalised, a single gate would have none


def test_balance_loss_is_constant_without_a_choice():
    logits = torch.randn(50, 4, requires_grad=True)
    loss = router_losses([logits], top_k=4).load_balance
    assert loss.item() == pytest.approx(1.0, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("key_value", ["shared", "experts"])
def test_head_order_with_several_heads(key_value):
    """Only one query and one key head differ from zero: a wrong pairing of the two gives a uniform attention."""
    layer = sparse_layer(key_value, experts=3, top_k=2, heads=4, kv_heads=2)
    hidden = torch.randn(1, 6, WIDTH)
    for expert in range(3):
        for head in range(4):
            lone = sparse_layer(key_value, experts=3, top_k=2, heads=4, kv_heads=2)
            lone.load_state_dict(layer.state_dict())
            with torch.no_grad():
                kept = lone.o_proj.weight[:, head_rows(lone, expert, head)].clone()
                lone.o_proj.weight.zero_()
                lone.o_proj.weight[:, head_rows(lone, expert, head)] = kept
                keys = lone.k_proj.weight[key_rows(lone, expert, head)].clone()
                lone.k_proj.weight.zero_()
                lone.k_proj.weight[key_rows(lone, expert, head)] = keys
            assert torch.allclose(lone(hidden)[0], naive_attention(lone, hidden), atol=1e-5)


def sparse_model(key_value: str = "shared", experts: int = 4, top_k: int = 2, **changes: Any):
    return tiny_model(
        tiny_config(
            key_value,
            experts,
            attention_routing="top_k",
            num_attention_experts_per_tok=top_k,
            **changes,
        )
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("key_value", ["shared", "experts"])
def test_prefill_and_cached_steps_equal_the_full_forward(key_value, cache):
    model, tokens = sparse_model(key_value), random_tokens(2, 10)
    past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        full = model(tokens).logits
        pieces = [
            model(tokens[:, a:b], past_key_values=past, use_cache=True).logits for a, b in ((0, 5), (5, 6), (6, 10))
        ]
    assert torch.allclose(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-5)


def test_cache_does_not_grow_with_experts_or_selection():
    sizes = set()
    for experts, top_k in ((2, 1), (4, 2), (8, 2), (8, 8)):
        past = DynamicCache()
        with torch.no_grad():
            sparse_model("shared", experts, top_k)(random_tokens(2, 7), past_key_values=past, use_cache=True)
        sizes.add(sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers))
    assert sizes == {2 * 2 * 2 * 7 * 2 * HEAD_DIM * 4}  # (k and v) x layers x rows x tokens x kv heads x d x 4 bytes


def test_cross_attention_reads_its_source_once():
    layer = sparse_layer(is_causal=False)
    hidden, source = torch.randn(2, 4, WIDTH), torch.randn(2, 7, WIDTH)
    whole = layer(hidden, key_value_states=source)[0]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    steps = [layer(hidden[:, :1], key_value_states=source, past_key_values=cache)[0]]
    steps += [layer(hidden[:, t : t + 1], key_value_states=source * 0, past_key_values=cache)[0] for t in (1, 2, 3)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    assert cache.cross_attention_cache.get_seq_length() == 7
    assert cache.self_attention_cache.get_seq_length() == 0


def test_padding_changes_neither_logits_nor_router_losses():
    model, tokens = sparse_model(num_experts_per_tok=2), random_tokens(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    padded_mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask], 1)
    positions = (padded_mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask, output_router_logits=True)
        longer = model(padded, attention_mask=padded_mask, position_ids=positions, output_router_logits=True)
    assert torch.allclose(longer.logits[:, 3:], plain.logits, rtol=1e-4, atol=1e-5)
    assert torch.allclose(longer.aux_loss, plain.aux_loss, rtol=1e-5)
    assert torch.allclose(longer.z_loss, plain.z_loss, rtol=1e-5)


def test_adapters_on_the_projections_are_not_passed_by():
    layer = sparse_layer()
    hidden = torch.randn(2, 5, WIDTH)
    before = layer(hidden)[0]
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "o_proj"], r=4, init_lora_weights=False), layer)
    after = layer(hidden)[0]
    assert not torch.allclose(before, after, atol=1e-3)
    for module in (layer.q_proj, layer.o_proj):
        module.merge()
    merged = sparse_layer()
    merged.load_state_dict(
        {name.replace(".base_layer", ""): value for name, value in layer.state_dict().items() if "lora" not in name}
    )
    assert torch.allclose(merged(hidden)[0], after, rtol=1e-4, atol=1e-5)


def double_queries(layer: MixtureOfAttention) -> None:
    layer.q_proj.register_forward_hook(lambda module, arguments, output: 2 * output)


def prune_queries(layer: MixtureOfAttention) -> None:
    torch.nn.utils.prune.random_unstructured(layer.q_proj, "weight", 0.5)
    with torch.no_grad():
        layer.q_proj.weight_orig.mul_(2)


def offload(layer: MixtureOfAttention) -> None:
    with torch.no_grad():
        layer.q_proj.weight.mul_(2)
    cpu_offload(layer, torch.device("cpu"))


@pytest.mark.parametrize("change", [double_queries, prune_queries, offload])
def test_what_happens_when_a_projection_is_called_happens(change):
    layer, hidden = sparse_layer(), torch.randn(2, 5, WIDTH)
    before = layer(hidden)[0]
    change(layer)
    after = layer(hidden)[0]
    layer.config._experts_implementation = "eager"
    assert torch.allclose(after, layer(hidden)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)


def test_a_width_that_the_kernel_cannot_run():
    layer = sparse_layer(hidden_size=30)
    hidden = torch.randn(2, 5, 30)
    assert torch.allclose(layer(hidden)[0], naive_attention(layer, hidden), rtol=1e-4, atol=1e-5)


def test_compiled_whole():
    torch._dynamo.reset()
    layer, hidden = sparse_layer().eval(), torch.randn(2, 5, WIDTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(hidden)[0], layer(hidden)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [32, 36])  # 36 · 4 bytes are a multiple of 16, 36 · 2 are not
def test_autocast_gives_one_dtype(width):
    layer, hidden = sparse_layer(hidden_size=width), torch.randn(2, 5, width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(hidden)[0]
    assert torch.allclose(output.float(), layer(hidden)[0], rtol=0.1, atol=0.1)
