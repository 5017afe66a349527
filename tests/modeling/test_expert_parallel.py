"""Expert parallelism and FSDP2 by transformers' own plans: two processes agree with one, and each holds its part."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bamoe.modeling import BamoeForCausalLM
from tests.modeling.conftest import random_tokens, tiny_config, tiny_model
from tests.modeling.spread import assert_agree, run_two_processes, save_case

MODERN = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)
modern = pytest.mark.skipif(not MODERN, reason="expert parallelism needs transformers 5.23")

EXPERTS, TOGETHER, FULLY = {"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "experts, top-1": (EXPERTS, {"num_experts_per_tok": 1}),
    "experts, top-2, parallel block": (EXPERTS, {"use_parallel_block": True}),
    "experts, soft": (EXPERTS, {"feed_forward_routing": "soft", "num_experts_per_tok": None}),
    "experts and heads, KV experts": (TOGETHER, {"num_experts_per_tok": 1}),
    "experts and heads, KV sharing": (TOGETHER, {"key_value": "shared", "qk_norm": "expert"}),
    "FSDP, KV experts": (FULLY, {"qk_norm": "expert", "attention_bias": True, "attention_output_bias": True}),
    "FSDP, KV sharing": (FULLY, {"key_value": "shared", "tie_word_embeddings": True, "qk_norm": "head"}),
    "FSDP, top-k attention": (FULLY, {"attention_routing": "top_k", "num_attention_experts_per_tok": 2}),
}


def make(name: str) -> tuple[BamoeForCausalLM, torch.Tensor]:
    torch.manual_seed(0)
    # Router losses of the size of the cross-entropy, so that counting tokens on the wrong processes shows.
    losses = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1}
    model = tiny_model(tiny_config(num_experts=4, **CASES[name][1], **losses))
    return model, random_tokens(4, 12)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("expert-parallel")
    cases = []
    for name, (parallel, _) in CASES.items():
        save_case(folder / name, *make(name))
        generate = {"generate": parallel == TOGETHER}
        cases.append({"name": name, "folder": str(folder / name), "parallel": parallel} | generate)
    save_case(folder / "three", tiny_model(num_experts=3), random_tokens())
    cases.append({"name": "three", "folder": str(folder / "three"), "parallel": EXPERTS, "refused": True})
    return folder, run_two_processes(folder, cases)


@modern
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_agree_with_one_process(seen: Any, name: str) -> None:
    folder, results = seen
    model, tokens = make(name)
    for result in results:
        assert_agree(folder / name, result[name], model, tokens)


@modern
@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_its_part(seen: Any, name: str) -> None:
    model, _ = make(name)
    parallel = CASES[name][0]
    for result in seen[1]:
        for parameter, weight in model.named_parameters():
            found = result[name]["local"][parameter]
            if "mlp.experts" in parameter and "ep_size" in parallel:
                assert found == [2, *weight.shape[1:]], parameter  # two of four experts, whole
            elif "fsdp_size" in parallel:
                assert sum(each[name]["local"][parameter][0] for each in seen[1]) == weight.shape[0], parameter
                assert found[0] < weight.shape[0], parameter


@modern
@pytest.mark.parametrize("name", [name for name, (parallel, _) in CASES.items() if parallel == TOGETHER])
def test_generates_the_same_with_half_of_the_experts_each(seen: Any, name: str) -> None:
    model, tokens = make(name)
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    assert [result[name]["generated"] for result in seen[1]] == [expected.tolist()] * 2


@modern
def test_experts_that_do_not_divide_are_refused(seen: Any) -> None:
    for result in seen[1]:
        assert "Cannot evenly shard 3 experts across 2 expert-parallel ranks" in result["three"]["error"]


@pytest.mark.parametrize("asked", [{"ep_size": 2, "fsdp_size": 2}, {"enable_expert_parallel": True, "tp_size": 2}])
def test_refused_below_the_transformers_that_has_it(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bamoe.modeling.parallel.transformers.__version__", "5.22.1")
    with pytest.raises(ValueError, match=r"needs transformers 5.23 or later, and this is 5\.22\.1"):
        BamoeForCausalLM.from_pretrained("anything", distributed_config=asked)


def test_router_losses_are_over_the_ranks_that_hold_batches() -> None:
    """Rank 0 of four: two halves of the heads times two batches."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        model = tiny_model()
        model.config.distributed_config = None
        assert torch.distributed.get_process_group_ranks(model.loss_group()) == [0, 1, 2, 3]
        model._tp_size = 2
        model._device_mesh = torch.distributed.init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("pp", "fsdp", "tp"))
        assert torch.distributed.get_process_group_ranks(model.loss_group()) == [0, 2]
        model._tp_size = 4
        model._device_mesh = torch.distributed.init_device_mesh("cpu", (1, 1, 4), mesh_dim_names=("pp", "fsdp", "tp"))
        assert model.loss_group() is None
    finally:
        torch.distributed.destroy_process_group()
