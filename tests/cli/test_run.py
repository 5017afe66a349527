"""`bamoe run`: an experiment's plan, its mistakes as messages, and a run of chosen steps."""

import yaml

from bamoe.cli.main import main
from tests.experiments.tiny import experiment


def file(tmp_path, **changes):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment(tmp_path, **changes), sort_keys=False))
    return str(path)


def test_the_plan_shows_what_each_row_gets_and_writes_nothing(tmp_path, capsys):
    timed = {"variant": "bam-kv-experts", "budget": "device time"}
    path = file(tmp_path, variants=["btx-top-1", timed])
    assert main(["run", path, str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    btx = next(line.split() for line in lines if line.startswith("btx-top-1"))
    assert btx[1] == "data"
    assert btx[4] == "1.02k"
    assert "run-0/branch/code" in "".join(lines)
    assert not (tmp_path / "out").exists()


def test_chosen_steps_say_what_is_left(tmp_path, capsys):
    path, out = file(tmp_path), str(tmp_path / "out")
    assert main(["run", path, out, "--only", "text", "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("text ")
    assert f"other steps are left: `bamoe run {path} {out}`" in shown
    assert main(["run", path, out, "--only", "branch/code"]) == 1
    error = capsys.readouterr().err
    assert "run-0/branch/code needs run-0/seed, not done" in error
    assert "Traceback" not in error


def test_mistakes_are_messages(tmp_path, capsys):
    assert main(["run", file(tmp_path, variants=["btx-top1"]), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "no variant 'btx-top1'; did you mean" in error
    assert main(["run", file(tmp_path, sequence_lenght=3), str(tmp_path / "out")]) == 1
    assert "did you mean 'sequence_length'?" in capsys.readouterr().err
    (tmp_path / "out").write_text("")
    assert main(["run", file(tmp_path), str(tmp_path / "out")]) == 1
    assert "is a file; choose a folder" in capsys.readouterr().err
