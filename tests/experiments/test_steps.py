"""Steps: their order, what makes them run again, and what happens when one fails."""

import threading
from pathlib import Path

import pytest

from bamoe.errors import ConfigError
from bamoe.experiments.steps import Step, StepError, run_steps


def write(path, text):
    Path(path).write_text(text)
    return len(text)


def refuse(reason):
    raise ConfigError(reason)


def wait_for_ever():
    threading.Event().wait()


@pytest.fixture
def run(tmp_path):
    def run(steps, workers=0):
        events = []
        results = run_steps(
            steps,
            tmp_path / "records",
            workers=workers,
            listener=lambda event, step, _: events.append((event, step.name)),
        )
        return results, [name for event, name in events if event == "finished"]

    return run


def chain(tmp_path, first="a", inputs=None):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    return [
        Step("a", write, {"path": str(a), "text": first}, makes=[a], inputs=inputs),
        Step("b", write, {"path": str(b), "text": "bb"}, needs=["a"], makes=[b]),
        Step("c", write, {"path": str(tmp_path / "c.txt"), "text": "ccc"}),
    ]


def test_results_come_by_name_and_are_kept(run, tmp_path):
    assert run(chain(tmp_path)) == ({"a": 1, "b": 2, "c": 3}, ["a", "b", "c"])
    assert run(chain(tmp_path)) == ({"a": 1, "b": 2, "c": 3}, [])


def test_a_changed_argument_or_input_runs_the_step_and_what_needs_it(run, tmp_path):
    run(chain(tmp_path))
    assert run(chain(tmp_path, first="aaaa")) == ({"a": 4, "b": 2, "c": 3}, ["a", "b"])
    assert run(chain(tmp_path, first="aaaa", inputs="the text of a config"))[1] == ["a", "b"]


def test_a_lost_output_or_a_torn_record_is_made_again(run, tmp_path):
    run(chain(tmp_path))
    (tmp_path / "b.txt").unlink()
    assert run(chain(tmp_path))[1] == ["b"]
    (tmp_path / "records" / "c.json").write_text('{"fingerprint": "')
    assert run(chain(tmp_path))[1] == ["c"]


def test_a_failed_step_is_named_and_what_was_finished_before_it_is_kept(run, tmp_path):
    steps = [*chain(tmp_path)[:2], Step("d", refuse, {"reason": "no such thing"}, needs=["b"])]
    with pytest.raises(StepError, match="step 'd': no such thing"):
        run(steps)
    assert run(chain(tmp_path))[1] == ["c"]


def test_a_failure_does_not_wait_for_the_steps_beside_it(run):
    with pytest.raises(StepError, match="step 'refused': no"):
        run([Step("endless", wait_for_ever, {}), Step("refused", refuse, {"reason": "no"})], workers=2)
