"""mergekit-moe files become BTX recipes around the base's own weights, or are refused by name."""

import pytest
import yaml

from bamoe.errors import ConfigError
from bamoe.recipes.mergekit import is_mergekit, read_recipe

BASE = {
    "base_model": "models/base",
    "gate_mode": "random",
    "dtype": "bfloat16",
    "experts": [
        {"source_model": "models/code"},
        {"source_model": "models/law"},
        {"source_model": "models/math"},
    ],
}


def test_experts_surround_the_base_weights_as_in_mixtral(tmp_path):
    path = tmp_path / "mergekit.yaml"
    path.write_text(yaml.safe_dump(BASE))
    recipe, _ = read_recipe(path)
    assert recipe.recipe == "btx"
    assert recipe.seed == "models/base"
    assert [(expert.name, expert.model) for expert in recipe.experts] == [
        ("code", "models/code"),
        ("law", "models/law"),
        ("math", "models/math"),
    ]
    assert recipe.shared_weights.merge == "seed"
    assert (recipe.feed_forward.num_experts_per_tok, recipe.feed_forward.norm_topk_prob) == (2, True)
    assert recipe.dtype == "bfloat16"
    assert recipe.attention is None


def test_dtype_and_experts_per_token():
    recipe, _ = read_recipe({**BASE, "dtype": None, "experts_per_token": 3, "architecture": "mixtral"})
    assert recipe.dtype is None
    assert recipe.feed_forward.num_experts_per_tok == 3


def test_one_model_in_many_seats_keeps_its_order():
    sources = ["a/x", "a/x", "b/x", "a/x"]
    recipe, _ = read_recipe({**BASE, "experts": [{"source_model": source} for source in sources]})
    assert [(e.name, e.model, e.copies) for e in recipe.experts] == [
        ("x", "a/x", 2),
        ("x-2", "b/x", 1),
        ("x-3", "a/x", 1),
    ]


def test_unused_prompts_are_only_warned():
    experts = [{"source_model": "a", "positive_prompts": ["hello"]}, {"source_model": "b"}]
    _, warnings = read_recipe({**BASE, "experts": experts})
    assert any("positive_prompts" in warning for warning in warnings)
    _, warnings = read_recipe(BASE)
    assert not any("positive_prompts" in warning for warning in warnings)


def expert_with(**keys):
    return {"experts": [{"source_model": "a", **keys}, {"source_model": "b"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_mode": "hidden"}, "gate_mode 'hidden'.*write 'gate_mode: random'"),
        ({"gate_mode": "cheap_embed"}, "gate_mode 'cheap_embed'"),
        ({"gate_mode": "uniform_random"}, "gate_mode 'uniform_random'"),
        ({"shared_experts": [{"source_model": "a"}]}, "shared_experts are not supported"),
        ({"architecture": "deepseek"}, "architecture 'deepseek'"),
        ({"experts_per_token": 4}, "experts_per_token is 4 .* 3 experts"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"base_model": {"model": "x"}}, "base_model: give a directory or a hub id"),
        (
            {"experts": [{"source_model": "a+lora"}, {"source_model": "b"}]},
            r"experts\.0\.source_model: .* LoRA adapter",
        ),
        (
            {"experts": [{"source_model": "a"}, {"source_model": "b@main"}]},
            r"experts\.1\.source_model: .* revision",
        ),
        (expert_with(noise_scale=0.1), r"experts\.0\.noise_scale is not supported"),
        (expert_with(residual_scale=0.1), r"experts\.0\.residual_scale is not supported"),
        ({"merge_method": "ties"}, "unknown key 'merge_method'"),
        (expert_with(source="a"), "unknown key 'experts.0.source'.* did you mean 'source_model'"),
        ({"experts": []}, "experts: "),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe({**BASE, **change})


def test_a_gate_mode_left_out_is_mergekits_hidden():
    without = {key: value for key, value in BASE.items() if key != "gate_mode"}
    assert is_mergekit(without)
    with pytest.raises(ConfigError, match="gate_mode 'hidden'"):
        read_recipe(without)


def test_every_problem_is_in_one_message():
    with pytest.raises(ConfigError) as caught:
        read_recipe({**BASE, "gate_mode": "hidden", "architecture": "qwen", "experts_per_token": 9})
    assert len(str(caught.value).splitlines()) == 3


def test_bamoe_recipes_are_read_too():
    recipe, warnings = read_recipe({"recipe": "sparse", "seed": "models/seed", "num_experts": 4})
    assert recipe.num_seats == 4
    assert warnings == []
    assert read_recipe(recipe) == (recipe, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": "x"}, "unknown key 'sede'; did you mean 'seed'"),
        ({"router": {"stdd": 0.1}}, "unknown key 'router.stdd'; did you mean 'std'"),
        (
            {"feed_forward": {"experts_per_tok": 2}},
            "unknown key 'feed_forward.experts_per_tok'; did you mean 'num_experts_per_tok'",
        ),
        ({"experts": [{"name": "a", "modell": "x"}]}, "unknown key 'experts.0.modell'; did you mean 'model'"),
        ({"experts": [{"name": "a"}]}, "missing key 'experts.0.model'"),
        ({"seed": None}, "seed: "),
    ],
)
def test_unknown_and_missing_keys_at_any_depth(change, message):
    good = {
        "recipe": "bam",
        "seed": "s",
        "experts": [{"name": "a", "model": "x"}, {"name": "b", "model": "y"}],
    }
    with pytest.raises(ConfigError, match=message):
        read_recipe({**good, **change})
