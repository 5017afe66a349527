"""MoE++ in recipes: what is refused, what is built, and that a mixture computes what the equations say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

import bamoe
from bamoe.errors import ConfigError
from bamoe.modeling import BamoeForCausalLM
from bamoe.recipes.estimate import estimate, router_parameters
from bamoe.recipes.model_card import model_card
from bamoe.recipes.schema import Recipe
from bamoe.recipes.upcycle import prepare
from tests.modeling.conftest import tiny_config
from tests.recipes.test_equivalence import build, dense_model, relative_error
from tests.reference import ReferenceMixture

KINDS = {"zero": 1, "copy": 1, "constant": 2}
PLUS = {"feed_forward": {"zero_computation": KINDS}}
RECIPES: dict[str, dict[str, Any]] = {
    "bam": {"recipe": "bam", "attention": {"key_value": "shared"}},
    "btx": {"recipe": "btx"},
    "sparse": {"recipe": "sparse", "num_experts": 3},
}


def with_feed_forward(**feed_forward: Any) -> dict[str, Any]:
    models = [{"name": name, "model": "-"} for name in ("a", "b", "c")]
    return {"recipe": "btx", "seed": "-", "experts": models, "feed_forward": feed_forward}


@pytest.mark.parametrize(
    ("feed_forward", "message"),
    [
        ({"zero_computation": {"constants": 2}}, r"zero_computation.constants'; did you mean 'constant'\?"),
        ({"zero_computations": KINDS}, "did you mean 'zero_computation'"),
        ({"zero_computation": {}}, "zero_computation has no experts"),
        ({"zero_computation": {"copy": -1}}, r"zero_computation.copy: .* \(found -1\)"),
        ({"zero_computation": {"copy": True}}, r"zero_computation.copy: .* \(found True\)"),
        ({"tau": 0.5}, "tau: only for zero-computation experts"),
        ({"drop_zero_gates": True}, "drop_zero_gates: only for zero-computation experts"),
        ({"zero_computation": KINDS, "tau": 0}, "feed_forward.tau: .* greater than 0"),
        ({"zero_computation": KINDS, "routing": "soft"}, "zero_computation saves work only where experts are selected"),
        ({"capacity_factor": 1.1, "routing": "soft"}, "capacity_factor limits selected experts"),
        ({"zero_computation": KINDS, "num_experts_per_tok": 8}, "is 8 but there are 3 expert seats and 4 zero-comp"),
        ({"zero_computation": KINDS, "drop_zero_gates": True}, "drop_zero_gates .* needs norm_topk_prob: true"),
        ({"zero_computation": {"copy": 1}, "norm_topk_prob": True, "drop_zero_gates": True}, "and zero experts"),
        ({"zero_computation": KINDS, "router": "mlp"}, "feed_forward.router: .*'linear' or 'tanh_mlp'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(feed_forward: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.read(with_feed_forward(**feed_forward))


def test_routing_is_that_of_the_papers_unless_said_otherwise() -> None:
    plain, plus = (Recipe.read(with_feed_forward(**changes)).feed_forward for changes in ({}, PLUS["feed_forward"]))
    assert (plain.num_experts_per_tok, plain.norm_topk_prob) == (2, True)
    assert (plus.num_experts_per_tok, plus.norm_topk_prob) == (2, False)
    # Where all experts were selected, none would be saved.
    pair = {"recipe": "sparse", "seed": "-", "num_experts": 1, "feed_forward": {"zero_computation": {"zero": 1}}}
    assert Recipe.read(pair).feed_forward.num_experts_per_tok == 1
    said = with_feed_forward(zero_computation=KINDS, num_experts_per_tok=7, norm_topk_prob=True)
    routed = Recipe.read(said).feed_forward
    assert (routed.num_experts_per_tok, routed.norm_topk_prob) == (7, True)
    assert Recipe.read(Recipe.read(said).model_dump(exclude_none=True)) == Recipe.read(said)


def naive_feed_forward(mixture: BamoeForCausalLM, layers: list[Any], flat: torch.Tensor, scores: Any, number: int):
    """MoE++ of one layer over flat (N, D), token by token, and its scores (N, E + Z): the paper's equations."""
    config, mlp = mixture.config, mixture.model.layers[number].mlp
    dense = [layer.mlp for layer in layers]
    kinds = [config.num_zero_experts, config.num_copy_experts, config.num_constant_experts]
    outputs, kept = [], []
    for position, x in enumerate(flat):
        score = mlp.gate.weight @ x
        if number > 0:
            score = score + mlp.gate.residual_weight @ scores[position]
        kept.append(score)
        gates = score.softmax(-1)
        output = torch.zeros_like(x)
        for expert in gates.argsort(descending=True)[: config.num_experts_per_tok].tolist():
            rest = expert - len(dense)
            if rest < 0:
                result = dense[expert](x)
            elif rest < kinds[0]:
                result = 0 * x
            elif rest < kinds[0] + kinds[1]:
                result = x
            else:
                constant = rest - kinds[0] - kinds[1]
                part = (mlp.zero_computation.constant_gate[constant] @ x).softmax(-1)
                result = part[0] * x + part[1] * mlp.zero_computation.constant_value[constant]
            output = output + gates[expert] * result
        outputs.append(output)
    return torch.stack(outputs), torch.stack(kept)


