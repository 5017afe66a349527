"""A whole experiment at a microscopic size: its numbers, its records, and that it goes on where it stopped."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml

from bamoe.checkpoints.loading import load_model
from bamoe.errors import ConfigError, DataError
from bamoe.evaluation import evaluate
from bamoe.experiments.hashes import FileHashes
from bamoe.experiments.results import collect
from bamoe.experiments.rows import experiment_rows
from bamoe.experiments.run import planned_steps, run_experiment
from bamoe.experiments.schema import Experiment
from bamoe.experiments.steps import StepError
from bamoe.locks import locked
from bamoe.recipes.schema import Recipe
from bamoe.training import TrainConfig
from tests.experiments.tiny import DOMAINS, experiment

# Routers of models that learn nothing may well collapse.
pytestmark = pytest.mark.filterwarnings("ignore::bamoe.training.collapse.CollapseWarning")

VARIANTS = [
    {"variant": "dense-mixture", "seeds": [0]},
    {"variant": "dense-all", "seeds": [0]},
    {"variant": "sparse-all", "seeds": [1]},
    "btx-top-1",
    {"variant": "bam-kv-sharing", "seeds": [0]},
    "bam-kv-experts",
    {"variant": "bam-kv-experts", "budget": "compute", "seeds": [0]},
    {"variant": "bam-kv-experts", "budget": "device time", "seeds": [0]},
    {"variant": "bam-kv-experts", "key": "routers-only", "training": {"trainable": "routers"}, "seeds": [0]},
]


class Events(list):
    """A listener that keeps what it is told."""

    def __call__(self, event, step, seconds):
        self.append((event, step.name))

    def names(self, event):
        return {name for found, name in self if found == event}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    samples = {"row": "bam-kv-experts", "prompts": {"code": "def value"}, "tokens": 5}
    return experiment(tmp_path_factory.mktemp("text"), seeds=[0, 1], variants=VARIANTS, samples=samples)


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, run_experiment(content, out, workers=0)


def numbers(record):
    """What must not depend on when, where and in how many pieces an experiment ran."""
    timed = {"seconds", "command"}
    return {
        row.key: [{key: value for key, value in asdict(run).items() if key not in timed} for run in row.runs]
        for row in record.rows
        if row.budget != "device time"
    }


def test_every_row_is_there_with_its_seeds_and_the_files_are_written(content, finished):
    out, record = finished
    seeds = {row.key: [run.seed for run in row.runs] for row in record.rows}
    both = ("seed", "code", "law", "math", "btx-top-1", "bam-kv-experts")
    assert seeds == {key: [0, 1] if key in both else [1] if key == "sparse-all" else [0] for key in seeds}
    assert len(seeds) == 4 + len(VARIANTS)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(asdict(record)))
    for name in ("report.html", "report.md"):
        text = (out / name).read_text()
        assert all(row.name in text for row in record.rows)
    assert record.samples["code"].startswith("def value")
    assert set(record.corpora) == set(DOMAINS)
    assert yaml.safe_load(record.config)["seeds"] == [0, 1]


def test_a_rows_numbers_are_those_of_its_model(finished, content):
    out, record = finished
    for key in ("seed", "btx-top-1", "bam-kv-experts"):
        run = record.row(key).runs[1]
        folder = out / "run-1" / ("seed" if key == "seed" else f"train/{key}")
        paths = {name: content["domains"][name]["valid"] for name in DOMAINS}
        again = evaluate(folder / "model", paths, sequence_length=32)
        assert run.average_perplexity == again.average_perplexity
        assert dict(run.perplexity) == {name: score.perplexity for name, score in again.domains.items()}


def test_tokens_and_flops_are_of_all_the_training_behind_a_row(finished):
    _, record = finished
    rows = {row.key: row for row in record.rows}
    seed, branch, mixture = 1536, 512, 1024
    assert rows["code"].tokens == seed + branch
    assert rows["dense-mixture"].tokens == seed + mixture
    for key in ("dense-all", "sparse-all", "btx-top-1", "bam-kv-experts"):
        assert rows[key].tokens == seed + 3 * branch + mixture
    parts = [rows[key].own_flops for key in ("seed", "code", "law", "math", "bam-kv-experts")]
    assert rows["bam-kv-experts"].flops == pytest.approx(sum(parts))
    same_compute = rows["bam-kv-experts-compute"]
    assert same_compute.own_tokens < rows["bam-kv-experts"].own_tokens
    miss = same_compute.own_flops / rows["btx-top-1"].own_flops - 1
    assert any(
        note.startswith(f"{same_compute.name}: in whole steps its FLOPs are {miss:+.1%}") for note in record.notes
    )


def test_differences_are_paired_over_seeds_and_over_text(finished):
    _, record = finished
    rows = {row.key: {run.seed: run for run in row.runs} for row in record.rows}
    found = {difference.row: difference for difference in record.differences}
    assert all(difference.against == "btx-top-1" for difference in record.differences)
    both = found["bam-kv-experts"]
    by_seed = [
        rows["bam-kv-experts"][seed].average_log_perplexity - rows["btx-top-1"][seed].average_log_perplexity
        for seed in (0, 1)
    ]
    assert both.over_seeds.mean == pytest.approx(np.mean(by_seed))
    assert both.over_text.mean == pytest.approx(np.mean(by_seed))  # the same blocks, averaged in another order
    assert found["sparse-all"].over_seeds is None
    only = rows["sparse-all"][1].average_log_perplexity - rows["btx-top-1"][1].average_log_perplexity
    assert found["sparse-all"].over_text.mean == pytest.approx(only)
    assert not any(difference.row in ("seed", "code") for difference in record.differences)


def test_own_expert_line_takes_each_text_from_its_expert(finished):
    _, record = finished
    experts = {"general": "seed", "code": "code", "law": "law", "math": "math"}
    own = {name: np.mean([run.perplexity[name] for run in record.row(key).runs]) for name, key in experts.items()}
    assert record.own_expert == pytest.approx({**own, "average": np.mean(list(own.values()))})


def test_recipes_and_configs_lie_beside_the_models_and_same_batches_means_it(finished):
    out, record = finished
    configs = {}
    for path in out.glob("run-0/train/*/train.yaml"):
        config = TrainConfig.read(path)
        assert config.output == str(path.parent / "model")
        assert (Path(config.model) / "config.json").is_file()
        configs[path.parent.name] = config.model_dump(exclude={"model", "output"})
    same = {row.key for row in record.rows if row.same_batches} & set(configs)
    assert same == {"btx-top-1", "bam-kv-experts"}  # those with all the random seeds
    assert all(configs[key] == configs["btx-top-1"] for key in same)
    assert Recipe.read(out / "run-0/mix/bam-kv-sharing/upcycle.yaml").attention.key_value == "shared"
    assert Recipe.read(out / "run-1/mix/sparse-all/upcycle.yaml").router.seed == 1


def test_frozen_rows_keep_what_they_do_not_train(finished):
    from safetensors.torch import load_file

    out, record = finished
    before = load_file(out / "run-0/mix/routers-only/model/model.safetensors")
    after = load_file(out / "run-0/train/routers-only/model/model.safetensors")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if name.endswith("gate.weight")}
    assert any("FLOPs count the whole backward pass" in note for note in record.notes)


def test_device_time_gives_the_tokens_of_equal_time(finished):
    out, record = finished
    timing = json.loads((out / "run-0/time/bam-kv-experts-time/step.json").read_text())["result"]
    ratio = timing["other_seconds_per_step"] / timing["seconds_per_step"]
    assert timing["tokens"] == int(1024 * ratio)
    assert record.row("bam-kv-experts-time").own_tokens == max(1, round(timing["tokens"] / 256)) * 256


def test_a_finished_experiment_is_not_done_again_and_may_be_moved(content, finished, tmp_path):
    out, record = finished
    shutil.copytree(out, tmp_path / "moved")
    events = Events()
    again = run_experiment(content, tmp_path / "moved", workers=0, listener=events)
    assert {event for event, _ in events} == {"kept"}
    assert numbers(again) == numbers(record)


def test_what_depends_on_a_change_is_done_again_and_nothing_else(content, finished, tmp_path):
    out, _ = finished
    shutil.copytree(out, tmp_path / "copy")
    variants = [VARIANTS[0], {"variant": "btx-top-1", "learning_rate": 1e-3}]
    events = Events()
    run_experiment({**content, "variants": variants, "samples": None}, tmp_path / "copy", workers=0, listener=events)
    assert events.names("finished") == {
        f"run-{seed}/{kind}/btx-top-1" for seed in (0, 1) for kind in ("train", "evaluate")
    }


def test_changed_text_is_noticed(content, tmp_path):
    changed = experiment(tmp_path, variants=["dense-mixture"])
    run_experiment(changed, tmp_path / "out", workers=0, only=["text", "run-0/untrained"])
    with Path(changed["domains"]["code"]["train"]).open("a") as file:
        file.write('{"text": "one more line"}\n')
    events = Events()
    run_experiment(changed, tmp_path / "out", workers=0, only=["text", "run-0/untrained"], listener=events)
    assert events.names("finished") == {"text", "run-0/untrained"}


def test_branches_run_one_by_one_and_the_rest_after_them(content, finished, tmp_path):
    _, record = finished
    one = {**content, "seeds": [0]}
    one["variants"] = ["btx-top-1", "bam-kv-experts"]
    out = tmp_path / "out"
    with pytest.raises(StepError, match="run-0/branch/code needs text, run-0/seed, not done"):
        run_experiment(one, out, workers=0, only=["branch/code"])
    for step in ("text", "untrained", "run-0/seed", "branch/math", "branch/code", "branch/law"):
        assert run_experiment(one, out, workers=0, only=[step]) is None
    with pytest.raises(ConfigError, match=r"no report yet: \d+ of \d+ steps are not done in .*, the first run-0/mix/"):
        run_experiment(one, out, workers=0, only=["report"])
    again = run_experiment(one, out, workers=0)
    for key in ("code", "btx-top-1", "bam-kv-experts"):
        assert again.row(key).runs[0].perplexity == record.row(key).runs[0].perplexity
    (out / "report.html").unlink()
    assert run_experiment(one, out, workers=0, only=["report"]) is not None
    assert (out / "report.html").is_file()


def test_a_given_seed_is_used_as_it_is(content, finished, tmp_path):
    out, record = finished
    seed = out / "run-0" / "seed" / "model"
    given = {
        **content,
        "seeds": [0],
        "seed": {"model": str(seed)},
        "branches": {"tokens": 512, "learning_rate": 2e-3},
        "mixture": {"tokens": 1024, "learning_rate": 2e-3},
        "variants": ["dense-all", "btx-top-1"],
        "samples": None,
    }
    again = run_experiment(given, tmp_path / "out", workers=0)
    for key in ("seed", "code", "dense-all", "btx-top-1"):
        assert again.row(key).runs[0].perplexity == record.row(key).runs[0].perplexity
    assert again.row("seed").own_tokens == 0
    assert again.row("btx-top-1").tokens == 3 * 512 + 1024
    assert any("The seed was given" in note for note in again.notes)


def test_a_launch_command_stands_before_each_training(content, finished, tmp_path):
    _, record = finished
    launched = {**content, "seeds": [0], "variants": ["btx-top-1"], "samples": None}
    launched["launch"] = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 1"
    out = tmp_path / "out"
    run_experiment(launched, out, workers=0, only=["text", "untrained", "run-0/seed"])
    evaluation = evaluate(out / "run-0/seed/model", {"code": content["domains"]["code"]["valid"]}, sequence_length=32)
    assert evaluation.average_perplexity == pytest.approx(record.row("seed").runs[0].perplexity["code"], rel=1e-5)
    # How it is reached is no part of what it is: the seed is kept.
    with pytest.raises(StepError, match=r"step 'run-0/branch/law': false -m bamoe train .* ended with exit code 1"):
        run_experiment({**launched, "launch": "false"}, out, workers=0, only=["run-0/branch/law"])


KILLED = """
import json, os, random, signal, sys, threading, time
import torch
torch.set_num_threads(1)
import bamoe.experiments.phases, bamoe.experiments.results, bamoe.reports.page  # imported once, for all children
from bamoe.experiments.run import run_experiment
import bamoe.evaluation.perplexity, bamoe.recipes.upcycle, bamoe.training.trainer, bamoe.training.run

