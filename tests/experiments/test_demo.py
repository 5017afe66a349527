"""The demo at a microscopic size: its rows, their costs in closed form, and that it goes on where it stopped."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from bamoe.errors import ConfigError
from bamoe.experiments.demo import DemoSettings, demo_rows, run_demo
from bamoe.experiments.demo_results import results_table, verdict
from bamoe.experiments.steps import StepError
from bamoe.recipes.schema import Recipe
from bamoe.training import TrainConfig

MICROSCOPIC = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 300,
    "sequence_length": 32,
    "corpus_characters": 50_000,
    "seed_tokens": 1536,
    "branch_tokens": 512,
    "mixture_tokens": 1024,
    "batch_tokens": 512,
    "validations": 1,
}
SETTINGS = DemoSettings(**MICROSCOPIC)
TRAINED = ["seed", "code", "law", "math", "dense-mixture", "dense-all", "btx", "bam-kv-sharing", "bam-kv-experts"]


class Events(list):
    """A listener that keeps what it is told."""

    def __call__(self, event, step, seconds):
        self.append((event, step.name))

    def names(self, event):
        return {name for found, name in self if found == event}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out, SETTINGS, workers=0)


def files(out):
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def numbers(results):
    """What must not depend on when, where and in how many pieces a demo ran."""
    return {row["key"]: (row["perplexity"], row["tokens"], row["flops"]) for row in results["rows"]}


def test_every_row_is_there_and_written(finished):
    out, results = finished
    assert [row["key"] for row in results["rows"]] == TRAINED
    assert json.loads((out / "results.json").read_text())["rows"] == json.loads(json.dumps(results["rows"]))
    markdown = (out / "results.md").read_text()
    assert results_table(results).markdown() in markdown
    assert results["verdict"] in markdown
    assert all(len(file["sha256"]) == 64 for parts in results["corpora"].values() for file in parts.values())
    assert (out / "training.png").stat().st_size > 10_000
    assert set(results["sample"]) == {"general", "code", "law", "math"}


def test_own_expert_line_takes_each_text_from_its_expert(finished):
    _, results = finished
    rows = {row["key"]: row["perplexity"] for row in results["rows"]}
    expected = {"general": rows["seed"]["general"]} | {name: rows[name][name] for name in ("code", "law", "math")}
    assert results["own_expert"]["perplexity"] == expected
    assert results["own_expert"]["average"] == pytest.approx(sum(expected.values()) / 4)


def forward_flops(key_values, attention_experts, feed_forward_experts):
    """Of one token, by hand: 2 per multiply-accumulate, half of the context seen on average."""
    width, inner, context, vocabulary, layers = 16, 24, 32, 300, 2
    attention = 2 * width * width * (2 * attention_experts + 2 * key_values)
    core = 2 * 2 * attention_experts * width * context / 2
    routers = (
        2 * width * (attention_experts * (attention_experts > 1) + feed_forward_experts * (feed_forward_experts > 1))
    )
    return layers * (attention + core + routers + 2 * 3 * width * inner) + 2 * width * vocabulary


def parameters(key_values, attention_experts, feed_forward_experts, active_experts):
    width, inner, vocabulary, layers = 16, 24, 300, 2
    attention = width * width * (2 * attention_experts + 2 * key_values) + width * attention_experts * (
        attention_experts > 1
    )
    feed_forward = 3 * width * inner * active_experts + width * feed_forward_experts * (feed_forward_experts > 1)
    return layers * (attention + feed_forward + 2 * width) + width + 2 * vocabulary * width


def test_tokens_flops_and_parameters_are_their_closed_forms(finished):
    _, results = finished
    seed, branch, mixture = 1536, 512, 1024
    dense, branches = forward_flops(1, 1, 1), seed + 3 * branch
    shapes = {"btx": (1, 1, 4), "bam-kv-sharing": (1, 4, 4), "bam-kv-experts": (4, 4, 4)}
    tokens = {"seed": seed, "dense-mixture": seed + mixture, "dense-all": branches + mixture}
    tokens |= dict.fromkeys(("code", "law", "math"), seed + branch)
    for row in results["rows"]:
        if row["key"] in shapes:
            shape = shapes[row["key"]]
            assert row["tokens"] == branches + mixture
            assert row["flops"] == 3 * (dense * branches + forward_flops(*shape) * mixture)
            assert row["total_parameters"] == parameters(*shape, active_experts=4)
            assert row["active_parameters"] == parameters(*shape, active_experts=1)
        else:
            assert row["tokens"] == tokens[row["key"]]
            assert row["flops"] == 3 * dense * tokens[row["key"]]
            assert row["total_parameters"] == row["active_parameters"] == parameters(1, 1, 1, active_experts=1)


def test_dense_on_all_tokens_reads_what_branches_and_mixtures_read():
    rows = {row.key: row.read for row in demo_rows(DemoSettings())}
    parts = [rows[key] for key in ("code", "law", "math", "btx")]
    assert rows["dense-all"] == {name: sum(part.get(name, 0) for part in parts) for name in rows["dense-all"]}
    assert rows["dense-mixture"] == rows["btx"] == rows["bam-kv-experts"]


def test_recipes_and_configs_lie_beside_the_models(finished):
    out, _ = finished
    for key in TRAINED:
        config = TrainConfig.read(out / key / "train.yaml")
        assert config.output == str(out / key / "model")
        assert (Path(config.model) / "config.json").is_file()
    recipes = {key: Recipe.read(out / key / "upcycle.yaml") for key in TRAINED[-3:]}
    assert [recipe.recipe for recipe in recipes.values()] == ["btx", "bam", "bam"]
    assert recipes["bam-kv-sharing"].attention.key_value == "shared"
    assert recipes["bam-kv-experts"].attention.key_value == "experts"
    same_batches = [yaml.safe_load((out / key / "train.yaml").read_text()) for key in ("dense-mixture", *TRAINED[-3:])]
    assert len({json.dumps({**config, "model": "", "output": ""}) for config in same_batches}) == 1


def test_a_finished_demo_is_not_done_again(finished):
    out, results = finished
    before, events = files(out), Events()
    assert numbers(run_demo(out, SETTINGS, workers=0, listener=events)) == numbers(results)
    assert {event for event, _ in events} == {"kept"}
    assert all(
        files(out)[path] == time for path, time in before.items() if path.parts[0] == "steps" or "model" in path.parts
    )


def test_a_lost_step_is_done_again_with_what_comes_after_it_and_gives_the_same(finished):
    out, results = finished
    (out / "steps" / "train btx.json").unlink()
    events = Events()
    again = run_demo(out, SETTINGS, workers=0, listener=events)
    assert events.names("finished") == {"train btx", "measure btx"}
    assert numbers(again) == numbers(results)


def test_a_killed_demo_goes_on_and_ends_as_if_it_had_not_been(finished, tmp_path):
    _, results = finished
    out = tmp_path / "killed"
    program = f"""
