"""The masked language model of MoA: the paper's sizes, torch's Transformer as reference, padding, losses, export."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModel, AutoModelForMaskedLM, Trainer, TrainingArguments

from bamoe.checkpoints.loading import load_config, load_model
from bamoe.errors import CheckpointError
from bamoe.modeling import BamoeEncoderConfig, BamoeEncoderModel, BamoeForMaskedLM
from tests.modeling.conftest import random_tokens
from tests.modeling.moa_models import (
    DENSE,
    SIZES,
    SPARSE,
    checkpoint_gradients,
    gradients,
    masked_lm,
    naive_positions,
    naive_router_losses,
    silent_parameters,
    torch_layer,
)
from tests.modeling.stranger import run_without_bamoe


def millions(**changes) -> float:
    with torch.device("meta"):
        model = BamoeForMaskedLM(BamoeEncoderConfig(**changes))
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("experts", "head_dim", "paper"),
    [(8, 128, 52.45), (8, 256, 61.89), (16, 256, 78.75), (32, 256, 112.47), (64, 256, 179.91)],
)
def test_parameters_beyond_the_dense_model_are_the_papers(experts, head_dim, paper):
    dense = millions(num_attention_experts=1, num_attention_heads=8)
    mixture = millions(num_attention_experts=experts, num_attention_heads=experts, head_dim=head_dim)
    assert mixture - dense == pytest.approx(paper - 51.34, abs=0.02)


def test_defaults_are_the_papers_8k16e128d():
    config = BamoeEncoderConfig()
    assert (config.num_attention_experts, config.num_attention_experts_per_tok, config.head_dim) == (16, 8, 128)
    assert (config.num_key_value_heads, config.attention_gate_norm) == (1, "detached")
    dense = BamoeEncoderConfig(num_attention_experts=1, num_attention_heads=8)
    assert (dense.num_attention_experts_per_tok, dense.num_key_value_heads, dense.head_dim) == (1, 8, 64)
    grouped = BamoeEncoderConfig(num_attention_heads=32)
    assert (grouped.num_key_value_heads, grouped.head_dim) == (2, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_experts_per_tok": 7}, r"between 1 and num_attention_experts \(6\), found 7"),
        ({"num_attention_experts_per_tok": 0}, "between 1 and num_attention_experts"),
        ({"num_attention_experts": 0}, "num_attention_experts must be a positive integer, found 0"),
        ({"num_attention_experts": 4}, r"num_attention_heads \(6\) counts all experts"),
        ({"dropout": -0.1}, "dropout must be at least 0 and less than 1, found -0.1"),
        ({"attention_dropout": 1.0}, "attention_dropout must be at least 0"),
        ({"dropout": "0.1"}, "dropout"),
        ({"hidden_size": 33}, "hidden_size must be even"),
        ({"hidden_act": "rleu"}, "hidden_act must be one of .*'rleu'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_hiden_layers": 3}, "did you mean 'num_hidden_layers'"),
        ({"layer_norm_eps": 1e-6}, "did you mean 'norm_eps'"),
    ],
)
def test_refuses_what_no_model_can_be_built_from(changes, message):
    with pytest.raises(ValueError, match=message):
        BamoeEncoderConfig(**(SIZES | SPARSE | changes))


@pytest.mark.parametrize("norm_first", [False, True])
def test_one_expert_is_torchs_transformer(norm_first):
    model = masked_lm(**DENSE, norm_first=norm_first).model
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    expected = model.embed_tokens.weight[tokens] * 32**0.5 + naive_positions(9, 32)
    for layer in model.layers:
        expected = torch_layer(layer).train()(expected, src_key_padding_mask=mask == 0)
    if norm_first:
        expected = torch.nn.functional.layer_norm(expected, (32,), model.norm.weight, model.norm.bias, 1e-5)
    output = model(tokens, attention_mask=mask).last_hidden_state
    assert torch.allclose(output[mask == 1], expected[mask == 1], atol=1e-5)


def test_the_head_is_a_layer_a_norm_and_the_embeddings():
    model = masked_lm()
    tokens = random_tokens()
    hidden, head = model.model(tokens).last_hidden_state, model.lm_head
    inner = torch.relu(hidden @ head.dense.weight.T + head.dense.bias)
    inner = torch.nn.functional.layer_norm(inner, (32,), head.layer_norm.weight, head.layer_norm.bias, 1e-5)
    expected = inner @ model.model.embed_tokens.weight.T + head.decoder.bias
    assert torch.allclose(model(tokens).logits, expected, atol=1e-5)


def test_grouped_products_run_and_equal_the_eager_path(monkeypatch):
    model = masked_lm()
    calls, kernel = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *given, **options: calls.append(1) or kernel(*given, **options))
    tokens = random_tokens()
    fast = model(tokens).logits
    assert len(calls) == 4  # queries and outputs of two layers
    model.set_experts_implementation("eager")
    assert torch.allclose(model(tokens).logits, fast, atol=1e-5)
    assert len(calls) == 4


def test_embeddings_can_be_given():
    model = masked_lm()
    tokens = random_tokens()
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_a_sequence_longer_than_positions_is_refused():
    with pytest.raises(ValueError, match=r"65 tokens is longer than max_position_embeddings \(64\)"):
        masked_lm()(random_tokens(1, 65))


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_what_is_not_read_is_refused(name):
    tokens = random_tokens(1, 5)
    with pytest.raises(ValueError, match=f"{name} is not read here"):
        masked_lm()(tokens, **{name: torch.zeros_like(tokens)})


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_padding_changes_nothing(backend):
    model = masked_lm(attn_implementation=backend)
    assert model.config._attn_implementation == backend
    tokens = random_tokens(1, 7)
    alone = model(tokens).logits
    mask = pad(torch.ones_like(tokens), (0, 4))
    padded = pad(tokens, (0, 4))
    assert torch.allclose(model(padded, attention_mask=mask).logits[:, :7], alone, atol=1e-5)
    for side in ((4, 0), (0, 4)):
        mask = pad(torch.ones_like(tokens), side)
        quiet, noisy = pad(tokens, side), torch.where(mask == 1, pad(tokens, side), random_tokens(1, 11))
        left, right = (model(each, attention_mask=mask).logits[mask == 1] for each in (quiet, noisy))
        assert torch.allclose(left, right, atol=1e-5)


def test_padding_counts_in_no_loss():
    model = masked_lm().train()
    tokens, labels = random_tokens(1, 7), random_tokens(1, 7)
    labels[:, ::2] = -100
    alone = model(tokens, labels=labels)
    mask = pad(torch.ones_like(tokens), (0, 4))
    padded = model(pad(tokens, (0, 4)), attention_mask=mask, labels=pad(labels, (0, 4), value=-100))
    for name in ("loss", "aux_loss", "z_loss"):
        assert torch.allclose(getattr(padded, name), getattr(alone, name), rtol=1e-5), name


def test_the_training_loss_has_the_papers_parts():
    model = masked_lm()
    tokens, labels = random_tokens(), random_tokens()
    labels[:, ::3] = -100
    evaluated = model(tokens, labels=labels)
    plain = cross_entropy(evaluated.logits[labels != -100], labels[labels != -100])
    assert torch.allclose(evaluated.loss, plain)
    assert evaluated.aux_loss is None
    trained = model.train()(tokens, labels=labels, output_router_logits=True)
    naive = [naive_router_losses(logits, 2) for logits in trained.attention_router_logits]
    balance, z = (sum(each) for each in zip(*naive, strict=True))
    assert len(naive) == 2
    assert trained.aux_loss.item() == pytest.approx(balance, rel=1e-4)
    assert trained.loss.item() == pytest.approx(plain.item() + 0.01 * balance + 0.001 * z, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "balance"),
    [
        ({"num_attention_experts_per_tok": 6}, 2.0),
        ({"attention_routing": "soft", "num_attention_experts_per_tok": None}, None),
        (DENSE, None),
    ],
    ids=["k = E", "soft", "dense"],
)
def test_routers_without_a_choice_add_a_constant_or_nothing(changes, balance):
    tokens = random_tokens()
    output = masked_lm(**changes).train()(tokens, labels=tokens)
    if balance is None:
        assert output.aux_loss is None
        assert torch.allclose(output.loss, cross_entropy(output.logits.flatten(0, 1), tokens.flatten()))
    else:
        assert output.aux_loss.item() == pytest.approx(balance, rel=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_every_parameter_gets_a_gradient(norm_first):
    model = masked_lm(norm_first=norm_first).train()
    tokens = random_tokens(4)
    model(tokens, labels=tokens).loss.backward()
    assert silent_parameters(model) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = masked_lm(router_aux_loss_coef=1.0, router_z_loss_coef=0.1).train()
    tokens = random_tokens()
    other = copy.deepcopy(model)
    model(tokens, labels=tokens).loss.backward()
    checkpoint_gradients(other, reentrant)
    other(tokens, labels=tokens).loss.backward()
    assert any("gate" in name for name in gradients(model))
    for name, expected in gradients(model).items():
        assert torch.allclose(gradients(other)[name], expected, rtol=1e-4, atol=1e-6), name


def test_dropout_is_of_training_only():
    model = masked_lm(dropout=0.5, attention_dropout=0.5)
    tokens = random_tokens()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.allclose(model(tokens).logits, model(tokens).logits)


def test_a_router_the_task_cannot_train_is_refused_in_training():
    blind = {"num_attention_experts_per_tok": 1, "attention_gate_norm": "topk_softmax"}
    with pytest.warns(UserWarning, match="every gate is 1"):
        model = masked_lm(**blind).train()
    with pytest.raises(ValueError, match=r"self_attn\.gate"):
        model(random_tokens(), labels=random_tokens())


def train_one_step(model, rows, folder, accumulated):
    """The loss of one step of plain descent at rate 1, in batches of two rows."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=accumulated,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_trainer_accumulates_the_same_step(tmp_path):
    """The same rows twice in one step are those rows once, router losses included."""
    model = masked_lm(router_aux_loss_coef=1.0, router_z_loss_coef=0.1)
    accumulated, reference = copy.deepcopy(model), copy.deepcopy(model).train()
    tokens = random_tokens(2)
    labels = tokens.clone()
    labels[0, :5] = -100
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    losses = [
        train_one_step(model, rows, tmp_path / "once", accumulated=1),
        train_one_step(accumulated, rows * 2, tmp_path / "twice", accumulated=2),
    ]
    expected = reference(tokens, labels=labels)
    assert losses == pytest.approx([expected.loss.item()] * 2, rel=1e-3)
    expected.loss.backward()
    before = reference.get_parameter("model.layers.0.self_attn.gate.weight")
    for trained in (model, accumulated):
        after = trained.get_parameter("model.layers.0.self_attn.gate.weight")
        assert torch.allclose(after, before - before.grad, atol=1e-5)


