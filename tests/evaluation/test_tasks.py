"""Tasks of lm-evaluation-harness on dense models and mixtures, offline, against scores made here from the logits."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from bamoe.checkpoints.loading import load_model
from bamoe.errors import BamoeError, CheckpointError, ConfigError, DataError
from bamoe.evaluation import evaluate_tasks
from bamoe.evaluation.tasks import load_tasks, results_table
from tests.training.tiny import dense, mixture, tokenizer

CHOICES = ["the boat", "def total", "gulls cried above the harbour", "x"]
QUESTIONS = [
    *("the tide carried", "and the gulls", "def", "return sum", "over the bar,", "for value, weight", "tide"),
    *("weight > 0", "the harbour", "carried the boat over"),
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{answer}
metadata: {{version: 2}}
"""
MULTIPLE_CHOICE = """\
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]"""
GENERATE = """\
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    dense(folder / "dense", initializer_range=0.5)
    mixture(folder / "mixture", initializer_range=0.5)
    return folder


def choice_task(folder: Path, name: str = "which") -> Path:
    data = folder / f"{name}.jsonl"
    documents = [{"question": question, "choices": CHOICES, "answer": i % 3} for i, question in enumerate(QUESTIONS)]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return write_task(folder, name, data, "multiple_choice", MULTIPLE_CHOICE)


def write_task(folder: Path, name: str, data: Path, kind: str, answer: str) -> Path:
    task = folder / f"{name}.yaml"
    task.write_text(TASK.format(name=name, data=data, kind=kind, answer=answer))
    return task


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, question: str, choice: str) -> float:
    """Of the tokens of " choice" after those of the question, one forward pass per token."""
    context = tokenizer()(question)["input_ids"]
    ids = tokenizer()(f"{question} {choice}")["input_ids"]
    assert ids[: len(context)] == context
    total = 0.0
    for position in range(len(context), len(ids)):
        logits = model(torch.tensor([ids[:position]]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[ids[position]])
    return total


@torch.no_grad()
def greedy(model: torch.nn.Module, question: str) -> str:
    """Six tokens, each from a forward pass over all before it, up to the first "e"."""
    ids = tokenizer()(question)["input_ids"]
    new: list[int] = []
    while len(new) < 6 and (not new or new[-1] != 0):
        new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer().decode(new, skip_special_tokens=True).split("e")[0]


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_multiple_choice_agrees_with_the_logits(folder: Path, kind: str) -> None:
    results = evaluate_tasks(folder / kind, [str(choice_task(folder))], batch_size=4)
    model = load_model(folder / kind)
    right, right_per_character = 0, 0
    for i, question in enumerate(QUESTIONS):
        scores = [log_likelihood(model, question, choice) for choice in CHOICES]
        per_character = [score / len(choice) for score, choice in zip(scores, CHOICES, strict=True)]
        right += scores.index(max(scores)) == i % 3
        right_per_character += per_character.index(max(per_character)) == i % 3
    found = results["results"]["which"]
    assert found["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert found["acc_norm,none"] == pytest.approx(right_per_character / len(QUESTIONS))
    assert 0 < right + right_per_character < 2 * len(QUESTIONS)
    assert results["n-samples"]["which"] == {"original": len(QUESTIONS), "effective": len(QUESTIONS)}
    assert json.loads(json.dumps(results)) == results


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_generation_agrees_with_the_logits(folder: Path, kind: str) -> None:
    model = load_model(folder / kind)
    expected = [greedy(model, question) for question in QUESTIONS]
    assert len(set(expected)) > 3
    # Every second document asks for what the model says, the others for something else.
    documents = [
        {"question": question, "continuation": said if i % 2 else f"not {said}"}
        for i, (question, said) in enumerate(zip(QUESTIONS, expected, strict=True))
    ]
    data = folder / f"{kind}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    write_task(folder, f"say_{kind}", data, "generate_until", GENERATE)
    # Questions of several lengths in one batch: padded on the left.
    results = evaluate_tasks(
        model.train(), ["say_*"], tokenizer=tokenizer(), include_path=folder, batch_size=4, limit=8
    )
    assert results["results"][f"say_{kind}"]["exact_match,none"] == 0.5
    assert results["n-samples"][f"say_{kind}"]["effective"] == 8
    assert model.training  # left as it was
    (folder / f"say_{kind}.yaml").unlink()


def test_groups_are_reported_with_their_tasks(folder: Path, tmp_path: Path) -> None:
    choice_task(tmp_path, "one")
    choice_task(tmp_path, "two")
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    tasks = load_tasks(["both"], tmp_path)
    results = evaluate_tasks(folder / "dense", tasks, num_fewshot=1, limit=5)
    accuracies = [results["results"][name]["acc,none"] for name in ("one", "two")]
    assert results["groups"]["both"]["acc,none"] == pytest.approx(sum(accuracies) / 2)
    assert results["n-shot"]["one"] == 1
    table = results_table(results)
    assert table.count("|both") == 2  # of tasks, and of groups
    assert f"{accuracies[0]:.3f}"[:5] in table


def test_nothing_is_said_or_left_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    task = choice_task(folder)
    monkeypatch.chdir(tmp_path)
    given = tokenizer()
    evaluate_tasks(load_model(folder / "dense"), [str(task)], tokenizer=given, limit=2)
    assert list(tmp_path.iterdir()) == []
    assert given.pad_token is None
    # Bars are the reader's to switch off; warnings and git's complaints are not.
    lines = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "/s]" not in line]
    assert [line for line in lines if line.strip()] == []


def test_inputs_that_are_too_long_are_counted(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    documents = [{"question": "tide " * length, "choices": CHOICES[:2], "answer": 0} for length in (3, 70, 80)]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = write_task(tmp_path, "long", data, "multiple_choice", MULTIPLE_CHOICE)
    with pytest.warns(UserWarning, match="cut off the beginning of its input 4 times, .* the model's 64 positions"):
        evaluate_tasks(folder / "dense", [str(task)])


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    def fails(error: type[BamoeError], message: str, tasks: list[str], **changes: object) -> None:
        with pytest.raises(error, match=message):
            evaluate_tasks(**({"model": folder / "dense", "tasks": tasks} | changes))  # type: ignore[arg-type]

    task = str(choice_task(tmp_path))
    fails(ConfigError, "there is no folder of tasks .*gone", [task], include_path=tmp_path / "gone")
    fails(CheckpointError, "no such directory", [task], model=tmp_path / "gone")
    fails(ConfigError, "needs its tokenizer", [task], model=load_model(folder / "dense"))


def test_tasks_are_looked_at_before_the_model(tmp_path: Path) -> None:
    write_task(tmp_path, "empty", tmp_path / "gone.jsonl", "multiple_choice", MULTIPLE_CHOICE)
    with pytest.raises(DataError, match=r"cannot load the tasks empty: FileNotFoundError: .*gone\.jsonl"):
        evaluate_tasks(tmp_path / "gone", ["empty"], include_path=tmp_path)


def test_tasks_of_the_harness_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A small folder in place of the harness's own, whose thousands of files take seconds to index.
    (tmp_path / "harness").mkdir()
    choice_task(tmp_path / "harness", "sailing")
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "harness" / "manager.py"))
    with pytest.raises(ConfigError, match=r"no task of lm-evaluation-harness: sailling; did you mean sailing\?"):
        evaluate_tasks(tmp_path / "gone", ["sailing", "sailling"])
    assert list(evaluate_tasks(folder / "dense", ["sail*"], limit=1)["results"]) == ["sailing"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "group.yaml").write_text("group: here\ntask: [sailing]\n")  # of one of the harness's tasks
    results = evaluate_tasks(folder / "dense", ["here"], include_path=tmp_path / "own", limit=1)
    assert results["group_subtasks"]["here"] == ["sailing"]
    assert "acc,none" in results["results"]["sailing"]


def test_the_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'bamoe\[eval\]'"):
        evaluate_tasks(folder / "dense", ["hellaswag"])
