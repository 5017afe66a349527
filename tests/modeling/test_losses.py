"""Router losses inside a training step: defaults, padding, accumulation, several ranks, checkpointing, dtypes."""

import copy
import os

import pytest
import torch
import torch.multiprocessing as mp

from bamoe.modeling import BamoeForCausalLM
from bamoe.modeling.losses import router_losses
from tests.modeling.conftest import random_tokens, tiny_config, tiny_model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-6), name


def test_on_by_default_while_training_and_off_in_evaluation():
    model = tiny_model()
    tokens = random_tokens()
    evaluated = model(tokens, labels=tokens)
    assert evaluated.aux_loss is None
    assert evaluated.router_logits is None
    model.train()
    trained = model(tokens, labels=tokens)
    extra = 0.01 * trained.aux_loss + 0.001 * trained.z_loss
    assert torch.allclose(trained.loss, evaluated.loss + extra)
    assert extra > 0


def test_values_are_those_of_the_router_logits():
    model = tiny_model().train()
    tokens = random_tokens()
    output = model(tokens, labels=tokens, output_router_logits=True)
    expected = router_losses(output.router_logits, top_k=2)
    assert torch.allclose(output.aux_loss, expected.load_balance)
    assert torch.allclose(output.z_loss, expected.z)
    assert len(output.router_logits) == len(output.attention_router_logits) == 2
    assert all(logits.shape == (24, 3) and logits.dtype == torch.float32 for logits in output.router_logits)


def test_top_k_attention_routers_are_balanced_too():
    model = tiny_model(attention_routing="top_k", num_attention_experts_per_tok=1).train()
    tokens = random_tokens()
    output = model(tokens, labels=tokens, output_router_logits=True)
    expected = router_losses(output.router_logits, 2).load_balance
    expected = expected + router_losses(output.attention_router_logits, 1).load_balance
    assert torch.allclose(output.aux_loss, expected)


def test_soft_routing_everywhere_needs_no_router_losses():
    model = tiny_model(feed_forward_routing="soft", num_experts_per_tok=None).train()
    tokens = random_tokens()
    assert model(tokens, labels=tokens).aux_loss is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side):
    model = tiny_model().train()
    tokens = random_tokens(1, 9)
    alone = model(tokens, labels=tokens)
    pad = (3, 0) if side == "left" else (0, 3)
    padded = torch.nn.functional.pad(tokens, pad)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), pad)
    labels = torch.nn.functional.pad(tokens, pad, value=-100)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    output = model(padded, attention_mask=mask, position_ids=positions, labels=labels)
    assert torch.allclose(output.aux_loss, alone.aux_loss, rtol=1e-5)
    assert torch.allclose(output.z_loss, alone.z_loss, rtol=1e-4)


def test_accumulated_steps_weigh_as_much_as_one():
    """The same batch twice, accumulated with num_items_in_batch as Trainer does, is the batch once."""
    model = tiny_model().train()
    tokens = random_tokens()
    model(tokens, labels=tokens).loss.backward()
    once = gradients(model)
    model.zero_grad()
    items = 2 * tokens[:, 1:].numel()
    for _ in range(2):
        model(tokens, labels=tokens, num_items_in_batch=items).loss.backward()
    assert_same_gradients(gradients(model), once)


def test_accumulation_weighs_steps_by_their_label_tokens():
    model = tiny_model().train()
    long, short = random_tokens(1, 12), random_tokens(1, 5)
    items = torch.tensor(11 + 4)
    summed = sum(model(t, labels=t, num_items_in_batch=items).loss for t in (long, short))
    means = [model(t, labels=t).loss for t in (long, short)]
    assert torch.allclose(summed, (11 * means[0] + 4 * means[1]) / 15, rtol=1e-6)


