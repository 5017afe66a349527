"""Directories that others load: save and load, remote code without bamoe, other tools' names, refused checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bamoe.modeling import BamoeForCausalLM
from tests.modeling.conftest import random_tokens, tiny_model
from tests.modeling.stranger import run_without_bamoe

# Runs where bamoe cannot be imported: loads the directory by remote code, checks the experts backend, saves it again.
STRANGER = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, again = folders
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_experts == 3
assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.model_type == "bamoe"
calls, kernel = [], torch.nn.functional.grouped_mm
torch.nn.functional.grouped_mm = lambda *given, **options: calls.append(1) or kernel(*given, **options)
tokens = torch.load(folder + "/tokens.pt")
torch.save(model(tokens).logits.detach(), folder + "/logits.pt")
assert len(calls) == 4, f"grouped_mm ran {len(calls)} times"
generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
torch.save(generated, folder + "/generated.pt")
model.save_pretrained(again)
"""


def test_save_and_load_gives_the_same_model(tmp_path):
    model = tiny_model(key_value="shared", attention_bias=True, attention_output_bias=True, qk_norm="expert")
    model.save_pretrained(tmp_path)
    tokens = random_tokens()
    for loader in (BamoeForCausalLM, AutoModelForCausalLM):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_names_that_other_tools_expect():
    names = {name: tuple(p.shape) for name, p in tiny_model().named_parameters() if ".0." in name}
    prefix = "model.layers.0."
    assert names[prefix + "self_attn.gate.weight"] == (3, 32)
    assert names[prefix + "mlp.gate.weight"] == (3, 32)
    assert names[prefix + "mlp.experts.gate_up_proj"] == (3, 96, 32)
    assert names[prefix + "mlp.experts.down_proj"] == (3, 32, 48)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert prefix + f"self_attn.{projection}.weight" in names


def test_a_trainer_checkpoint_loads_where_bamoe_is_absent_and_saves_again(tmp_path):
    model = tiny_model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(8)]
    Trainer(model, arguments, train_dataset=rows).train()
    folder, again = tmp_path / "run" / "checkpoint-1", tmp_path / "again"
    tokens = random_tokens()
    torch.save(tokens, folder / "tokens.pt")
    run_without_bamoe(STRANGER, folder, again)
    model.eval()
    assert torch.allclose(torch.load(folder / "logits.pt"), model(tokens).logits, atol=1e-6)
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
    assert torch.equal(torch.load(folder / "generated.pt"), expected)
    assert {path.name for path in again.glob("*.py")} == {path.name for path in folder.glob("*.py")}
    reloaded = BamoeForCausalLM.from_pretrained(again)
    assert torch.equal(reloaded(tokens).logits, model(tokens).logits)


def rewritten(tmp_path: Path, change) -> Path:
    """A saved model whose tensors were changed by `change(dict)`."""
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(change(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("router", ["mlp.gate.weight", "self_attn.gate.weight"])
@pytest.mark.parametrize("loader", [BamoeForCausalLM, AutoModelForCausalLM])
def test_a_checkpoint_without_router_weights_is_refused(tmp_path, router, loader):
    folder = rewritten(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(router)})
    with pytest.raises(ValueError, match=rf"lacks the router weights .*{router}.*bamoe upcycle"):
        loader.from_pretrained(folder)


def test_a_checkpoint_without_an_expert_tensor_is_refused(tmp_path):
    folder = rewritten(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if "1.mlp.experts.down" not in k})
    with pytest.raises(ValueError, match=r"lacks the weights .*experts\.down_proj"):
        BamoeForCausalLM.from_pretrained(folder)


def test_one_tensor_per_expert_is_read_and_saved_fused(tmp_path):
    def unfuse(tensors):
        unfused = {}
        for name, value in tensors.items():
            stem = name.rsplit(".", 1)[0]
            if name.endswith("gate_up_proj"):
                for e, expert in enumerate(value):
                    gate, up = expert.chunk(2)
                    unfused[f"{stem}.{e}.gate_proj.weight"] = gate.contiguous()
                    unfused[f"{stem}.{e}.up_proj.weight"] = up.contiguous()
            elif name.endswith("experts.down_proj"):
                unfused |= {f"{stem}.{e}.down_proj.weight": expert.clone() for e, expert in enumerate(value)}
            else:
                unfused[name] = value
        return unfused

    original = tiny_model()
    original.save_pretrained(tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    save_file(unfuse(fused), tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    model = BamoeForCausalLM.from_pretrained(tmp_path / "fused")
    tokens = random_tokens()
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == fused.keys()


def test_tied_embeddings_are_stored_once(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = BamoeForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_the_config_names_its_own_code(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_bamoe.BamoeConfig",
        "AutoModel": "modeling_bamoe.BamoeModel",
        "AutoModelForCausalLM": "modeling_bamoe.BamoeForCausalLM",
    }
