"""The README's files and commands, as written, on tiny models. (`make` itself is what runs this suite.)"""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TEXTS = [f"def main(x{i}): return {i} + len('the quick brown fox')" for i in range(300)]


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block that a reader would use on models of their own."""
    own_models = README.split("## Your own models")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", own_models, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with the models and texts that the README names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    for seed, name in enumerate(("seed", "code", "law", "math")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "models" / name)
        fast.save_pretrained(tmp_path / "models" / name)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    with gzip.open(tmp_path / "code.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(rows)
    (tmp_path / "code.valid.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "general.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    return tmp_path


def test_the_commands_work_as_written(folder):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules-cache"), "COLUMNS": "200"}
    ran = []
    for language, text in blocks():
        if language == "yaml":
            name = re.match(r"# (\S+\.yaml)", text)[1]
            (folder / name).write_text(text, encoding="utf-8")
            continue
        if text.startswith("pip install"):
            continue  # the suite runs in an environment made by it
        command = ["bash", "-ec", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        ran.append(done.stdout)
    assert len(ran) == 3
    plan, trained, generated = ran
    assert "model.layers.*.mlp.experts.gate_up_proj" in plan
    assert "perplexity" in trained.lower()
    assert generated.startswith("def main(")
