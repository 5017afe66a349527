"""Each class of incompatibility is found, named, and shown with the values seen; all of them in one report."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM as Auto
from transformers import CohereConfig, LlamaConfig, MistralConfig, Qwen3Config

from bamoe.checkpoints.reader import CheckpointReader
from bamoe.errors import CompatibilityError, ConfigError
from bamoe.recipes import preflight
from bamoe.recipes.findings import CLASSES, OVERRIDES
from bamoe.recipes.preflight import check_disk, open_checked, scan_values
from bamoe.recipes.schema import Recipe

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_model(directory: Path, config_class=LlamaConfig, **changes) -> Path:
    torch.manual_seed(0)
    Auto.from_config(config_class(**(TINY | changes))).save_pretrained(directory)
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Saves each distinct tiny model once."""
    cache: dict[str, Path] = {}

    def get(config_class=LlamaConfig, **changes) -> Path:
        key = repr((config_class, sorted(changes.items())))
        if key not in cache:
            cache[key] = save_model(tmp_path_factory.mktemp("model"), config_class, **changes)
        return cache[key]

    return get


@pytest.fixture
def fresh(saved, tmp_path):
    """A copy of a tiny model that a test may spoil."""

    def get(name="spoilt", **changes) -> Path:
        return Path(shutil.copytree(saved(**changes), tmp_path / name))

    return get


def recipe_for(seed: Path, *experts: Path, **keys) -> Recipe:
    listed = [{"name": f"e{i}", "model": str(path)} for i, path in enumerate(experts)]
    return Recipe.read({"recipe": "bam", "seed": str(seed), "experts": listed, **keys})


def check(seed: Path, *experts: Path, allow=()):
    sources, findings = open_checked(recipe_for(seed, *experts), allow)
    sources.close()
    return findings


def classes(found) -> set[str]:
    return {finding.name for finding in found}


def spoil_tensors(directory: Path, change) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_compatible_models_give_no_findings(saved):
    findings = check(saved(), saved(), saved())
    assert (findings.errors, findings.warnings, findings.overridden) == ([], [], [])
    findings.raise_if_any()


ROPE = {"rope_type": "default", "rope_theta": 50000.0}


@pytest.mark.parametrize(
    ("changes", "name", "seen"),
    [
        ({"hidden_size": 64}, "hidden-size", "seed hidden_size 32; expert e1 hidden_size 64"),
        ({"intermediate_size": 64}, "intermediate-size", "intermediate_size 48; expert e1 intermediate_size 64"),
        ({"num_hidden_layers": 1}, "layers", "num_hidden_layers 2; expert e1 num_hidden_layers 1"),
        ({"num_hidden_layers": 3}, "layers", "num_hidden_layers 2; expert e1 num_hidden_layers 3"),
        ({"num_attention_heads": 2}, "heads", "num_attention_heads 4; expert e1 num_attention_heads 2"),
        ({"num_key_value_heads": 4}, "key-value-heads", "num_key_value_heads 2; expert e1 num_key_value_heads 4"),
        ({"head_dim": 16}, "head-width", "head_dim 8; expert e1 head_dim 16"),
        ({"vocab_size": 41}, "vocabulary-size", "vocab_size 40; expert e1 vocab_size 41"),
        ({"rope_parameters": ROPE}, "rope", '"rope_theta": 50000.0'),
        ({"rms_norm_eps": 1e-5}, "norm-epsilon", "norm_eps 1e-06; expert e1 norm_eps 1e-05"),
        ({"tie_word_embeddings": True}, "tied-head", "tie_word_embeddings false; expert e1 tie_word_embeddings true"),
        (
            {"attention_bias": True},
            "bias",
            "attention_bias false, attention_output_bias false; expert e1 attention_bias true",
        ),
        ({"hidden_act": "gelu"}, "hidden-act", 'hidden_act "silu"; expert e1 hidden_act "gelu"'),
    ],
)
def test_each_difference_between_configs(saved, changes, name, seen):
    findings = check(saved(), saved(), saved(**changes))
    assert classes(findings.errors) == {name}
    with pytest.raises(CompatibilityError) as caught:
        findings.raise_if_any()
    assert f"[{name}]" in str(caught.value)
    assert seen in str(caught.value)
    assert "e0" not in str(caught.value)  # the expert that fits is not blamed


