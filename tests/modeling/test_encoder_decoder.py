"""The encoder-decoder of MoA: torch's Transformer as reference, padding, losses, export."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, pad
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from bamoe.checkpoints.loading import load_config, load_model
from bamoe.errors import CheckpointError
from bamoe.modeling import BamoeEncoderDecoderConfig, BamoeEncoderDecoderModel, BamoeForConditionalGeneration
from tests.modeling.conftest import random_tokens
from tests.modeling.moa_models import (
    DENSE,
    SIZES,
    SPARSE,
    checkpoint_gradients,
    gradients,
    naive_positions,
    naive_router_losses,
    silent_parameters,
    torch_layer,
    translator,
)
from tests.modeling.stranger import run_without_bamoe


def padded_source() -> dict[str, torch.Tensor]:
    """Two sentences, the second of 4 tokens."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": random_tokens(2, 9) * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_experts_per_tok": 7}, r"between 1 and num_attention_experts \(6\), found 7"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and less than 1, found 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0"),
        ({"dropout": float("nan")}, "dropout must be at least 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be a positive integer"),
        ({"decoder_layers": 2}, "did you mean 'num_decoder_layers'"),
        ({"decoder_start_token_id": 64}, "decoder_start_token_id 64 is not among the 64 tokens"),
        ({"hidden_size": 33}, "hidden_size must be even"),
    ],
)
def test_refuses_what_no_model_can_be_built_from(changes, message):
    with pytest.raises(ValueError, match=message):
        BamoeEncoderDecoderConfig(**(SIZES | SPARSE | changes))


@pytest.mark.parametrize("norm_first", [False, True])
def test_one_expert_is_torchs_transformer(norm_first):
    model = translator(**DENSE, norm_first=norm_first).model
    source, target = padded_source(), random_tokens(2, 7)
    padding = source["attention_mask"] == 0

    def embedded(tokens):
        return model.encoder.embed_tokens.weight[tokens] * 32**0.5 + naive_positions(tokens.shape[1], 32)

    def last_norm(hidden, norm):
        return torch.nn.functional.layer_norm(hidden, (32,), norm.weight, norm.bias, 1e-5) if norm_first else hidden

    memory = embedded(source["input_ids"])
    for layer in model.encoder.layers:
        memory = torch_layer(layer).train()(memory, src_key_padding_mask=padding)
    memory = last_norm(memory, model.encoder.norm)
    expected = embedded(target)
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for layer in model.decoder.layers:
        expected = torch_layer(layer)(expected, memory, tgt_mask=later, memory_key_padding_mask=padding)
    expected = last_norm(expected, model.decoder.norm)
    output = model(**source, decoder_input_ids=target)
    assert torch.allclose(output.encoder_last_hidden_state[~padding], memory[~padding], atol=1e-5)
    assert torch.allclose(output.last_hidden_state, expected, atol=1e-5)


def test_one_table_embeds_source_and_target_and_predicts():
    model = translator()
    table = model.model.encoder.embed_tokens.weight
    assert model.model.decoder.embed_tokens.weight is table
    assert model.lm_head.weight is table
    untied = translator(tie_word_embeddings=False)
    more = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in model.parameters())
    assert more == 2 * 64 * 32


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized_together(tied):
    model = translator(tie_word_embeddings=tied)
    model.resize_token_embeddings(70, mean_resizing=False)
    tokens = random_tokens(vocab_size=70)
    assert model(input_ids=tokens, decoder_input_ids=tokens).logits.shape == (2, 12, 70)
    assert model.config.vocab_size == model.model.decoder.embed_tokens.num_embeddings == 70


def test_a_sequence_longer_than_positions_is_refused():
    model = translator()
    with pytest.raises(ValueError, match=r"65 tokens is longer than max_position_embeddings \(64\)"):
        model(input_ids=random_tokens(1, 65), labels=random_tokens(1, 3))
    with pytest.raises(ValueError, match="65 tokens is longer"):
        model(input_ids=random_tokens(1, 3), labels=random_tokens(1, 65))


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_what_is_not_read_is_refused_by_both_stacks(name):
    model, tokens = translator().model, random_tokens(1, 5)
    states = model.encoder(tokens).last_hidden_state
    for stack, inputs in ((model.encoder, {}), (model.decoder, {"encoder_hidden_states": states})):
        with pytest.raises(ValueError, match=f"{name} is not read here"):
            stack(input_ids=tokens, **inputs, **{name: torch.zeros_like(tokens)})