class ReferencePlus(ReferenceMixture):
    """The loop over dense models, with MoE++'s feed-forward written out token by token."""

    mixture: BamoeForCausalLM
    scores: torch.Tensor | None = None

    def _feed_forward(self, n, experts, normed):
        output, self.scores = naive_feed_forward(
            self.mixture, list(experts), normed.flatten(0, 1), self.scores if n else None, n
        )
        return output.view_as(normed)


def reference_of(mixture: BamoeForCausalLM, dense: list[PreTrainedModel]) -> ReferencePlus:
    layers, config = mixture.model.layers, mixture.config
    attention = [layer.self_attn.gate.weight for layer in layers] if config.num_attention_experts > 1 else None
    reference = ReferencePlus(dense, attention, [], config.attention_key_value == "shared", 2, False)
    object.__setattr__(reference, "mixture", mixture)  # not a part of it
    return reference


@pytest.mark.parametrize("family", ["llama", "qwen3, biases", "cohere"])
@pytest.mark.parametrize("kind", RECIPES)
def test_an_upcycled_mixture_equals_the_dense_models_and_the_equations(tmp_path: Path, kind: str, family: str) -> None:
    dense = [dense_model(family, 0 if kind == "sparse" else seed) for seed in range(3)]
    mixture = build(tmp_path, dense, RECIPES[kind] | PLUS)
    config = mixture.config
    assert (config.num_experts, config.num_routed_experts, config.num_experts_per_tok) == (3, 7, 2)
    assert config.gating_residuals
    residuals = [layer.mlp.gate.residual_weight for layer in mixture.model.layers]
    assert residuals[0] is None
    assert not residuals[1].any()  # a plain router, at first
    with torch.no_grad():
        residuals[1].normal_()
    reference = reference_of(mixture, dense)
    tokens = torch.randint(3, 48, (2, 11))
    output = mixture(tokens, output_router_logits=True)
    assert relative_error(output.logits, reference(reference.embed(tokens))) < 1e-5
    chosen = torch.stack(output.router_logits).topk(2).indices
    assert len(chosen.unique()) >= 5  # experts of different kinds took part


def test_with_copies_of_one_model_the_zero_expert_alone_scales_it(tmp_path: Path) -> None:
    """Top-2 of E equal experts with true probabilities is the dense feed-forward times the two gates."""
    dense = dense_model("llama", 0)
    mixture = build(tmp_path, [dense] * 3, RECIPES["sparse"] | {"feed_forward": {"zero_computation": {"zero": 1}}})
    normed = torch.randn(5, 32)
    mlp = mixture.model.layers[0].mlp
    output, logits, _ = mlp(normed[None])
    gates = logits.softmax(-1)
    selected = torch.zeros_like(gates).scatter(1, gates.topk(2).indices, 1.0)
    strength = (gates * selected)[:, :3].sum(-1, keepdim=True)
    torch.testing.assert_close(output[0], strength * dense.model.layers[0].mlp(normed), rtol=1e-4, atol=1e-5)


def test_the_released_code_in_a_recipe(tmp_path: Path) -> None:
    released = {
        "zero_computation": KINDS, "tau": 0.5, "capacity_factor": 1.25, "gating_residuals": False,
        "router": "tanh_mlp", "norm_topk_prob": True, "drop_zero_gates": True, "input_scale": 2.0,
    }  # fmt: skip
    mixture = build(
        tmp_path, [dense_model("llama", seed) for seed in range(3)], {"recipe": "btx", "feed_forward": released}
    )
    config = mixture.config
    assert (config.zero_computation_tau, config.expert_capacity_factor, config.expert_input_scale) == (0.5, 1.25, 2.0)
    assert (config.feed_forward_router, config.gating_residuals, config.drop_zero_gates) == ("tanh_mlp", False, True)
    assert mixture.model.layers[0].mlp.gate.inner_weight.shape == (8 * 7, 32)
    assert all(layer.mlp.gate.residual_weight is None for layer in mixture.model.layers)
    assert mixture(torch.randint(3, 48, (1, 5))).logits.isfinite().all()


