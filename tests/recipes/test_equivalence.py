"""Built mixtures compute what the dense models compute, for every family: `tests/reference.py` is the judge."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import bamoe
from bamoe.modeling import BamoeForCausalLM
from tests.reference import ReferenceMixture

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, biases, llama3 rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama, tied, wide heads": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral, sliding window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2, one layer slides": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12}),
    "qwen3, biases": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8, "attention_bias": True}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
    "cohere, q/k norms, biases": (
        CohereForCausalLM,
        CohereConfig,
        {"logit_scale": 0.3, "use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False},
    ),
}


def dense_model(family: str, seed: int) -> PreTrainedModel:
    """A tiny dense model with every parameter random, norms and biases included."""
    model_class, config_class, changes = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(SIZES | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def build(tmp_path: Path, dense: list[PreTrainedModel], recipe: dict[str, Any]) -> BamoeForCausalLM:
    for i, model in enumerate(dense):
        model.save_pretrained(tmp_path / f"dense-{i}")
    recipe = {"seed": str(tmp_path / "dense-0"), "router": {"std": 0.3}} | recipe
    if recipe["recipe"] != "sparse":
        recipe["experts"] = [{"name": f"e{i}", "model": str(tmp_path / f"dense-{i}")} for i in range(len(dense))]
    with pytest.warns(UserWarning, match="tokenizer"):  # these models have none
        bamoe.upcycle(recipe, tmp_path / "mixture")
    return BamoeForCausalLM.from_pretrained(tmp_path / "mixture", attn_implementation="eager").eval()


def reference_of(mixture: BamoeForCausalLM, dense: list[PreTrainedModel]) -> ReferenceMixture:
    layers, config = mixture.model.layers, mixture.config
    routed = config.num_attention_experts > 1
    return ReferenceMixture(
        dense,
        attention_gates=[layer.self_attn.gate.weight for layer in layers] if routed else None,
        feed_forward_gates=[layer.mlp.gate.weight for layer in layers],
        share_key_value=config.attention_key_value == "shared",
        top_k=config.num_experts_per_tok,
        normalise=config.norm_topk_prob,
    )


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


RECIPES = {
    "bam, KV experts": {"recipe": "bam", "attention": {"key_value": "experts"}},
    "bam, KV sharing": {"recipe": "bam", "attention": {"key_value": "shared"}},
    "btx": {"recipe": "btx"},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_mixture_equals_the_dense_models_run_expert_by_expert(tmp_path, family, recipe):
    dense = [dense_model(family, seed) for seed in range(3)]
    mixture = build(tmp_path, dense, recipe)
    reference = reference_of(mixture, dense)
    tokens = torch.randint(3, 48, (2, 11))
    embeddings = mixture.model.embed_tokens(tokens)
    assert relative_error(embeddings, reference.embed(tokens)) < 1e-6

    inputs = embeddings.detach().requires_grad_()
    logits, expected = mixture(inputs_embeds=inputs).logits, reference(inputs)
    assert relative_error(logits, expected) < 1e-5

    routers = [p for name, p in mixture.named_parameters() if "gate.weight" in name]
    direction = torch.randn_like(logits)
    ours = torch.autograd.grad(
        (logits * direction).sum(), [inputs, *routers, mixture.model.layers[0].mlp.experts.down_proj]
    )
    downs = [layer.mlp.down_proj.weight for layer in reference.layers[0]]
    theirs = list(torch.autograd.grad((expected * direction).sum(), [inputs, *routers, *downs]))
    theirs[-3:] = [torch.stack(theirs[-3:])]
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) < 1e-4


@pytest.mark.parametrize(
    "recipe", [*RECIPES.values(), {"recipe": "sparse", "num_experts": 3}], ids=[*RECIPES, "sparse"]
)
@pytest.mark.parametrize("family", ["llama, biases, llama3 rope", "qwen3", "cohere, q/k norms, biases"])
def test_identical_copies_with_renormalised_gates_are_the_dense_model(tmp_path, family, recipe):
    dense = dense_model(family, 0)
    routing = {"feed_forward": {"num_experts_per_tok": 2, "norm_topk_prob": True}}
    mixture = build(tmp_path, [dense] * 3, recipe | routing)
    tokens = torch.randint(3, 48, (2, 11))
    assert relative_error(mixture(tokens).logits, dense(tokens).logits) < 1e-5


def test_top_1_with_output_scale_is_the_dense_model_at_a_uniform_router(tmp_path):
    dense = dense_model("llama", 0)
    routing = {"feed_forward": {"num_experts_per_tok": 1, "routed_scaling_factor": 3.0}, "router": {"std": 0.0}}
    mixture = build(tmp_path, [dense] * 3, {"recipe": "bam"} | routing)
    tokens = torch.randint(3, 48, (2, 11))
    assert relative_error(mixture(tokens).logits, dense(tokens).logits) < 1e-5