def test_a_training_step_compiles_whole():
    model = translator().train()
    batch = padded_source() | {"labels": random_tokens(2, 6)}
    other = copy.deepcopy(model)
    expected = other(**batch).loss
    expected.backward()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).loss
    found.backward()
    assert torch.allclose(found, expected, rtol=1e-5)
    for name, gradient in gradients(other).items():
        assert torch.allclose(gradients(model)[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("tied", [True, False])
def test_every_rule_for_sharding_is_for_some_module(tied):
    model = translator(tie_word_embeddings=tied)
    names = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()}
    assert set(model._fsdp_plan) == {"model.encoder.layers.*", "model.decoder.layers.*"}
    assert set(model._fsdp_plan) <= names


def test_router_losses_of_encoder_outputs_count_if_they_have_logits():
    model = translator().train()
    source, labels = padded_source(), random_tokens(2, 6)
    expected = model(**source, labels=labels)
    encoded = {wanted: model.model.encoder(**source, output_router_logits=wanted) for wanted in (True, False)}
    given, without = (
        model(encoder_outputs=encoded[wanted], attention_mask=source["attention_mask"], labels=labels)
        for wanted in (True, False)
    )
    assert torch.allclose(given.loss, expected.loss)
    assert torch.allclose(given.aux_loss, expected.aux_loss)
    assert without.aux_loss < expected.aux_loss - 1


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_source_padding_changes_nothing(backend):
    model = translator(attn_implementation=backend)
    source, target = random_tokens(1, 7), random_tokens(1, 5)
    alone = model(input_ids=source, decoder_input_ids=target).logits
    mask = pad(torch.ones_like(source), (0, 4))
    padded = model(input_ids=pad(source, (0, 4)), attention_mask=mask, decoder_input_ids=target).logits
    assert torch.allclose(padded, alone, atol=1e-5)
    for side in ((4, 0), (0, 4)):
        mask = pad(torch.ones_like(source), side)
        noisy = torch.where(mask == 1, pad(source, side), random_tokens(1, 11))
        left, right = (
            model(input_ids=each, attention_mask=mask, decoder_input_ids=target).logits
            for each in (pad(source, side), noisy)
        )
        assert torch.allclose(left, right, atol=1e-5)


def test_targets_see_no_later_target():
    model = translator()
    source, target = random_tokens(), random_tokens(2, 8)
    other = target.clone()
    other[:, 5:] = random_tokens(2, 3)
    left, right = (model(input_ids=source, decoder_input_ids=each).logits[:, :5] for each in (target, other))
    assert torch.allclose(left, right, atol=1e-5)


def test_labels_are_shifted_right():
    model = translator()
    labels = torch.tensor([[5, 6, 1], [7, 1, -100]])
    inputs = torch.tensor([[2, 5, 6], [2, 7, 1]])
    source = random_tokens()
    given = model(input_ids=source, decoder_input_ids=inputs, labels=labels)
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), inputs)
    assert torch.equal(model(input_ids=source, labels=labels).logits, given.logits)
    assert torch.equal(
        model.prepare_decoder_input_ids_from_labels(torch.tensor([[5, -100, -100]])), torch.tensor([[2, 5, 0]])
    )


def test_labels_cannot_be_shifted_without_padding_and_start():
    model = translator(decoder_start_token_id=None, bos_token_id=None)
    with pytest.raises(ValueError, match="the config has None, None and 0"):
        model(input_ids=random_tokens(), labels=random_tokens())


def test_padding_counts_in_no_loss():
    model = translator().train()
    source, labels = random_tokens(1, 7), random_tokens(1, 5)
    alone = model(input_ids=source, labels=labels)
    mask = pad(torch.ones_like(source), (0, 4))
    target_mask = pad(torch.ones_like(labels), (0, 3))
    inputs = {
        "input_ids": pad(source, (0, 4)),
        "attention_mask": mask,
        "labels": pad(labels, (0, 3), value=-100),
    }
    for more in ({}, {"decoder_attention_mask": target_mask}):
        padded = model(**inputs, **more)
        for name in ("loss", "aux_loss", "z_loss"):
            assert torch.allclose(getattr(padded, name), getattr(alone, name), rtol=1e-5), name
    # Without labels, padding among the decoder's inputs.
    start = {"decoder_input_ids": torch.tensor([[0, 5, 6]]), "output_router_logits": True}
    alone = model(input_ids=source, **start)
    start["decoder_input_ids"] = pad(start["decoder_input_ids"], (0, 2))
    padded = model(input_ids=source, **start)
    assert torch.allclose(padded.aux_loss, alone.aux_loss, rtol=1e-5)