def test_embeddings_are_tied_and_resized():
    model = masked_lm()
    assert model.lm_head.decoder.weight is model.model.embed_tokens.weight
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.lm_head.decoder.weight is model.model.embed_tokens.weight
    assert model(random_tokens(vocab_size=70)).logits.shape == (2, 12, 70)
    assert masked_lm(tie_word_embeddings=False).lm_head.decoder.weight.shape == (64, 32)


def test_projections_start_at_the_scale_of_their_width():
    """Else a narrow Transformer attends to nothing in particular for long."""
    model = BamoeForMaskedLM(BamoeEncoderConfig(**(SIZES | SPARSE | {"initializer_range": None})))
    layer, embeddings = model.model.layers[0], model.model.embed_tokens.weight
    for weight in (embeddings[1:], layer.self_attn.q_proj.weight, layer.mlp.fc1.weight, model.lm_head.dense.weight):
        assert weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert not embeddings[0].any()  # padding


def test_save_and_load_gives_the_same_model(tmp_path):
    model = masked_lm(norm_first=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    tokens = random_tokens()
    for loader in (BamoeForMaskedLM, AutoModelForMaskedLM):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    for loader in (BamoeEncoderModel, AutoModel):
        body = loader.from_pretrained(tmp_path)
        assert torch.equal(body(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    assert type(load_config(tmp_path)) is BamoeEncoderConfig
    with pytest.raises(CheckpointError, match=r"bamoe_encoder, which predicts no next tokens.*AutoModelForMaskedLM"):
        load_model(tmp_path)


def test_a_checkpoint_without_router_weights_is_refused(tmp_path):
    masked_lm().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "1.self_attn.gate" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the router weights .*1\.self_attn\.gate\.weight.*save_pretrained"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


STRANGER = """
folder, again = folders
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_attention_experts == 6
assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.model_type == "bamoe_encoder"
torch.save(model(torch.load(folder + "/tokens.pt")).logits.detach(), folder + "/logits.pt")
model.save_pretrained(again)
"""


def test_a_saved_model_loads_where_bamoe_is_absent_and_saves_again(tmp_path):
    model, tokens = masked_lm(), random_tokens()
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    torch.save(tokens, folder / "tokens.pt")
    run_without_bamoe(STRANGER, folder, again)
    assert torch.allclose(torch.load(folder / "logits.pt"), model(tokens).logits, atol=1e-6)
    files = {path.name for path in folder.glob("*.py")}
    assert {path.name for path in again.glob("*.py")} == files
    assert "modeling_bamoe_encoder.py" in files
    assert "feed_forward.py" not in files
    assert torch.equal(BamoeForMaskedLM.from_pretrained(again)(tokens).logits, model(tokens).logits)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_bamoe_encoder.BamoeEncoderConfig",
        "AutoModel": "modeling_bamoe_encoder.BamoeEncoderModel",
        "AutoModelForMaskedLM": "modeling_bamoe_encoder.BamoeForMaskedLM",
    }
