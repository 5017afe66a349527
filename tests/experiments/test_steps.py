"""Steps: their order, what makes them run again, which are chosen, and what happens when one fails."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from bamoe.errors import ConfigError
from bamoe.experiments.steps import Step, StepError, run_steps
from bamoe.locks import locked


def write(path, text):
    Path(path).write_text(text)
    return len(text)


def append(path):
    with Path(path).open("a") as file:
        file.write("x")


def refuse(reason):
    raise ConfigError(reason)


def wait_for_ever():
    threading.Event().wait()


@pytest.fixture
def run(tmp_path):
    def run(steps, workers=0, only=None, force=False):
        events = []
        records = run_steps(
            steps,
            tmp_path / "out",
            workers=workers,
            only=only,
            force=force,
            listener=lambda event, step, _: events.append((event, step.name)),
        )
        results = {name: record["result"] for name, record in records.items()}
        return results, [name for event, name in events if event == "finished"]

    return run


def chain(tmp_path, first="a", inputs=None):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    return [
        Step("one/a", write, {"path": str(a), "text": first}, makes=[a], inputs=inputs),
        Step("one/b", write, {"path": str(b), "text": "bb"}, needs=["one/a"], makes=[b]),
        Step("two/c", write, {"path": str(tmp_path / "c.txt"), "text": "ccc"}),
    ]


def test_results_come_by_name_and_are_kept(run, tmp_path):
    assert run(chain(tmp_path)) == ({"one/a": 1, "one/b": 2, "two/c": 3}, ["one/a", "one/b", "two/c"])
    assert run(chain(tmp_path)) == ({"one/a": 1, "one/b": 2, "two/c": 3}, [])


def test_the_record_says_what_was_called_with_what_by_what(run, tmp_path):
    run(chain(tmp_path, inputs={"file": "a hash"}))
    record = json.loads((tmp_path / "out" / "one" / "a" / "step.json").read_text())
    assert record["arguments"] == {"path": str(tmp_path / "a.txt"), "text": "a"}
    assert record["inputs"] == {"file": "a hash"}
    assert record["environment"]["torch"]
    assert record["code"]["bamoe"]
    after = json.loads((tmp_path / "out" / "one" / "b" / "step.json").read_text())
    assert after["needs"] == {"one/a": record["fingerprint"]}


def test_a_changed_argument_or_input_runs_the_step_and_what_needs_it(run, tmp_path):
    run(chain(tmp_path))
    assert run(chain(tmp_path, first="aaaa")) == ({"one/a": 4, "one/b": 2, "two/c": 3}, ["one/a", "one/b"])
    assert run(chain(tmp_path, first="aaaa", inputs="another hash"))[1] == ["one/a", "one/b"]


def test_a_changed_step_starts_in_an_empty_folder_and_an_interrupted_one_finds_its_own(run, tmp_path):
    folder = tmp_path / "out" / "step"
    step = Step("step", append, {"path": str(folder / "file")})
    run([step])
    (folder / "step.json").unlink()  # as if it had been killed before its record
    run([step])
    assert (folder / "file").read_text() == "xx"
    run([Step("step", append, {"path": str(folder / "file")}, inputs="changed")])
    assert (folder / "file").read_text() == "x"


def test_a_lost_output_or_a_torn_record_is_made_again(run, tmp_path):
    run(chain(tmp_path))
    (tmp_path / "b.txt").unlink()
    assert run(chain(tmp_path))[1] == ["one/b"]
    (tmp_path / "out" / "two" / "c" / "step.json").write_text('{"fingerprint": "')
    assert run(chain(tmp_path))[1] == ["two/c"]


def test_only_the_steps_that_a_pattern_names_run(run, tmp_path):
    assert run(chain(tmp_path), only=["two"])[1] == ["two/c"]
    assert run(chain(tmp_path), only=[])[0] == {"two/c": 3}
    with pytest.raises(StepError, match="one/b needs one/a, not done"):
        run(chain(tmp_path), only=["one/b"])
    assert run(chain(tmp_path), only=["one/*"])[1] == ["one/a", "one/b"]
    with pytest.raises(ConfigError, match=r"--only one/c: no such step; did you mean .*'one/a'"):
        run(chain(tmp_path), only=["one/c"])
    assert run(chain(tmp_path), only=["three/*"])[1] == []


def test_a_step_that_another_run_does_is_refused(run, tmp_path):
    folder = tmp_path / "out" / "one" / "a"
    folder.mkdir(parents=True)
    with locked(folder / ".lock", "that"):
        with pytest.raises(ConfigError, match=r"one/a is in use by another run \(process \d+"):
            run(chain(tmp_path), only=["one/a"])
        assert run(chain(tmp_path), only=["two"])[1] == ["two/c"]
    assert run(chain(tmp_path))[1] == ["one/a", "one/b"]


def test_force_does_the_chosen_steps_again(run, tmp_path):
    run(chain(tmp_path))
    assert run(chain(tmp_path), only=["two"], force=True)[1] == ["two/c"]
    assert run(chain(tmp_path), force=True)[1] == ["one/a", "one/b", "two/c"]


def test_files_that_no_step_wrote_are_left_alone(run, tmp_path):
    folder = tmp_path / "out" / "two" / "c"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="two/c holds files that no step wrote"):
        run(chain(tmp_path), only=["two"], force=True)
    assert (folder / "thesis.txt").read_text() == "precious"


def test_what_says_how_a_result_is_reached_is_no_part_of_it(run, tmp_path):
    path = str(tmp_path / "file")
    first = Step("step", write, {"path": path}, means={"text": "abc"})
    assert run([first]) == ({"step": 3}, ["step"])
    assert run([Step("step", write, {"path": path}, means={"text": "defg"})]) == ({"step": 3}, [])


def test_a_folder_that_begins_like_another_is_not_taken_for_it(run, tmp_path):
    beside = {"path": str(tmp_path / "out-beside" / "file"), "text": "abc"}
    (tmp_path / "out-beside").mkdir()
    (tmp_path / "moved-beside").mkdir()
    run([Step("step", write, beside)])
    shutil.move(tmp_path / "out", tmp_path / "moved")
    events = []
    run_steps(
        [Step("step", write, beside)], tmp_path / "moved", workers=0, listener=lambda *event: events.append(event[0])
    )
    assert events == ["kept"]


def test_a_full_disk_is_one_message(run, tmp_path, monkeypatch):
    def full(*arguments, **keys):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StepError, match="cannot write a file: No space left on device"):
        run(chain(tmp_path))
    monkeypatch.undo()
    assert run(chain(tmp_path))[1] == ["one/a", "one/b", "two/c"]


def test_a_failed_step_is_named_and_what_was_finished_before_it_is_kept(run, tmp_path):
    steps = [*chain(tmp_path)[:2], Step("d", refuse, {"reason": "no such thing"}, needs=["one/b"])]
    with pytest.raises(StepError, match="step 'd': no such thing"):
        run(steps)
    assert run(chain(tmp_path))[1] == ["two/c"]


def test_a_failure_does_not_wait_for_the_steps_beside_it(run):
    with pytest.raises(StepError, match="step 'refused': no"):
        run([Step("endless", wait_for_ever, {}), Step("refused", refuse, {"reason": "no"})], workers=2)
