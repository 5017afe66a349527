"""The command as a whole: start-up, exit codes, and where messages go."""

import os
import subprocess
import sys

import pytest

import bamoe
from bamoe.cli.main import main

COMMANDS = ("upcycle", "inspect", "train", "evaluate", "generate", "run", "demo")


def run(code: str, *arguments: str, **keys) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **keys)


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command}" in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"bamoe {command}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bamoe {bamoe.__version__}\n"


START = """
import sys
from bamoe.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
raise SystemExit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["upcycle", "--help"], 0),
        (["upcycle", "refused.yaml", "out"], 1),
        (["upcycle", "refused.yaml", "out", "--allow", "rope"], 1),
        (["run", "refused.yaml", "out"], 1),
        (["run", "refused.yaml", "out", "--dry-run"], 1),
    ],
)
def test_nothing_heavy_is_imported_for_help_or_a_refused_recipe(tmp_path, arguments, code):
    (tmp_path / "refused.yaml").write_text("recipe: bam\nsede: x\n")
    done = run(START, *arguments, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


def test_importing_the_package_imports_nothing_heavy():
    done = run("import bamoe, sys; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upcyle"], "upcyle"),
        (["upcycle"], "RECIPE.yaml"),
        (["inspect", "x", "--jsn"], "--jsn"),
        (["inspect", "absent/of/all"], "absent/of/all"),
        (["upcycle", "absent.yaml", "out"], "cannot read absent.yaml"),
    ],
)
def test_a_users_mistake_is_one_message_on_stderr_and_exit_code_1(arguments, message, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_an_interruption_is_exit_code_1():
    interrupted = """
import sys
from bamoe.recipes import mergekit
def stop(path): raise KeyboardInterrupt
mergekit.read_recipe = stop
from bamoe.cli.main import main
raise SystemExit(main(["upcycle", "recipe.yaml", "out"]))
"""
    done = run(interrupted)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "interrupted" in done.stderr


def test_a_bug_keeps_its_traceback():
    broken = """
from bamoe.recipes import mergekit
def fail(path): raise KeyError("a bug")
mergekit.read_recipe = fail
from bamoe.cli.main import main
main(["upcycle", "recipe.yaml", "out"])
"""
    done = run(broken)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a bug" in done.stderr


def test_a_reader_that_goes_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        command = [sys.executable, "-c", "from bamoe.cli.main import main; raise SystemExit(main(['--help']))"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ""


def test_the_public_names_are_those_of_their_modules():
    from bamoe.modeling.configuration_bamoe import BamoeConfig
    from bamoe.recipes.upcycle import upcycle

    assert bamoe.BamoeConfig is BamoeConfig
    assert bamoe.upcycle is upcycle
    assert set(bamoe.__all__) <= set(dir(bamoe))
    for name in bamoe.__all__:
        assert getattr(bamoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'upcyle'"):
        bamoe.upcyle  # noqa: B018 - the access is what is tested