import multiprocessing, os, sys
from bamoe.experiments.demo import DemoSettings, run_demo

def die(event, step, seconds):
    if (event, step.name) == ("started", "upcycle btx"):
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os._exit(9)  # nothing is cleaned up, and a training runs in the other process

if __name__ == "__main__":
    run_demo({str(out)!r}, DemoSettings(**{MICROSCOPIC!r}), workers=2, listener=die)
"""
    script = tmp_path / "killed.py"
    script.write_text(program)
    killed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert killed.returncode == 9, killed.stderr
    workers = [int(pid) for pid in killed.stdout.split()]
    assert len(workers) == 2
    for pid in workers:
        if psutil.pid_exists(pid):
            psutil.Process(pid).wait(timeout=60)
    assert not (out / "results.json").exists()
    events = Events()
    again = run_demo(out, SETTINGS, workers=0, listener=events)
    assert {"data", "untrained", "train seed", "train code", "train law", "train math"} <= events.names("kept")
    assert "train btx" in events.names("finished")
    assert numbers(again) == numbers(results)


def test_a_moved_demo_is_still_finished(finished, tmp_path):
    out, _ = finished
    shutil.copytree(out, tmp_path / "moved")
    events = Events()
    run_demo(tmp_path / "moved", SETTINGS, workers=0, listener=events)
    assert {event for event, _ in events} == {"kept"}


def test_force_starts_again_and_leaves_other_files_alone(finished, tmp_path):
    out, _ = finished
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("mine")

    def stop(event, step, seconds):
        raise InterruptedError(event, step.name)

    with pytest.raises(InterruptedError) as stopped:
        run_demo(tmp_path / "copy", SETTINGS, workers=0, force=True, listener=stop)
    assert stopped.value.args == ("started", "data")
    assert not (tmp_path / "copy" / "seed" / "model").exists()
    assert (tmp_path / "copy" / "notes.txt").read_text() == "mine"


def test_other_settings_and_other_peoples_folders_are_refused(finished, tmp_path):
    out, _ = finished
    with pytest.raises(ConfigError, match="mixture_tokens 1024, now 2048"):
        run_demo(out, DemoSettings(**{**MICROSCOPIC, "mixture_tokens": 2048}), workers=0)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="no demo wrote"):
        run_demo(tmp_path, SETTINGS, workers=0, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_failed_step_is_named(finished, tmp_path):
    with pytest.raises(StepError, match="step 'data': this Python installation carries only"):
        run_demo(tmp_path / "small", DemoSettings(**{**MICROSCOPIC, "corpus_characters": 10}), workers=0)


@pytest.mark.parametrize(("bam", "words"), [(9.0, "10.0% below BTX (10.00)"), (11.0, "10.0% above BTX (10.00)"),
                                            (10.001, "the same as BTX (10.00)")])  # fmt: skip
def test_the_verdict_says_either_outcome(bam, words):
    averages = {"btx": 10.0, "bam-kv-sharing": 12.0, "bam-kv-experts": bam, "dense-mixture": 10.0, "dense-all": 8.0}
    rows = [{"key": key, "name": "BTX" if key == "btx" else key, "average": value} for key, value in averages.items()]
    assert f"bam-kv-experts has an average perplexity of {bam:.2f}: {words}" in verdict({"rows": rows})