content, out = json.load(open(sys.argv[1])), sys.argv[2]
generator, kills = random.Random(0), 0
while True:
    patience = generator.uniform(0.05, 0.25 + 0.02 * kills)
    child = os.fork()
    if child == 0:
        def die():
            time.sleep(patience)
            os.kill(os.getpid(), signal.SIGKILL)

        if kills < 60:  # then it may end in peace, however slow the machine
            threading.Thread(target=die, daemon=True).start()
        run_experiment(content, out, workers=0)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
print(kills)
"""


def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(content, finished, tmp_path):
    _, record = finished
    one = {**content, "seeds": [0], "variants": ["btx-top-1", "bam-kv-experts"]}
    (tmp_path / "content.json").write_text(json.dumps(one))
    (tmp_path / "killed.py").write_text(KILLED)
    ran = subprocess.run(
        [sys.executable, tmp_path / "killed.py", tmp_path / "content.json", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 20
    again = run_experiment(one, tmp_path / "out", workers=0)
    for row in again.rows:
        expected = record.row(row.key).runs[0]
        assert row.runs[0].perplexity == expected.perplexity
        assert row.runs[0].loss_curve == expected.loss_curve


def test_a_killed_run_takes_its_workers_along_and_goes_on(content, finished, tmp_path):
    _, record = finished
    one = {**content, "seeds": [0], "variants": ["btx-top-1"], "samples": None}
    out = tmp_path / "killed"
    program = f"""