def test_the_training_loss_has_the_papers_parts():
    model = translator(label_smoothing=0.1)
    source = padded_source()
    labels = random_tokens(2, 6)
    labels[1, 3:] = -100
    evaluated = model(**source, labels=labels)
    real = labels != -100
    plain = cross_entropy(evaluated.logits[real], labels[real])
    assert torch.allclose(evaluated.loss, plain)
    assert evaluated.aux_loss is None
    smoothed = 0.9 * plain - 0.1 * evaluated.logits[real].log_softmax(-1).mean()
    trained = model.train()(**source, labels=labels, output_router_logits=True)
    masks = [source["attention_mask"] == 1] * 2 + [real] * 6
    routers = (
        *trained.encoder_attention_router_logits,
        *trained.decoder_attention_router_logits,
        *trained.cross_attention_router_logits,
    )
    naive = [naive_router_losses(logits[mask.flatten()], 2) for logits, mask in zip(routers, masks, strict=True)]
    balance, z = (sum(each) for each in zip(*naive, strict=True))
    assert trained.aux_loss.item() == pytest.approx(balance, rel=1e-4)
    assert trained.z_loss.item() == pytest.approx(z, rel=1e-4)
    assert trained.loss.item() == pytest.approx(smoothed.item() + 0.01 * balance + 0.001 * z, rel=1e-4)


def test_accumulation_weighs_steps_by_their_label_tokens():
    model = translator(label_smoothing=0.1).train()
    batches = [(random_tokens(1, 9), random_tokens(1, 11)), (random_tokens(1, 5), random_tokens(1, 4))]
    summed = sum(
        model(input_ids=source, labels=labels, num_items_in_batch=torch.tensor(15)).loss for source, labels in batches
    )
    means = [model(input_ids=source, labels=labels).loss for source, labels in batches]
    assert torch.allclose(summed, (11 * means[0] + 4 * means[1]) / 15, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_every_parameter_gets_a_gradient(norm_first):
    model = translator(norm_first=norm_first).train()
    model(input_ids=random_tokens(4), labels=random_tokens(4)).loss.backward()
    assert silent_parameters(model) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = translator(router_aux_loss_coef=1.0, router_z_loss_coef=0.1).train()
    source, labels = padded_source(), random_tokens()
    other = copy.deepcopy(model)
    model(**source, labels=labels).loss.backward()
    checkpoint_gradients(other, reentrant)
    other(**source, labels=labels).loss.backward()
    assert sum("gate" in name for name in gradients(model)) == 8
    for name, expected in gradients(model).items():
        assert torch.allclose(gradients(other)[name], expected, rtol=1e-4, atol=1e-6), name


def test_a_router_the_task_cannot_train_is_refused_in_training():
    blind = {"num_attention_experts_per_tok": 1, "attention_gate_norm": "topk_softmax"}
    with pytest.warns(UserWarning, match=r"self_attn\.gate and encoder_attn\.gate"):
        model = translator(**blind).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn.gate" not in name)
    with pytest.raises(ValueError, match=r"^encoder_attn\.gate: "):
        model(input_ids=random_tokens(), labels=random_tokens())


def test_seq2seq_trainer_trains_and_translates(tmp_path):
    from tokenizers import Tokenizer, models

    model = translator(router_aux_loss_coef=1.0, router_z_loss_coef=0.1, label_smoothing=0.1)
    reference = copy.deepcopy(model).train()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2")
    sources, targets = random_tokens(4, 8), random_tokens(4, 6)
    rows = [
        {"input_ids": source[:length].tolist(), "labels": target[: length - 2].tolist()}
        for source, target, length in zip(sources, targets, (8, 8, 5, 5), strict=True)
    ]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        predict_with_generate=True,
        generation_num_beams=2,
        generation_max_length=6,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    batches = [collator([dict(row) for row in rows[i : i + 2]]) for i in (0, 2)]
    items = sum((batch["labels"] != -100).sum() for batch in batches)
    expected = sum(reference(**batch, num_items_in_batch=items).loss for batch in batches)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[0] == 4
    assert set(predicted.predictions[:, 0].tolist()) == {2}


def test_save_and_load_gives_the_same_model(tmp_path):
    model = translator(norm_first=True)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.encoder.embed_tokens.weight" in names
    assert not {"model.decoder.embed_tokens.weight", "lm_head.weight"} & names
    source, target = padded_source(), random_tokens(2, 5)
    expected = model(**source, decoder_input_ids=target)
    for loader in (BamoeForConditionalGeneration, AutoModelForSeq2SeqLM):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again(**source, decoder_input_ids=target).logits, expected.logits)
        assert again.lm_head.weight is again.model.decoder.embed_tokens.weight
    for loader in (BamoeEncoderDecoderModel, AutoModel):
        body = loader.from_pretrained(tmp_path)
        hidden = body(**source, decoder_input_ids=target).last_hidden_state
        assert torch.allclose(hidden @ body.decoder.embed_tokens.weight.T, expected.logits, atol=1e-5)
    assert type(load_config(tmp_path)) is BamoeEncoderDecoderConfig
    with pytest.raises(CheckpointError, match=r"bamoe_encoder_decoder, which predicts no.*AutoModelForSeq2SeqLM"):
        load_model(tmp_path)


