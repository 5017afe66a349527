"""PEFT and pipelines on a mixture."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from bamoe.modeling import BamoeForCausalLM
from tests.modeling.conftest import random_tokens, tiny_model

ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "fused experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "attention, routers in full": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_lora_trains_saves_and_merges(tmp_path, adapter):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    tokens = random_tokens()
    before = base(tokens).logits.detach()
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, **adapter)).train()
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval()
    adapted = model(tokens).logits.detach()
    assert (adapted - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(BamoeForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.allclose(again(tokens).logits, adapted, atol=1e-5)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(tokens).logits, adapted, atol=1e-4)


def test_all_linear_leaves_the_routers_alone():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert any(name.endswith("q_proj") for name in adapted)
    assert not any("gate" in name for name in adapted)


def test_text_generation_pipeline():
    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", padding_side="left")
    generator = pipeline("text-generation", model=tiny_model(), tokenizer=fast, device="cpu")
    texts = generator(["w5 w6 w7", "w9"], max_new_tokens=4, do_sample=False, batch_size=2)
    assert [text[0]["generated_text"].startswith(p) for text, p in zip(texts, ("w5 w6 w7", "w9"), strict=True)]