import json, multiprocessing, os
from bamoe.experiments.run import run_experiment

def die(event, step, seconds):
    if (event, step.name) == ("started", "run-0/branch/law"):
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        os._exit(9)  # nothing is cleaned up, and a training runs in the other process

if __name__ == "__main__":
    run_experiment(json.load(open({str(tmp_path / "content.json")!r})), {str(out)!r}, workers=2, listener=die)
"""
    (tmp_path / "content.json").write_text(json.dumps(one))
    (tmp_path / "killed.py").write_text(program)
    killed = subprocess.run(
        [sys.executable, tmp_path / "killed.py"], capture_output=True, text=True, check=False, timeout=300
    )
    assert killed.returncode == 9, killed.stderr
    workers = [int(pid) for pid in killed.stdout.split()]
    assert workers
    for pid in workers:
        if psutil.pid_exists(pid):
            psutil.Process(pid).wait(timeout=60)
    assert not (out / "results.json").exists()
    events = Events()
    again = run_experiment(one, out, workers=0, listener=events)
    assert {"text", "run-0/untrained", "run-0/seed"} <= events.names("kept")
    assert again.row("btx-top-1").runs[0].perplexity == record.row("btx-top-1").runs[0].perplexity


def test_force_starts_again_and_leaves_other_files_alone(finished, content, tmp_path):
    out, _ = finished
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("mine")

    def stop(event, step, seconds):
        if event == "started":
            raise RuntimeError(step.name)

    with pytest.raises(ConfigError, match="--only sead: no such step"):
        run_experiment(content, tmp_path / "copy", workers=0, force=True, only=["sead"])
    with pytest.raises(RuntimeError, match="text"):
        run_experiment(content, tmp_path / "copy", workers=0, force=True, listener=stop)
    assert (tmp_path / "copy" / "run-0" / "seed" / "model").exists()  # its turn had not come
    assert not (tmp_path / "copy" / "text" / "step.json").exists()
    assert (tmp_path / "copy" / "notes.txt").read_text() == "mine"


def test_other_experiments_and_other_peoples_folders_are_refused(finished, content, tmp_path):
    out, _ = finished
    with pytest.raises(ConfigError, match="holds the experiment 'tiny', not 'other'"):
        run_experiment({**content, "name": "other"}, out, workers=0)
    # A folder as people lay it out: the experiment's file beside the text, which `text` would be the step of.
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="no experiment wrote"):
        run_experiment(tmp_path / "experiment.yaml", tmp_path, workers=0, force=True)
    assert (tmp_path / "text" / "thesis.txt").read_text() == "precious"


def test_two_runs_into_one_folder_refuse_each_other(content, tmp_path):
    one = {**content, "seeds": [0], "variants": ["dense-mixture"], "samples": None}
    out = tmp_path / "out"
    run_experiment(one, out, workers=0, only=["text"])
    before = (out / "experiment.yaml").read_text()
    with locked(out / ".lock", "out"), pytest.raises(ConfigError, match=r"out is in use by another run \(process \d+"):
        run_experiment({**one, "validations": 2}, out, workers=0, only=["untrained"])
    with locked(out / ".lock", "out", shared=True):
        with pytest.raises(ConfigError, match="in use"):
            run_experiment({**one, "validations": 2}, out, workers=0)
        assert (out / "experiment.yaml").read_text() == before
        assert run_experiment(one, out, workers=0, only=["untrained"]) is None


def test_a_run_that_was_killed_in_its_first_moments_may_go_on(content, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".bamoe-experiment.77.partial").write_text("ti")
    assert run_experiment({**content, "samples": None}, out, workers=0, only=["text"]) is None


def test_an_unfinished_training_goes_on_where_it_was_moved_to(content, finished, tmp_path):
    _, record = finished
    one = {
        **content,
        "seeds": [0],
        "variants": ["dense-mixture"],
        "samples": None,
        "training": {"save_every_tokens": 256},
    }
    out = tmp_path / "here"
    run_experiment(one, out, workers=0, only=["text", "untrained"])
    program = f"""
