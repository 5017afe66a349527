"""A directory appears whole or not at all, and nothing that is not a model is ever deleted."""

import pytest

from bamoe.checkpoints import directory as directory_module
from bamoe.checkpoints.directory import atomic_directory
from bamoe.errors import ConfigError


def build(out, text="new", force=False, error=None):
    with atomic_directory(out, force) as directory:
        (directory / "config.json").write_text(text)
        if error is not None:
            raise error


def names(path):
    return sorted(child.name for child in path.iterdir())


def test_it_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    with atomic_directory(out) as directory:
        (directory / "config.json").write_text("new")
        assert not out.exists()
        assert directory.parent == out.parent
        assert directory.name.startswith(".")
    assert (out / "config.json").read_text() == "new"
    assert names(out.parent) == ["out"]


def test_it_has_the_usual_permissions(tmp_path):
    build(tmp_path / "out")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_nothing_is_left(tmp_path, error, force):
    if force:
        build(tmp_path / "out", "old")
    with pytest.raises(error):
        build(tmp_path / "out", "new", force, error)
    assert names(tmp_path) == (["out"] if force else [])
    if force:
        assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_an_existing_directory_is_refused_and_kept(tmp_path):
    build(tmp_path / "out", "old")
    with pytest.raises(ConfigError, match="--force"):
        build(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_force_replaces_it_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(directory_module, "_exchange", lambda *_: False)
    build(tmp_path / "out", "old")
    (tmp_path / "out" / "left-over").write_text("old")
    build(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert names(tmp_path / "out") == ["config.json"]
    assert names(tmp_path) == ["out"]


def test_force_deletes_only_models(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        build(tmp_path / "thesis", force=True)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigError, match="not a directory"):
        build(tmp_path / "file", force=True)
    build(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(ConfigError, match="not a directory"):
        build(tmp_path / "link", force=True)
    assert names(tmp_path) == ["file", "link", "model", "thesis"]


def test_one_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(ConfigError, match="exists"), atomic_directory(tmp_path / "out"):
        build(tmp_path / "out", "the other's")
    assert (tmp_path / "out" / "config.json").read_text() == "the other's"
    assert names(tmp_path) == ["out"]


def test_abandoned_directories_go_and_those_in_use_stay(tmp_path):
    abandoned = tmp_path / ".out.bamoe-abandoned"
    abandoned.mkdir()
    (abandoned / "model.safetensors").write_text("half")
    unrelated = tmp_path / ".output.bamoe-abandoned"
    unrelated.mkdir()
    with atomic_directory(tmp_path / "out") as first:
        assert not abandoned.exists()
        with atomic_directory(tmp_path / "out") as second:
            assert first.exists()
            (second / "config.json").write_text("second")
        (tmp_path / "out" / "config.json").unlink()
        (tmp_path / "out").rmdir()
    assert names(tmp_path) == [unrelated.name, "out"]
