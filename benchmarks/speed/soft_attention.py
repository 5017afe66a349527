"""Soft attention as one wide attention, beside N attention modules whose outputs are summed, and its eager twin.

The sum of N experts, each over its own heads, is one grouped-query attention over the heads of all (see
`bamoe.modeling.attention`): one product where there would be N, and one attention call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness import Bench, Part, Result, repeated, require_agreement
from shapes import EXPERTS, Shape, dense_config, mixture_config, model_of
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from bamoe.modeling.attention import MixtureOfAttention
from bamoe.modeling.head_layout import by_expert
from bamoe.reports.table import Column

CACHED = 512  # tokens in the cache when one token is decoded
# Calls per turn, by the number of tokens: a single call on few tokens would be over before a clock can tell.
CALLS = {1: 100, 16: 50, 128: 8, 2048: 1}
LONG = 2048
HEAD_WIDTH = 64
KEY_VALUES = {"KV experts": "experts", "KV sharing": "shared"}


class SeparateAttention(nn.Module):
    """Σ_i g_i(u) · MHA_i(u) with a module of transformers' per expert, all with the weights of a wide attention."""

    def __init__(self, wide: MixtureOfAttention, dense: Any):
        super().__init__()
        self.gate = wide.gate
        self.experts = nn.ModuleList(LlamaAttention(dense, layer) for layer in range(wide.config.num_attention_experts))
        self.experts.to(wide.q_proj.weight)
        queries = by_expert(wide.q_proj.weight, wide.config).flatten(1, 2)
        outputs = by_expert(wide.o_proj.weight, wide.config, dim=1).flatten(2)
        rows = wide.k_proj.out_features // wide.config.num_key_value_experts  # of an expert's keys
        expert: Any
        with torch.no_grad():
            for number, expert in enumerate(self.experts):
                expert.q_proj.weight.copy_(queries[number])
                expert.o_proj.weight.copy_(outputs[number])
                if wide.config.attention_key_value == "experts" or number == 0:
                    expert.k_proj.weight.copy_(wide.k_proj.weight[number * rows :][:rows])
                    expert.v_proj.weight.copy_(wide.v_proj.weight[number * rows :][:rows])
                else:  # the weights are shared; what they compute is not, as the modules know nothing of each other
                    expert.k_proj, expert.v_proj = self.experts[0].k_proj, self.experts[0].v_proj

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        """Attend from hidden_states (B, T, D)."""
        gates = self.gate(hidden_states).weights.to(hidden_states.dtype).unsqueeze(-1)
        output = gates[..., 0, :] * self.experts[0](hidden_states, **kwargs)[0]
        for number, expert in enumerate(self.experts[1:], start=1):
            output = output.addcmul(gates[..., number, :], expert(hidden_states, **kwargs)[0])
        return (output,)


def candidates(shape: Shape, experts: int, key_value: str, bench: Bench) -> dict[str, nn.Module]:
    """The wide attention, its eager twin and the separate modules, with the same weights."""
    wide, eager = (
        model_of(mixture_config(shape, experts, key_value), bench, attn_implementation=implementation)
        .model.layers[0]
        .self_attn
        for implementation in ("sdpa", "eager")
    )
    dense = dense_config(shape)
    dense._attn_implementation = "sdpa"
    return {"wide": wide, "separate": SeparateAttention(wide, dense), "eager": eager}


