"""Each family's description agrees with transformers' own model of it, and what a mixture lacks is refused by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bamoe import BamoeConfig, BamoeForCausalLM
from bamoe.errors import CompatibilityError
from bamoe.families import SUPPORTED, family_of
from bamoe.families.family import rotates_by_length
from tests.dense_models import TINY, VARIANTS, variant_name


def config_json(model_type, **changes):
    return {"model_type": model_type, **TINY, **changes}


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_expected_tensors_are_those_of_the_model(variant):
    model_type, changes = variant
    config = AutoConfig.for_model(model_type, **(TINY | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del stored["lm_head.weight"]
    family = family_of(config.to_dict())
    assert family.dense_tensors(family.read_config(config.to_dict())) == stored
    assert family.refusals(config) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_a_mixture_of_one_expert_has_the_dense_model_s_parameters(variant):
    model_type, changes = variant
    family = SUPPORTED[model_type]
    config = AutoConfig.for_model(model_type, **(TINY | changes))
    mixture = BamoeConfig(num_attention_experts=1, num_experts=1, **family.translate(config))
    with torch.device("meta"):
        dense = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        mixed = sum(p.numel() for p in BamoeForCausalLM(mixture).parameters())
    assert mixed == dense


def test_sliding_windows_are_kept():
    mistral = SUPPORTED["mistral"].translate(AutoConfig.for_model("mistral", **TINY, sliding_window=8))
    assert BamoeConfig(**mistral, num_attention_experts=1).layer_types == ["sliding_attention"] * 2
    assert mistral["sliding_window"] == 8
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for model_type in ("qwen2", "qwen3"):
        fields = SUPPORTED[model_type].translate(AutoConfig.for_model(model_type, **TINY, **changes))
        assert (fields["sliding_window"], fields["layer_types"]) == (8, ["full_attention", "sliding_attention"])
        unused = SUPPORTED[model_type].translate(AutoConfig.for_model(model_type, **TINY, sliding_window=8))
        assert unused["sliding_window"] is None


def test_cohere_is_the_parallel_block():
    fields = SUPPORTED["cohere"].translate(AutoConfig.for_model("cohere", **TINY, layer_norm_eps=0.01, logit_scale=0.5))
    expected = {
        "use_parallel_block": True,
        "norm_type": "layer_norm",
        "rope_interleaved": True,
        "norm_eps": 0.01,
        "logit_scale": 0.5,
        "tie_word_embeddings": True,
    }
    assert {key: fields[key] for key in expected} == expected


def test_rope_written_the_old_way_is_understood():
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    family = SUPPORTED["llama"]
    raw = config_json("llama", rope_theta=500000.0, rope_scaling=scaling)
    rope = family.translate(family.read_config(raw))["rope_parameters"]
    assert rope["rope_type"] == "llama3"
    assert rope["rope_theta"] == 500000.0
    assert rope["factor"] == 8.0
    assert "type" not in rope
    assert raw["rope_scaling"]["type"] == "llama3"  # the caller's dictionary is left alone
    assert family.refusals(family.read_config(raw)) == []


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "no_such_function"}, "no_such_function"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
            "longrope",
        ),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is not set"),
        ("cohere", {"logit_scale": None}, "logit_scale"),
    ],
)
def test_what_a_mixture_lacks_is_refused_by_name(model_type, changes, named):
    family = family_of({"model_type": model_type})
    refusals = family.refusals(family.read_config(config_json(model_type, **changes)))
    assert len(refusals) == 1
    assert named in refusals[0]


@pytest.mark.parametrize(
    ("rope", "by_length"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, False),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, False),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, True),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}, False),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 16}, True),
    ],
)
def test_which_rotations_depend_on_the_maximum_of_positions(rope, by_length):
    assert rotates_by_length(rope) == by_length

    def frequencies(maximum):
        config = AutoConfig.for_model("llama", **TINY | {"max_position_embeddings": 64})
        config.rope_parameters, config.max_position_embeddings = rope, maximum
        if rope["rope_type"] == "default":
            return LlamaRotaryEmbedding(config).inv_freq
        # 256 positions are beyond either maximum.
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=256)[0]

    assert torch.equal(frequencies(32), frequencies(128)) != by_length


@pytest.mark.parametrize(("padding", "taken"), [(40, None), (-1, None), (0, 0), (39, 39), (None, None)])
def test_only_a_padding_id_of_the_vocabulary_is_taken(padding, taken):
    family = SUPPORTED["llama"]
    config = family.read_config(config_json("llama") | {"pad_token_id": padding})
    assert family.translate(config)["pad_token_id"] == taken


def test_more_layers_than_any_model_are_refused_before_a_list_of_them_is_made():
    for model_type in SUPPORTED:
        with pytest.raises(CompatibilityError, match="num_hidden_layers is 10000000, more than"):
            SUPPORTED[model_type].read_config(config_json(model_type) | {"num_hidden_layers": 10**7})


def test_harmless_fields_are_not_refused():
    family = SUPPORTED["llama"]
    raw = config_json("llama", pretraining_tp=2, auto_map={"AutoConfig": "evil.Config"}, rope_theta=1e6)
    assert family.refusals(family.read_config(raw)) == []


@pytest.mark.parametrize("raw", [{"model_type": "gpt2"}, {}])
def test_an_unknown_architecture_names_the_supported_ones(raw):
    with pytest.raises(CompatibilityError, match="cohere, llama, mistral, qwen2, qwen3"):
        family_of(raw)


def test_an_invalid_config_is_one_message():
    with pytest.raises(CompatibilityError, match="not a valid llama config"):
        SUPPORTED["llama"].read_config(config_json("llama", hidden_size=33))