def test_untied_embeddings_are_saved_and_loaded(tmp_path):
    model = translator(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    source, target = padded_source(), random_tokens(2, 5)
    left, right = (each(**source, decoder_input_ids=target).logits for each in (model, again))
    assert torch.equal(left, right)


def test_a_checkpoint_without_router_weights_is_refused(tmp_path):
    translator().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "decoder.layers.2.encoder_attn.gate" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the router weights .*2\.encoder_attn\.gate\.weight"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


def test_attention_weights_and_hidden_states_on_request():
    model = translator(attn_implementation="eager")
    source, target = padded_source(), random_tokens(2, 5)
    output = model(**source, decoder_input_ids=target, output_attentions=True, output_hidden_states=True)
    assert (len(output.encoder_hidden_states), len(output.decoder_hidden_states)) == (3, 4)
    assert [len(each) for each in (output.encoder_attentions, output.decoder_attentions, output.cross_attentions)] == [
        2,
        3,
        3,
    ]
    assert output.cross_attentions[0].shape == (2, 2, 5, 9)  # k heads of one token to the source
    assert not output.cross_attentions[0][1, :, :, 4:].any()


STRANGER = """
folder, again = folders
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_decoder_layers == 3
assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.model_type == "bamoe_encoder_decoder"
generated = model.generate(torch.load(folder + "/tokens.pt"), num_beams=2, max_new_tokens=5, do_sample=False)
torch.save(generated, folder + "/generated.pt")
model.save_pretrained(again)
"""


def test_a_saved_model_loads_where_bamoe_is_absent_and_saves_again(tmp_path):
    model, tokens = translator(), random_tokens()
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    torch.save(tokens, folder / "tokens.pt")
    run_without_bamoe(STRANGER, folder, again)
    expected = model.generate(tokens, num_beams=2, max_new_tokens=5, do_sample=False)
    assert torch.equal(torch.load(folder / "generated.pt"), expected)
    files = {path.name for path in folder.glob("*.py")}
    assert {path.name for path in again.glob("*.py")} == files
    assert not {"feed_forward.py", "modeling_bamoe.py", "modeling_bamoe_encoder.py"} & files
    reloaded = BamoeForConditionalGeneration.from_pretrained(again)
    assert torch.equal(reloaded.generate(tokens, num_beams=2, max_new_tokens=5, do_sample=False), expected)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_bamoe_encoder_decoder.BamoeEncoderDecoderConfig",
        "AutoModel": "modeling_bamoe_encoder_decoder.BamoeEncoderDecoderModel",
        "AutoModelForSeq2SeqLM": "modeling_bamoe_encoder_decoder.BamoeForConditionalGeneration",
    }
