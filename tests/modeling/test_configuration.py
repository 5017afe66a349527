import pytest

from bamoe.modeling import BamoeConfig
from tests.modeling.conftest import tiny_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_expert": 4}, "did you mean 'num_experts'"),
        ({"num_local_experts": 4}, "did you mean 'num_experts'"),
        ({"layer_norm_eps": 1e-5}, "did you mean 'norm_eps'"),
        ({"pad_token_id": 64}, "pad_token_id 64 is not among the 64 tokens"),
        ({"attention_routing": "hard"}, "attention_routing must be one of"),
        ({"norm_type": "batch"}, "norm_type must be one of"),
        ({"num_experts_per_tok": 4}, r"between 1 and num_experts \(3\), found 4"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok must be between"),
        ({"feed_forward_routing": "soft"}, "all 3 experts run"),
        ({"num_attention_experts_per_tok": 1}, "attention_routing is soft"),
        ({"attention_routing": "top_k", "num_attention_experts_per_tok": 4}, "between 1 and num_attention_experts"),
        ({"num_attention_heads": 10}, "counts all experts"),
        ({"num_key_value_heads": 5}, "counts all experts"),
        ({"num_attention_heads": 9}, "3 query heads, which do not divide into 2"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_experts": 0}, "num_experts must be a positive integer"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer"),
        ({"layer_types": ["full_attention"]}, "must name 2 layers"),
        ({"layer_types": ["full_attention", "linear"]}, "found \\['linear'\\]"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is None"),
    ],
)
def test_refuses_what_no_model_can_be_built_from(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_round_trip_through_json(tmp_path):
    config = tiny_config("shared", attention_routing="top_k", num_attention_experts_per_tok=2)
    config.save_pretrained(tmp_path)
    assert BamoeConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_counts_heads_over_all_experts():
    own, shared = tiny_config("experts"), tiny_config("shared")
    assert (own.num_attention_heads, own.num_key_value_heads) == (12, 6)
    assert (shared.num_attention_heads, shared.num_key_value_heads) == (12, 2)
    for config in (own, shared):
        assert (config.num_dense_heads, config.num_dense_key_value_heads) == (4, 2)
    assert BamoeConfig(hidden_size=64, num_attention_heads=16, num_attention_experts=2).head_dim == 8