def hidden_states(shape: Shape, tokens: int, bench: Bench) -> torch.Tensor:
    """Random hidden states (1, tokens, D), of the size that a norm gives them."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, tokens, shape.width, generator=generator).to(bench.device, bench.dtype)


def arguments(hidden: torch.Tensor, config: Any, start: int = 0) -> dict[str, Any]:
    """What a model hands to a layer: hidden states (1, T, D), positions from `start` on and, where needed, a mask."""
    count = hidden.shape[1]
    positions = torch.arange(start, start + count, device=hidden.device)[None]
    rotation = LlamaRotaryEmbedding(config).to(hidden.device)(hidden, positions)
    given = {"hidden_states": hidden, "position_embeddings": rotation}
    if config._attn_implementation == "eager" and count > 1:  # the fused attention is causal without a mask
        mask = torch.full((count, count), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
        given["attention_mask"] = mask.triu(1)[None, None]
    return given


def inference(module: nn.Module, config: Any, shape: Shape, tokens: int, bench: Bench) -> Callable[[], torch.Tensor]:
    """A forward pass without gradients; of one token, with a cache."""
    module.eval()
    if tokens == 1:
        return decode(module, config, shape, bench)
    given = arguments(hidden_states(shape, tokens, bench), config)

    @torch.no_grad()
    def call() -> torch.Tensor:
        output: torch.Tensor = module(**given)[0]
        return output

    return call


def decode(module: nn.Module, config: Any, shape: Shape, bench: Bench) -> Callable[[], torch.Tensor]:
    """One token, with the keys and values of `CACHED` tokens before it in a growing cache."""
    cache = DynamicCache()
    with torch.no_grad():
        module(**arguments(hidden_states(shape, CACHED, bench), config), past_key_values=cache)
    past = [(layer.keys, layer.values) for layer in cache.layers]
    given = arguments(hidden_states(shape, 1, bench), config, start=CACHED)

    @torch.no_grad()
    def call() -> torch.Tensor:
        output: torch.Tensor = module(**given, past_key_values=cache)[0]
        for layer, (keys, values) in zip(cache.layers, past, strict=True):
            layer.keys, layer.values = keys, values  # the token is forgotten, so that every call does the same
        return output

    return call


def training(module: nn.Module, config: Any, shape: Shape, tokens: int, bench: Bench) -> Callable[[], torch.Tensor]:
    """A forward and a backward pass, to the weights and to the input, whose gradient is returned."""
    module.train()
    hidden = hidden_states(shape, tokens, bench).requires_grad_()
    given, gradient = arguments(hidden, config), torch.ones_like(hidden)

    def call() -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        hidden.grad = None
        module(**given)[0].backward(gradient)
        assert hidden.grad is not None
        return hidden.grad

    return call


def compare(
    modules: Mapping[str, nn.Module], run: Callable[..., Callable[[], torch.Tensor]], shape: Shape, tokens: int,
    bench: Bench,
) -> dict[str, Any]:  # fmt: skip
    """Time of the others over the wide attention's."""
    # Where time is short, many tokens take fewer turns, and the eager twin, which is slowest there, takes none.
    short = tokens == LONG and not bench.full and bench.device.type == "cpu"
    calls = {
        name: run(module, modules["eager" if name == "eager" else "wide"].config, shape, tokens, bench)
        for name, module in modules.items()
        if not (short and name == "eager")
    }
    require_agreement(calls)
    turns = bench.turns(repeated(calls, CALLS[tokens]), 3 if short else None)
    eager = turns.ratio("eager", "wide")["ratio"] if "eager" in calls else None
    return {**turns.ratio("separate", "wide"), "eager": eager}


def table(width: int, bench: Bench) -> Result:
    """All numbers of experts and of tokens at one width."""
    shape = Shape(width, 1, width // HEAD_WIDTH, width, 8, batch=1, context=LONG)
    records = []
    for experts in (2, EXPERTS, 8) if bench.full else (EXPERTS,):
        for variant, key_value in KEY_VALUES.items():
            modules = candidates(shape, experts, key_value, bench)
            for name, run, counts in (
                ("inference", inference, CALLS),
                ("forward and backward", training, [tokens for tokens in CALLS if tokens > 1]),
            ):
                for tokens in counts:
                    found = compare(modules, run, shape, tokens, bench)
                    case = {"variant": variant, "experts": str(experts), "pass": name, "tokens": str(tokens)}
                    records.append(case | found)
    columns = [
        Column("variant", "keys and values", "text"),
        Column("experts", "experts", "text"),
        Column("pass", "pass", "text"),
        Column("tokens", "tokens", "text"),
        Column("ratio", "separate modules' time over ours"),
        Column("quartiles", "quartiles", "text"),
        Column("eager", "eager twin's time over ours"),
    ]
    reading = (
        f"More is better. One token is decoded with {CACHED} in the cache; separate modules compute and cache shared "
        "keys and values once each. To reach: never less than 1, and 1.6 in decode and at few tokens."
    )
    settings = {
        "batch": 1,
        "width": width,
        "heads per expert": shape.heads,
        "head width": HEAD_WIDTH,
        "calls per turn": ", ".join(f"{calls} at {tokens}" for tokens, calls in CALLS.items()) + " tokens",
    }
    return Result(f"Soft attention, width {width}", columns, records, settings, reading)


def measure(bench: Bench) -> list[Result]:
    """All widths."""
    results = []
    for width in (256, 512, 1024) if bench.full or bench.device.type != "cpu" else (256, 512):
        results.append(table(width, bench))
        bench.tell(f"{results[-1].title}: done")
    return results


PART = Part("soft_attention", measure)