import json, os
from transformers import TrainerCallback
import bamoe.training.trainer as trainer

class Die(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 4:
            os._exit(9)

once = trainer.BlockTrainer.__init__
def with_death(self, *arguments):
    once(self, *arguments)
    self.add_callback(Die())
trainer.BlockTrainer.__init__ = with_death
from bamoe.experiments.run import run_experiment
run_experiment(json.load(open({str(tmp_path / "content.json")!r})), {str(out)!r}, workers=0, only=["run-0/seed"])
"""
    (tmp_path / "content.json").write_text(json.dumps(one))
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 9, ended.stderr
    assert [path.name for path in out.glob("run-0/seed/model/checkpoints/checkpoint-*")] == ["checkpoint-4"]
    shutil.move(out, tmp_path / "there")
    run_experiment(one, tmp_path / "there", workers=0, only=["run-0/seed"])
    run_experiment(one, tmp_path / "there", workers=0, only=["evaluate/seed"])
    result = json.loads((tmp_path / "there" / "run-0/evaluate/seed/step.json").read_text())["result"]
    assert result["average_perplexity"] == record.row("seed").runs[0].average_perplexity


def test_a_misspelt_path_is_found_before_anything_runs(content, tmp_path):
    wrong = {
        **content,
        "domains": {**content["domains"], "law": {"train": "law.tran.jsonl", "valid": "law.valid.jsonl"}},
    }
    with pytest.raises(DataError, match=r"corpus 'law': law.tran.jsonl does not exist"):
        run_experiment(wrong, tmp_path / "out", workers=0)


def test_a_mistake_in_a_training_section_is_found_before_anything_runs(content, tmp_path):
    wrong = {**content, "samples": None, "variants": [{"variant": "btx-top-1", "training": {"betas": [2.0, 0.5]}}]}
    with pytest.raises(ConfigError, match=r"the training of btx-top-1: betas must be at least 0"):
        run_experiment(wrong, tmp_path / "out", workers=0)
    assert not (tmp_path / "out" / "text").exists()


def test_a_failed_step_is_named(content, tmp_path):
    small = {**content, "domains": {}, "builtin_characters": 10}
    with pytest.raises(StepError, match="step 'text': this Python installation carries only"):
        run_experiment(small, tmp_path / "small", workers=0)


def collected(content, out, changed, **changes):
    """The finished experiment's results, after `changed` has had its records by step."""
    read = Experiment.read({**content, **changes})
    records = {found["step"]: found for found in map(json.loads, map(Path.read_text, out.glob("**/step.json")))}
    changed(records)
    return collect(read, experiment_rows(read), records, out, command="", config="")


def test_a_row_whose_seeds_got_different_tokens_is_shown_with_their_mean(content, finished):
    out, record = finished

    def changed(records):
        records["run-1/train/btx-top-1"]["result"]["tokens"] = 512

    again, before = (found.row("btx-top-1") for found in (collected(content, out, changed), record))
    assert (again.own_tokens, before.own_tokens) == (768, 1024)
    assert again.own_flops == pytest.approx(before.own_flops * 3 / 4)


def test_the_commands_say_how_text_was_read_and_trainings_were_launched(content, finished):
    out, _ = finished

    def body(records):
        for corpus in records["run-0/evaluate/seed"]["arguments"]["corpora"]:
            corpus |= {"text_field": "body", "on_bad_lines": "skip"}
        records["run-1/evaluate/seed"]["arguments"]["corpora"][0]["text_field"] = "body"

    launched = collected(content, out, body, launch="torchrun --nproc-per-node 2").row("seed")
    commands = [run.command for run in launched.runs]
    assert all(command.startswith("torchrun --nproc-per-node 2 -m bamoe train ") for command in commands)
    assert commands[0].endswith(" --text-field body --skip-bad-lines")
    assert commands[1].endswith(f" && bamoe run {out}/experiment.yaml {out} --only run-1/evaluate/seed --force")


def test_notes_tell_of_frozen_weights_and_of_other_machines(content, finished):
    out, record = finished

    def elsewhere(records):
        records["run-1/seed"]["environment"]["device"] = "NVIDIA H200"

    def busier(records):
        records["run-1/seed"]["environment"]["threads"] = 7

    stages = [{"trainable": "routers", "until_tokens": 256}, {"trainable": "all"}]
    variants = [
        {"variant": "btx-top-1", "training": {"stages": stages}},
        {"variant": "bam-kv-experts", "training": {"trainable": ["all"]}, "learning_rate": 1e-3},
    ]
    again = collected(content, out, elsewhere, variants=variants)
    (frozen,) = [note for note in again.notes if "weights are frozen" in note]
    assert frozen.endswith("where weights are frozen: BTX top-1.")
    assert any("different devices or library versions" in note for note in again.notes)
    assert not any("library versions" in note for note in (*collected(content, out, busier).notes, *record.notes))


@pytest.mark.parametrize(
    ("changes", "same"),
    [({"learning_rate": 1e-3, "training": {"trainable": "routers"}}, True), ({"seeds": [0]}, False),
     ({"training": {"document_mask": True}}, False)],
)  # fmt: skip
def test_the_same_batches_do_not_depend_on_what_is_done_with_them(content, finished, changes, same):
    variants = ["btx-top-1", {"variant": "bam-kv-experts", **changes}]
    again = collected(content, finished[0], lambda records: None, variants=variants)
    assert [row.same_batches for row in again.rows[4:]] == [True, same]


def test_a_pair_without_a_common_seed_has_no_difference(content, finished):
    variants = [{"variant": "btx-top-1", "seeds": [1]}, {"variant": "dense-mixture", "seeds": [0]}, "bam-kv-experts"]
    found = collected(content, finished[0], lambda records: None, variants=variants).differences
    assert [(difference.row, difference.against) for difference in found] == [("bam-kv-experts", "btx-top-1")]


def test_device_time_is_of_the_trainings_as_they_are(content, finished, monkeypatch, tmp_path):
    out, _ = finished
    half = {"dtype": "bfloat16", "gradient_checkpointing": True, "micro_batch_tokens": 64, "trainable": "routers"}
    variants = [
        {"variant": "dense-mixture", "training": {"autocast": "bfloat16"}},
        {"variant": "bam-kv-experts", "budget": "device time", "budget_of": "dense-mixture", "training": half},
    ]
    read = Experiment.read({**content, "seeds": [0], "variants": variants, "samples": None})
    steps = planned_steps(read, experiment_rows(read), out, FileHashes(tmp_path / "hashes"))
    (timed,) = [step for step in steps if step.name == "run-0/time/bam-kv-experts-time"]
    seen = []

    def load(*arguments):
        model = load_model(*arguments)

        def look(model, _, keywords, output):
            trains = sum(weight.requires_grad for weight in model.parameters())
            kinds = (model.dtype, output.logits.dtype, model.is_gradient_checkpointing)
            seen.append((*kinds, keywords["input_ids"].numel(), trains < 10))

        model.register_forward_hook(look, with_kwargs=True)
        return model

    monkeypatch.setattr("bamoe.checkpoints.loading.load_model", load)
    # A build for GPUs on a machine without any.
    monkeypatch.setattr(
        "torch.accelerator.current_accelerator", lambda check_available=False: None if check_available else "cuda"
    )
    result = timed.function(**{**timed.arguments, "steps": 1})
    assert result["tokens"] > 0
    own = (torch.bfloat16, torch.bfloat16, True, 64, True)
    other = (torch.float32, torch.bfloat16, False, 256, False)
    assert seen == ([own] * 4 + [other]) * 4