def edited_rope(fresh, name, maximum=64, **rope):
    """A checkpoint whose config has these rope parameters, spelt as given."""
    directory = fresh(name)
    edit_json(directory / "config.json", rope_parameters=rope, max_position_embeddings=maximum)
    return directory


def test_the_older_key_of_a_rope_type_beside_the_newer_is_no_difference(fresh):
    both = edited_rope(fresh, "both", type="linear", rope_type="linear", rope_theta=1e4, factor=2.0)
    newer = edited_rope(fresh, "newer", rope_type="linear", rope_theta=1e4, factor=2.0)
    older = edited_rope(fresh, "older", type="linear", rope_theta=1e4, factor=2)
    assert check(newer, both, older).errors == []
    assert check(both, newer, older).errors == []


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "refused"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, True),
        (YARN, True),  # without original_max_position_embeddings
        (YARN | {"original_max_position_embeddings": 16}, False),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, False),
    ],
)
def test_maximum_positions_that_change_the_rotation(fresh, rope, refused):
    short, long = edited_rope(fresh, "short", 32, **rope), edited_rope(fresh, "long", 128, **rope)
    findings = check(short, short, long)
    assert classes(findings.errors) == ({"rope"} if refused else set())
    assert "maximum-positions" in classes(findings.warnings)
    if refused:
        assert "32" in str(findings.errors[0])
        assert "128" in str(findings.errors[0])
        assert "e0" not in str(findings.errors[0])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0},
        {"rope_type": "yarn", "rope_theta": 1e4},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0},
    ],
)
def test_rope_parameters_that_give_no_rotation(fresh, rope):
    bad = edited_rope(fresh, "bad", **rope)
    findings = check(bad, bad)
    assert classes(findings.errors) == {"unsupported"}
    assert rope["rope_type"] in str(findings.errors[0])


@pytest.mark.parametrize("padding", [40, -1])
def test_a_padding_id_outside_the_vocabulary_is_warned(saved, fresh, padding):
    old = fresh("old")
    edit_json(old / "config.json", pad_token_id=padding)
    findings = check(saved(), old)
    assert findings.errors == []
    assert classes(findings.warnings) == {"special-ids"}
    seen = f"expert e0: pad_token_id {padding} is outside the vocabulary of 40"
    assert any(seen in str(warning) for warning in findings.warnings)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"), ({"num_attention_heads": 0}, "e0: config.json")],
)
def test_values_that_no_config_has(saved, fresh, changes, seen):
    bad = fresh()
    edit_json(bad / "config.json", **changes)
    findings = check(saved(), bad)
    assert classes(findings.errors) == {"unsupported"}
    assert seen in str(findings.errors[0])


def test_sliding_window(saved):
    seed = saved(MistralConfig, sliding_window=None)
    findings = check(seed, seed, saved(MistralConfig, sliding_window=16))
    assert classes(findings.errors) == {"sliding-window"}
    assert "sliding_window null; expert e1 sliding_window 16" in str(findings.errors[0])


def test_logit_scale_and_query_key_norms(saved):
    seed = saved(CohereConfig, logit_scale=0.25)
    findings = check(
        seed, saved(CohereConfig, logit_scale=0.5), saved(CohereConfig, logit_scale=0.25, use_qk_norm=True)
    )
    assert classes(findings.errors) == {"logit-scale", "qk-norm"}
    message = "\n".join(map(str, findings.errors))
    assert "logit_scale 0.25; expert e0 logit_scale 0.5" in message
    assert 'qk_norm null; expert e1 qk_norm "head"' in message