def _train_on_rank(rank: int, folder: str, backend_file: str, with_items: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{backend_file}", rank=rank, world_size=2)
    model = BamoeForCausalLM.from_pretrained(folder).train()
    batch = torch.load(f"{folder}/batch.pt")
    # Rank 0 gets a long and a short row, rank 1 one padded row: the ranks' token counts differ.
    rows = slice(0, 2) if rank == 0 else slice(2, 3)
    replica = torch.nn.parallel.DistributedDataParallel(model)
    inputs = {name: value[rows] for name, value in batch.items()}
    if with_items:
        items = (batch["labels"][:, 1:] != -100).sum()
        loss = replica(**inputs, num_items_in_batch=items).loss * 2  # as Trainer undoes DDP's averaging
    else:
        loss = replica(**inputs).loss
    loss.backward()
    if rank == 0:
        torch.save(gradients(model), f"{folder}/gradients.pt")
    torch.distributed.barrier()
    # Nothing is left to do, and gloo's threads can deadlock while two processes take each other's connections down.
    os._exit(0)


# Capacities are of the tokens of one process, so that with them two processes are not one.
ZERO_COMPUTATION = {
    "num_zero_experts": 1,
    "num_copy_experts": 1,
    "num_constant_experts": 1,
    "expert_capacity_factor": 0,
}


@pytest.mark.parametrize("experts", [{}, ZERO_COMPUTATION], ids=["plain", "zero-computation"])
def test_two_ranks_equal_one_process_on_the_same_global_batch(tmp_path, experts):
    model = tiny_model(router_aux_loss_coef=1.0, router_z_loss_coef=0.1, **experts).train()
    model.save_pretrained(tmp_path)
    tokens = random_tokens(3, 12)
    mask = torch.ones_like(tokens)
    mask[1, 6:], mask[2, 9:] = 0, 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    torch.save(batch, tmp_path / "batch.pt")
    model(**batch).loss.backward()
    mp.spawn(_train_on_rank, (str(tmp_path), str(tmp_path / "rendezvous"), True), nprocs=2)
    assert_same_gradients(torch.load(tmp_path / "gradients.pt"), gradients(model))


def test_two_ranks_balance_the_global_batch_without_item_counts(tmp_path):
    """Plain DDP averages the ranks' means; with equal ranks that is the global mean."""
    model = tiny_model(router_aux_loss_coef=1.0, router_z_loss_coef=0.1).train()
    model.save_pretrained(tmp_path)
    tokens = random_tokens(3, 12)
    batch = {"input_ids": torch.cat([tokens, tokens[2:]]), "labels": torch.cat([tokens, tokens[2:]])}
    # Rank 0 takes rows 0 and 1, rank 1 row 2; in one process row 2 counts twice, so that both ranks weigh the same.
    torch.save({"input_ids": tokens, "labels": tokens}, tmp_path / "batch.pt")
    coefficients = (model.config.router_aux_loss_coef, model.config.router_z_loss_coef)
    model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.0
    model(**batch).loss.backward()
    cross_entropy = gradients(model)
    model.zero_grad()
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = coefficients
    output = model(tokens, labels=tokens)
    (coefficients[0] * output.aux_loss + coefficients[1] * output.z_loss).backward()
    routers = gradients(model)
    mp.spawn(_train_on_rank, (str(tmp_path), str(tmp_path / "rendezvous"), False), nprocs=2)
    expected = {name: grad + routers[name] if name in routers else grad for name, grad in cross_entropy.items()}
    assert_same_gradients(torch.load(tmp_path / "gradients.pt"), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = tiny_model(router_aux_loss_coef=1.0, router_z_loss_coef=0.1).train()
    tokens = random_tokens()
    model(tokens, labels=tokens).loss.backward()
    expected = gradients(model)
    other = copy.deepcopy(model)
    other.zero_grad()
    if hasattr(other, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        other.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        other.enable_input_require_grads()
    other(tokens, labels=tokens).loss.backward()
    assert_same_gradients(gradients(other), expected)


@pytest.mark.parametrize("key_value", ["experts", "shared"])
def test_every_parameter_gets_a_gradient(key_value):
    model = BamoeForCausalLM(
        tiny_config(key_value, attention_bias=True, attention_output_bias=True, qk_norm="expert")
    ).train()
    tokens = random_tokens()
    model(tokens, labels=tokens).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A key bias shifts all scores of a query alike, so the softmax does not see it; queries start with no bias.
    assert [name for name in silent if "k_proj.bias" not in name] == []


TOP_1_RENORMALISED = {"num_experts_per_tok": 1, "norm_topk_prob": True}


def test_a_router_the_task_cannot_train_is_warned_of_when_built():
    with pytest.warns(UserWarning, match="every gate is 1"):
        tiny_model(**TOP_1_RENORMALISED)


def test_a_router_the_task_cannot_train_is_refused_in_training_unless_frozen():
    with pytest.warns(UserWarning, match="every gate is 1"):
        model = tiny_model(**TOP_1_RENORMALISED)
    tokens = random_tokens()
    model(tokens, labels=tokens)  # evaluation is fine
    model.train()
    with pytest.raises(ValueError, match=r"mlp\.gate.*freeze these routers"):
        model(tokens, labels=tokens)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.gate" not in name)
    model(tokens, labels=tokens).loss.backward()


def test_the_task_alone_trains_routers_with_true_probabilities():
    model = tiny_model(num_experts_per_tok=1, router_aux_loss_coef=0.0, router_z_loss_coef=0.0).train()
    tokens = random_tokens()
    model(tokens, labels=tokens).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 1e-4


def test_both_kinds_of_blind_routers_are_seen():
    blind = TOP_1_RENORMALISED | {
        "attention_routing": "top_k",
        "num_attention_experts_per_tok": 1,
        "attention_gate_norm": "topk_softmax",
    }
    with pytest.warns(UserWarning, match=r"mlp\.gate and self_attn\.gate"):
        model = tiny_model(**blind).train()
    tokens = random_tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.gate" not in name)
    with pytest.raises(ValueError, match=r"^self_attn\.gate: "):
        model(tokens, labels=tokens)


@pytest.mark.parametrize("adapter", [{"modules_to_save": ["mlp.gate"]}, {"target_parameters": ["mlp.gate.weight"]}])
def test_a_blind_router_that_an_adapter_trains_is_refused(adapter):
    from peft import LoraConfig, get_peft_model

    with pytest.warns(UserWarning, match="every gate is 1"):
        model = tiny_model(**TOP_1_RENORMALISED)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **adapter)).train()
    tokens = random_tokens()
    with pytest.raises(ValueError, match=r"mlp\.gate"):
        adapted(input_ids=tokens, labels=tokens)


def test_a_loss_of_ones_own_can_ask_for_the_router_losses():
    model = tiny_model().train()
    tokens = random_tokens()
    with_labels = model(tokens, labels=tokens)
    own = model(tokens, output_router_logits=True)
    assert own.loss is None
    assert torch.equal(own.aux_loss, with_labels.aux_loss)
    assert torch.equal(own.z_loss, with_labels.z_loss)
    assert own.aux_loss.requires_grad
