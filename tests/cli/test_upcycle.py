"""`bamoe upcycle` through its command line: what it builds, what it prints, what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM

from bamoe.cli.main import main
from bamoe.recipes.schema import Recipe
from bamoe.training import TrainConfig

WIDTH, INNER, LAYERS, VOCABULARY = 32, 48, 2, 40


def save_llama(directory: Path, seed: int, **changes) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **changes,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path) -> Path:
    Tokenizer(tokenizer_models.WordLevel({"a": 0, "b": 1}, unk_token="b")).save(str(directory / "words.json"))
    return directory / "words.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("seed", "code", "law")):
        save_llama(root / name, i)
    save_llama(root / "narrow", 3, rms_norm_eps=1e-5)
    save_llama(root / "other", 4, hidden_act="gelu", rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    return root


def write_recipe(path: Path, models: Path, *experts: str, **keys) -> str:
    listed = [{"name": name, "model": str(models / name)} for name in experts]
    path.write_text(yaml.safe_dump({"recipe": "bam", "seed": str(models / "seed"), "experts": listed} | keys))
    return str(path)


@pytest.fixture
def recipe(tmp_path, models) -> str:
    return write_recipe(tmp_path / "recipe.yaml", models, "seed", "code", "law")


def test_a_mixture_is_built_and_announced(recipe, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["upcycle", recipe, str(out)]) == 0
    captured = capfd.readouterr()
    stored = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert f"{out}: {stored:,} parameters" in captured.out
    for command in (f"bamoe inspect {out}", "bamoe train CONFIG.yaml", f"bamoe generate {out}"):
        assert command in captured.out
    card = (out / "README.md").read_text()
    for line in (
        "AutoModelForCausalLM.from_pretrained",
        "trust_remote_code=True",
        "random and untrained",
        "recipe: bam",
    ):
        assert line in card
    front_matter = yaml.safe_load(card.split("---")[1])
    assert front_matter["library_name"] == "transformers"
    assert "base_model" not in front_matter  # the sources are local directories


def test_the_model_card_says_what_can_be_run(recipe, tmp_path):
    out = tmp_path / "out"
    assert main(["upcycle", recipe, str(out)]) == 0
    blocks = re.findall(r"```(\w+)\n(.*?)```", (out / "README.md").read_text().replace("DIR", str(out)), re.DOTALL)
    training, stated_recipe = (yaml.safe_load(text) for kind, text in blocks if kind == "yaml")
    assert TrainConfig.read(training).model == str(out)
    assert Recipe.read(stated_recipe) == Recipe.read(recipe)
    _, own_class = (text for kind, text in blocks if kind == "python")
    loaded: dict[str, Any] = {}
    exec(own_class, loaded)
    assert loaded["model"].config.num_attention_experts == 3


def test_the_model_cards_plain_loading_lines_need_no_bamoe(recipe, tmp_path):
    out = tmp_path / "out"
    assert main(["upcycle", recipe, str(out)]) == 0
    shutil.copyfile(save_tokenizer(tmp_path), out / "tokenizer.json")
    text = (out / "README.md").read_text().replace("DIR", str(out))
    (lines, *_) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    hide = "import sys; sys.modules['bamoe'] = None\n"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", hide + lines + "print(type(model).__name__, tokenizer('a').input_ids)"],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.stdout == "BamoeForCausalLM [0]\n", done.stderr


def test_shards_follow_the_given_size(recipe, tmp_path, capsys):
    assert main(["upcycle", recipe, str(tmp_path / "out"), "--max-shard-size", "50KB"]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert "weight files" in capsys.readouterr().out
    assert main(["upcycle", recipe, str(tmp_path / "more"), "--max-shard-size", "huge"]) == 1
    assert "'huge' is not a size" in capsys.readouterr().err


def test_an_existing_out_needs_force(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["upcycle", recipe, str(out)]) == 0
    before = (out / "config.json").stat().st_mtime_ns
    assert main(["upcycle", recipe, str(out)]) == 1
    assert "--force" in capsys.readouterr().err
    assert (out / "config.json").stat().st_mtime_ns == before
    assert main(["upcycle", recipe, str(out), "--force"]) == 0


def test_every_incompatibility_is_printed_and_nothing_written(models, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", models, "seed", "narrow", "other")
    assert main(["upcycle", recipe, str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    for name in ("[norm-epsilon]", "[hidden-act]", "[rope]"):
        assert name in message
    assert not (tmp_path / "out").exists()


def test_allow_builds_warns_and_is_recorded(models, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", models, "seed", "narrow")
    assert main(["upcycle", recipe, str(tmp_path / "out"), "--allow", "norm-epsilon"]) == 0
    assert "warning: [norm-epsilon]" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    (override,) = json.loads(capsys.readouterr().out)["provenance"]["overrides"]
    assert "norm-epsilon" in override
    assert "Allowed differences" in (tmp_path / "out" / "README.md").read_text()


def test_dry_run_prints_plan_and_needs_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["upcycle", recipe, str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{LAYERS} x model.layers.*.mlp.experts.gate_up_proj" in shown
    assert f"(3, {2 * INNER}, {WIDTH})" in shown
    assert "num_attention_experts" in shown
    for need in ("size of the mixture", "free on its disk", "memory to build", "train all weights", "routers only"):
        assert need in shown
    assert list(tmp_path.iterdir()) == [Path(recipe)]


def test_check_builds_nothing_and_finds_bad_values(recipe, models, tmp_path, capsys):
    assert main(["upcycle", recipe, str(tmp_path / "out"), "--check"]) == 0
    assert "can become one mixture" in capsys.readouterr().out
    bad = save_llama(tmp_path / "bad", 5)
    tensors = load_file(bad / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    spoilt = write_recipe(tmp_path / "spoilt.yaml", models, "seed", str(bad))
    assert main(["upcycle", spoilt, str(tmp_path / "out"), "--check"]) == 1
    message = capsys.readouterr().err
    assert "[values]" in message
    assert "lm_head.weight" in message
    assert main(["upcycle", spoilt, str(tmp_path / "out")]) == 1
    assert "lm_head.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused(recipe, tmp_path, capsys, monkeypatch):
    from bamoe.recipes import preflight

    monkeypatch.setattr(preflight, "free_bytes", lambda out: 1000)
    assert main(["upcycle", recipe, str(tmp_path / "out")]) == 1
    assert "[disk]" in capsys.readouterr().err
    assert main(["upcycle", recipe, str(tmp_path / "out"), "--check"]) == 1
    assert "[disk]" in capsys.readouterr().err


def test_a_mergekit_file_is_built_around_the_base(models, tmp_path, capsys):
    path = tmp_path / "mergekit.yaml"
    experts = [{"source_model": str(models / name)} for name in ("code", "law", "code")]
    path.write_text(yaml.safe_dump({"base_model": str(models / "seed"), "gate_mode": "random", "experts": experts}))
    assert main(["upcycle", str(path), str(tmp_path / "out")]) == 0
    assert "gate_mode random" in capsys.readouterr().err
    made = load_file(tmp_path / "out" / "model.safetensors")
    base, code, law = (load_file(models / name / "model.safetensors") for name in ("seed", "code", "law"))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert torch.equal(made[name], base[name])
    down = made["model.layers.1.mlp.experts.down_proj"]
    for seat, source in enumerate((code, law, code)):
        assert torch.equal(down[seat], source["model.layers.1.mlp.down_proj.weight"])


def test_a_mistake_in_a_real_process(models, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", models, "seed", "other")
    command = [
        sys.executable,
        "-c",
        "from bamoe.cli.main import main; raise SystemExit(main())",
        "upcycle",
        recipe,
        "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: 2 problems found")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("keys", "seen"),
    [
        ({"router": {"std": float("inf")}}, "router.std"),
        ({"router": {"std": float("nan")}}, "router.std"),
        ({"router": {"std": 1e39}}, "router.std"),
        ({"router": {"std": True}}, "router.std: give a number"),
        ({"router": {"seed": True}}, "router.seed: Input should be a valid integer"),
        ({"feed_forward": {"routed_scaling_factor": float("inf")}}, "feed_forward.routed_scaling_factor"),
        ({"feed_forward": {"num_experts_per_tok": True}}, "feed_forward.num_experts_per_tok: Input should be a valid"),
        ({"attention": {"num_experts_per_tok": 2.0}}, "attention.num_experts_per_tok: Input should be a valid integer"),
        ({"recipe": "sparse", "experts": [], "num_experts": True}, "num_experts: Input should be a valid integer"),
        ({"recipe": "sparse", "experts": [], "num_experts": 10**9}, "num_experts: Input should be less than or equal"),
        ({"recipe": "sparse", "experts": [], "num_experts": "2"}, "num_experts: Input should be a valid integer"),
        ({"experts": [{"name": "a", "model": "b", "copies": True}]}, "experts.0.copies: Input should be a valid int"),
    ],
)
def test_values_that_a_recipe_cannot_have(models, tmp_path, capsys, keys, seen):
    recipe = write_recipe(tmp_path / "recipe.yaml", models, "seed", "code", **keys)
    assert main(["upcycle", recipe, str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {recipe}: {seen}"), message
    assert len(message.splitlines()) == 1


def test_a_shard_size_beyond_numbers_is_refused(recipe, tmp_path, capsys):
    assert main(["upcycle", recipe, str(tmp_path / "out"), "--max-shard-size", "9" * 400]) == 1
    assert "is not a size" in capsys.readouterr().err


@pytest.mark.parametrize("long", ["a" * 300, "a" * 300 + "/b"])
def test_a_mergekit_file_with_a_path_too_long(models, tmp_path, capsys, long):
    path = tmp_path / "mergekit.yaml"
    experts = [{"source_model": str(models / "code")}, {"source_model": long}]
    path.write_text(yaml.safe_dump({"base_model": long, "gate_mode": "random", "experts": experts}))
    assert main(["upcycle", str(path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("File name too long") == 2