def test_architecture(saved):
    findings = check(saved(), saved(), saved(Qwen3Config))
    assert "architecture" in classes(findings.errors)
    assert "seed 'llama'; expert e0 'llama'; expert e1 'qwen3'" in str(findings.errors[0])


def test_unsupported_architecture_and_features(saved, fresh):
    alien, quantised = fresh("alien"), fresh("quantised")
    edit_json(alien / "config.json", model_type="gpt2")
    edit_json(quantised / "config.json", quantization_config={"quant_method": "awq"})
    findings = check(saved(), alien, quantised)
    messages = [str(error) for error in findings.errors if error.name == "unsupported"]
    assert any(
        "expert e0: config.json: model_type 'gpt2' is not supported; supported: cohere, llama" in text
        for text in messages
    )
    assert any("expert e1: quantization_config" in text for text in messages)


@pytest.mark.parametrize("value", [None, [], {}, 7])
def test_a_model_type_that_is_no_name(saved, fresh, value):
    bad = fresh()
    edit_json(bad / "config.json", model_type=value)
    assert classes(check(saved(), bad).errors) == {"unsupported"}


def test_heads_that_do_not_divide_are_refused_before_the_build(saved):
    odd = saved(num_key_value_heads=3)
    findings = check(odd, odd)
    assert classes(findings.errors) == {"unsupported"}
    assert "4 query heads, which do not divide into 3" in str(findings.errors[0])


def test_integer_weights_are_unsupported(saved, fresh):
    bad = spoil_tensors(
        fresh(), lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    )
    findings = check(saved(), bad)
    assert classes(findings.errors) == {"unsupported"}
    assert "model.norm.weight torch.int8" in str(findings.errors[0])


DOWN = "model.layers.1.mlp.down_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "name", "seen"),
    [
        (lambda tensors: tensors.pop(DOWN), "missing-tensor", f"expert e0: no {DOWN}"),
        (lambda tensors: tensors.update(extra=torch.ones(3)), "unexpected-tensor", "expert e0: extra have no place"),
        (lambda tensors: tensors.update({BIAS: torch.ones(32)}), "bias", f"expert e0: {BIAS} stored"),
        (
            lambda tensors: tensors.update({DOWN: torch.ones(32, 47)}),
            "tensor-shape",
            f"{DOWN} (32, 47) instead of (32, 48)",
        ),
    ],
)
def test_each_difference_between_weights_and_config(saved, fresh, change, name, seen):
    findings = check(saved(), spoil_tensors(fresh(), change))
    assert classes(findings.errors) == {name}
    assert seen in str(findings.errors[0])


def test_biases_that_the_config_promises_are_missed(saved, fresh):
    promised = saved(attention_bias=True)
    bad = spoil_tensors(fresh(attention_bias=True), lambda tensors: tensors.pop(BIAS))
    findings = check(promised, bad)
    assert classes(findings.errors) == {"bias"}
    assert f"expert e0: no {BIAS}" in str(findings.errors[0])


