"""A build killed at any point leaves nothing that loads, and under --force the old model untouched.

Children are forked from a server that has everything imported. Each counts the calls and returns of its build, from
the moment its hidden directory exists, and kills itself at a given one.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest

from bamoe.checkpoints.provenance import PROVENANCE_FILE
from bamoe.checkpoints.reader import CheckpointReader
from bamoe.errors import CheckpointError
from bamoe.recipes.upcycle import CARD_FILE, upcycle
from tests.dense_models import save_dense

POINTS = 16
DATED = {PROVENANCE_FILE, CARD_FILE}


def build(recipe, out, force, kill_at, kill_with, counted):
    """Run a build; send this process a signal at its n-th call or return, or count them."""
    calls = 0

    def count(frame, *_):
        nonlocal calls
        calls += bool(calls) or frame.f_code.co_name == "mkdtemp"
        if calls == kill_at:
            os.kill(os.getpid(), kill_with)

    warnings.simplefilter("ignore")
    sys.setprofile(count)
    upcycle(recipe, out, force=force, max_shard_size="30KB")
    sys.setprofile(None)
    counted.value = calls


@pytest.fixture(scope="module")
def run():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bamoe.recipes.upcycle", "bamoe.modeling.modeling_bamoe", __name__])

    def run_build(recipe, out, force=False, kill_at=-1, kill_with=signal.SIGKILL):
        counted = context.Value("q", 0)
        child = context.Process(target=build, args=(recipe, out, force, kill_at, kill_with, counted))
        child.start()
        child.join()
        assert child.exitcode in (0, -kill_with)
        return counted.value if child.exitcode == 0 else None

    return run_build


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return [save_dense(directory / name, seed=seed) for seed, name in enumerate(["general", "code"])]


@pytest.fixture(scope="module")
def recipe(models):
    return {
        "recipe": "bam",
        "seed": str(models[0]),
        "experts": [{"name": model.name, "model": str(model)} for model in models],
    }


@pytest.fixture(scope="module")
def whole(run, recipe, tmp_path_factory):
    """The build that is not interrupted, and how many calls it makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    calls = run(recipe, out)
    assert calls is not None
    return contents(out), calls


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in DATED}


def loads(directory: Path) -> bool:
    try:
        CheckpointReader(directory).close()
    except CheckpointError:
        return False
    return True


def points(calls: int, name: str) -> list[int]:
    """Calls spread over the build, densest at its beginning (weights) and its end (directories change places)."""
    generator = random.Random(name)
    distances = [int(calls ** generator.uniform(0.1, 1)) for _ in range(POINTS)]
    return [distance if i % 2 else max(1, calls - distance) for i, distance in enumerate(distances)]


def check_left_over(parent: Path, whole_contents: dict[str, bytes]) -> None:
    """A hidden directory may hold a whole build that lacked only its place, or nothing that loads."""
    for directory in parent.iterdir():
        if directory.name.startswith(".") and loads(directory):
            assert contents(directory) == whole_contents


def test_killed_anywhere_a_build_leaves_nothing_that_loads(run, recipe, whole, tmp_path):
    expected, calls = whole
    killed = 0
    for number, point in enumerate(points(calls, "fresh")):
        parent = tmp_path / str(number)
        parent.mkdir()
        stopped = run(recipe, parent / "out", kill_at=point) is None
        killed += stopped
        if (parent / "out").exists():
            assert contents(parent / "out") == expected
        check_left_over(parent, expected)
        if stopped and not (parent / "out").exists():  # the next build is not disturbed, and cleans up
            upcycle(recipe, parent / "out", max_shard_size="30KB")
            assert contents(parent / "out") == expected
            assert [path.name for path in parent.iterdir()] == ["out"]
    assert killed >= POINTS // 2


def test_killed_anywhere_a_forced_build_keeps_the_old_model(run, recipe, models, whole, tmp_path):
    expected, _ = whole
    old = upcycle({"recipe": "sparse", "seed": str(models[0]), "num_experts": 2}, tmp_path / "old")
    before = contents(old)
    calls = run(recipe, shutil.copytree(old, tmp_path / "counted" / "out"), force=True)
    outcomes = []
    for number, point in enumerate(points(calls, "forced")):
        parent = tmp_path / str(number)
        shutil.copytree(old, parent / "out")
        run(recipe, parent / "out", force=True, kill_at=point)
        found = contents(parent / "out")
        assert found in (before, expected)
        outcomes.append("old" if found == before else "new")
        for directory in parent.iterdir():
            if directory.name.startswith(".") and loads(directory):
                # The old model on its way out is the one thing besides a whole build.
                assert contents(directory) == expected or contents(directory).items() <= before.items()
    assert set(outcomes) == {"old", "new"}


def test_a_polite_signal_leaves_nothing_that_loads_either(run, recipe, whole, tmp_path):
    expected, calls = whole
    assert run(recipe, tmp_path / "out", kill_at=calls // 2, kill_with=signal.SIGTERM) is None
    assert not (tmp_path / "out").exists()
    check_left_over(tmp_path, expected)


def test_a_build_interrupted_by_the_keyboard_leaves_no_trace(recipe, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(recipe, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