@pytest.mark.parametrize("feed_forward", [PLUS["feed_forward"], {"zero_computation": KINDS, "router": "tanh_mlp"}, {}])
def test_needs_are_those_of_the_model(tmp_path: Path, feed_forward: dict[str, Any]) -> None:
    dense_model("llama", 0).save_pretrained(tmp_path / "dense")
    recipe = RECIPES["bam"] | {"seed": str(tmp_path / "dense"), "feed_forward": feed_forward}
    recipe["experts"] = [{"name": name, "model": str(tmp_path / "dense")} for name in ("a", "b")]
    with prepare(recipe) as planned:
        config = planned.config
        needs = estimate(config, "float32", tmp_path)
        assert planned.plan.bytes == 4 * needs.total_parameters
    model = BamoeForCausalLM(config)
    assert needs.total_parameters == model.num_parameters()
    routers = [weight.numel() for name, weight in model.named_parameters() if ".gate." in name]
    assert needs.router_parameters == router_parameters(config) == sum(routers)


def test_constants_are_random_by_the_recipes_seed_and_the_card_says_what_there_is(tmp_path: Path) -> None:
    def constants(name: str, **router: Any) -> torch.Tensor:
        folder = tmp_path / name
        folder.mkdir()
        model = build(folder, [dense_model("llama", 0)] * 2, {"recipe": "btx", "router": router, **PLUS})
        return model.model.layers[1].mlp.zero_computation.constant_value.detach()

    first = constants("first", std=0.5, seed=3)
    assert first.std() == pytest.approx(0.5, rel=0.3)
    assert torch.equal(first, constants("again", std=0.5, seed=3))
    assert not torch.equal(first, constants("other", std=0.5, seed=4))
    card = (tmp_path / "first" / "mixture" / "README.md").read_text()
    assert "| feed-forward experts | 2, 2 of them and of the zero-computation experts per token" in card
    assert "| zero-computation experts (MoE++, arXiv 2410.07348) | 1 zero, 1 copy, 2 constant; tau 0.75 |" in card
    assert "gating residuals" in card
    assert "| capacity while training | 1.1 times" in card


def test_the_card_of_sparse_attention_and_one_feed_forward() -> None:
    recipe = Recipe.read({"recipe": "sparse", "seed": "-", "num_experts": 1})
    attention = {"attention_routing": "top_k", "num_attention_experts_per_tok": 2, "attention_gate_norm": "none"}
    card = model_card(recipe, tiny_config(num_experts=1, num_experts_per_tok=1, **attention), {})
    assert "| attention experts | 3, 2 per token (top_k routing; gate_norm: none; keys and values: experts) |" in card
    assert "| feed-forward | one for all tokens |" in card
    assert "gate_norm" not in model_card(recipe, tiny_config(), {})


def test_the_older_name_of_gate_norm_is_explained() -> None:
    for value in (True, False):
        recipe = with_feed_forward() | {"recipe": "bam", "attention": {"norm_topk_prob": value}}
        with pytest.raises(ConfigError, match=r"attention: norm_topk_prob is gate_norm here: true is .*topk_softmax"):
            Recipe.read(recipe)


def test_a_router_of_one_expert_cannot_have_residuals(tmp_path: Path) -> None:
    dense_model("llama", 0).save_pretrained(tmp_path / "dense")
    recipe = {"recipe": "sparse", "seed": str(tmp_path / "dense"), "num_experts": 1}
    for needless in ({"gating_residuals": True}, {"router": "tanh_mlp"}, {"capacity_factor": 1.1}):
        (key,) = needless
        with pytest.raises(ConfigError, match=rf"feed_forward\.{key}.*one expert seat has no feed-forward router"):
            Recipe.read({**recipe, "feed_forward": needless})
    Recipe.read({**recipe, "feed_forward": {"gating_residuals": False, "capacity_factor": 0}})
    with pytest.warns(UserWarning, match="tokenizer"):
        out = bamoe.upcycle({**recipe, **PLUS}, tmp_path / "one")
    assert isinstance(LlamaForCausalLM.from_pretrained(tmp_path / "dense"), LlamaForCausalLM)
    assert BamoeForCausalLM.from_pretrained(out).config.num_routed_experts == 5