def test_a_stored_copy_of_a_tied_head_is_no_surprise(saved, fresh):
    tied = saved(tie_word_embeddings=True)
    copy = spoil_tensors(
        fresh(tie_word_embeddings=True),
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    assert check(tied, copy).errors == []


def test_many_missing_tensors_are_one_line(saved, fresh):
    def empty(tensors):
        for name in [name for name in tensors if "mlp" in name]:
            del tensors[name]

    (error,) = check(saved(), spoil_tensors(fresh(), empty)).errors
    assert "and 3 more" in str(error)


@pytest.mark.parametrize("spoil", ["missing", "truncated"])
def test_shards_of_several_models_and_a_difference_are_in_one_report(saved, fresh, tmp_path, spoil):
    broken = []
    for name in ("one", "two"):
        model = Auto.from_pretrained(saved())
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        shard = sorted((tmp_path / name).glob("*.safetensors"))[1]
        if spoil == "missing":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[:-100])
        broken.append((tmp_path / name, shard.name))
    # The third model is whole but of another shape; the second also disagrees in its config.
    edit_json(broken[1][0] / "config.json", rms_norm_eps=0.5)
    with pytest.raises(CompatibilityError) as caught:
        check(saved(), broken[0][0], broken[1][0], saved(vocab_size=41))
    message = str(caught.value)
    for label, (_, shard) in zip(("e0", "e1"), broken, strict=True):
        assert any(f"[shards] expert {label}:" in line and shard in line for line in message.splitlines()), message
    assert "[vocabulary-size]" in message
    assert "expert e2 vocab_size 41" in message
    assert "[norm-epsilon]" in message


def test_a_directory_that_is_no_checkpoint(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CompatibilityError) as caught:
        check(saved(), tmp_path / "empty", tmp_path / "absent" / "deep")
    assert "[checkpoint] expert e0:" in str(caught.value)
    assert "no config.json" in str(caught.value)
    assert "[checkpoint] expert e1:" in str(caught.value)
    assert "no such directory" in str(caught.value)


def test_tokenizers(saved, fresh):
    other = fresh("other")
    path = other / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] = {"a": 1, "b": 0, "ab": 2}
    data["model"]["merges"] = []
    data["normalizer"] = {"type": "NFC"}
    path.write_text(json.dumps(data))
    (error,) = check(saved(), other).errors
    assert error.name == "tokenizer"
    for part in ("token-to-id map: 2 differ", "merges: 1 in the seed, 0 here", "normaliser: null in the seed"):
        assert part in str(error)


def test_an_unreadable_tokenizer_is_a_finding_not_a_crash(saved, fresh):
    broken = fresh("broken")
    (broken / "tokenizer.json").write_text("{")
    findings = check(saved(), broken)
    assert classes(findings.errors) == {"checkpoint"}
    assert "not valid JSON" in str(findings.errors[0])


def test_a_path_too_long_is_a_finding_not_a_crash(saved):
    for seed, expert in ((saved(), Path("a" * 300)), (Path("a" * 300), saved())):
        with pytest.raises(CompatibilityError, match=r"\[checkpoint\] .*File name too long"):
            check(seed, expert)


def test_tokenizers_that_cannot_be_compared_are_warned(saved, fresh):
    bare = fresh("bare")
    (bare / "tokenizer.json").unlink()
    findings = check(saved(), bare)
    assert findings.errors == []
    assert "has no tokenizer file of the seed's kind" in str(findings.warnings[0])
    findings = check(bare, saved())
    assert findings.errors == []
    assert "so the mixture will have none" in str(findings.warnings[0])


def test_what_is_only_warned(saved, fresh):
    other = fresh("other", eos_token_id=3, max_position_embeddings=128)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    spoil_tensors(other, lambda tensors: tensors.update({DOWN: tensors[DOWN].bfloat16()}))
    edit_json(other / "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": [], "pair": []})
    findings = check(saved(), other)
    assert findings.errors == []
    assert classes(findings.warnings) == {"chat-template", "special-ids", "maximum-positions", "mixed-dtypes"}
    message = "\n".join(map(str, findings.warnings))
    assert "eos_token_id: seed 2; expert e0 3" in message
    assert "max_position_embeddings: seed 64; expert e0 128" in message
    assert "seed float32; expert e0 bfloat16 and float32" in message


def test_a_seed_that_is_no_expert_must_fit_too(saved):
    findings = check(saved(vocab_size=41), saved(), saved())
    assert "seed vocab_size 41; expert e0 vocab_size 40; expert e1 vocab_size 40" in str(findings.errors[0])


def test_all_problems_at_once(saved, fresh):
    bad = spoil_tensors(fresh(hidden_act="gelu", rms_norm_eps=0.5), lambda tensors: tensors.pop(DOWN))
    with pytest.raises(CompatibilityError, match="4 problems found; nothing was written") as caught:
        check(saved(), bad, saved(head_dim=16)).raise_if_any()
    for name in ("hidden-act", "norm-epsilon", "missing-tensor", "head-width"):
        assert f"[{name}]" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name"), [({"rms_norm_eps": 1e-5}, "norm-epsilon"), ({"hidden_act": "gelu"}, "hidden-act")]
)
def test_a_refusal_says_whether_it_can_be_allowed(saved, changes, name):
    (error,) = check(saved(), saved(**changes)).errors
    assert (f"--allow {name}" in str(error)) == (name in OVERRIDES)


def test_an_allowed_class_becomes_a_recorded_warning(saved):
    findings = check(saved(), saved(rms_norm_eps=1e-5), allow=["norm-epsilon"])
    assert findings.errors == []
    assert findings.warnings == findings.overridden
    assert "the seed's epsilon is used for all experts" in str(findings.overridden[0])


def test_an_allowed_class_does_not_hide_another(saved):
    findings = check(saved(), saved(rms_norm_eps=1e-5, hidden_act="gelu"), allow=["norm-epsilon"])
    assert classes(findings.errors) == {"hidden-act"}


def test_another_tokenizer_is_allowed_only_with_the_same_vocabulary_size(saved, fresh):
    for changes, allowed in (({}, True), ({"vocab_size": 41}, False)):
        other = fresh(f"other-{allowed}", **changes)
        edit_json(other / "tokenizer.json", normalizer={"type": "NFC"})
        findings = check(saved(), other, allow=["tokenizer"])
        assert ("tokenizer" in classes(findings.overridden)) == allowed
        assert ("tokenizer" in classes(findings.errors)) != allowed


@pytest.mark.parametrize("name", sorted(set(CLASSES) - set(OVERRIDES)))
def test_what_has_no_sensible_result_cannot_be_allowed(saved, name):
    with pytest.raises(ConfigError, match=f"--allow {name}: this class cannot be overridden; .*norm-epsilon"):
        check(saved(), saved(), allow=[name])


def test_an_unknown_class_names_the_closest():
    with pytest.raises(ConfigError, match="--allow tokeniser: there is no such class; did you mean 'tokenizer'"):
        preflight.check_allow(["tokeniser"])


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000_000))
    out = tmp_path / "not" / "yet" / "there"
    assert check_disk(4_000_000_000, out).errors == []
    (error,) = check_disk(6_000_000_000, out).errors
    assert error.name == "disk"
    assert "needs 6.00 GB but 5.00 GB are free" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(saved, fresh, monkeypatch, value):
    # Slices of three rows: the last, shorter one is looked at too.
    monkeypatch.setattr(preflight, "_SCAN_BYTES", 3 * 48 * 4)
    bad = spoil_tensors(fresh(), lambda tensors: tensors[DOWN].__setitem__((31, 47), value))
    seen: list[int] = []
    with CheckpointReader(saved()) as seed, CheckpointReader(bad) as expert:
        findings = scan_values(seed, {"code": expert}, seen.append)
        stored = sum(f.stat().st_size for r in (seed, expert) for f in r.path.glob("*.safetensors"))
    (error,) = findings.errors
    assert str(error).startswith(f"[values] expert code: NaN or infinite values in {DOWN}:")
    assert 0.9 * stored < sum(seen) <= stored


def test_a_checkpoint_that_is_seed_and_expert_is_scanned_once(saved):
    seen: list[int] = []
    with CheckpointReader(saved()) as seed, CheckpointReader(saved()) as expert:
        assert scan_values(seed, {"general": expert}, seen.append).errors == []
        assert sum(seen) <= (saved() / "model.safetensors").stat().st_size
