"""The provenance is plain data that says how to make a build again."""

import json
from importlib.metadata import version

import pytest

from bamoe.checkpoints.provenance import hashing, provenance
from bamoe.checkpoints.reader import CheckpointReader
from tests.dense_models import save_dense


def test_it_has_recipe_sources_hashes_versions_and_seed(tmp_path):
    path = save_dense(tmp_path / "model")
    with CheckpointReader(path) as reader:
        hashes = reader.hashes()
        sources = {"seed": ("owner/model", reader)}
        made = provenance({"recipe": "bam"}, sources, {"seed": hashes}, ["[rope] allowed"], router_seed=7)
    assert json.loads(json.dumps(made)) == made
    assert made["recipe"] == {"recipe": "bam"}
    assert made["router_seed"] == 7
    assert made["overrides"] == ["[rope] allowed"]
    assert made["sources"] == {"seed": {"source": "owner/model", "path": str(path.resolve()), "sha256": hashes}}
    assert made["versions"]["torch"] == version("torch")


def test_hashes_made_meanwhile_are_those_of_every_checkpoint(tmp_path, monkeypatch):
    first, second = (save_dense(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second")))
    hashed, hashes = [], CheckpointReader.hashes
    monkeypatch.setattr(CheckpointReader, "hashes", lambda self, *stop: hashed.append(self.path) or hashes(self, *stop))
    with CheckpointReader(first) as seed, CheckpointReader(second) as expert, CheckpointReader(first) as again:
        with hashing({"seed": seed, "a": expert, "b": again}) as results:
            made = results()
        assert made == {"seed": hashes(seed), "a": hashes(expert), "b": hashes(seed)}
    assert made["seed"] != made["a"]
    assert sorted(hashed) == sorted([first, second])  # each path once


def test_hashing_is_given_up_when_the_build_fails(tmp_path, monkeypatch):
    path = save_dense(tmp_path / "model")
    stopped, hashes = [], CheckpointReader.hashes

    def until_stopped(self, stop):
        assert stop.wait(60)
        stopped.append(hashes(self, stop))

    monkeypatch.setattr(CheckpointReader, "hashes", until_stopped)
    with CheckpointReader(path) as reader, pytest.raises(OSError, match="full"), hashing({"seed": reader}):
        raise OSError("full")
    assert stopped == [{}]
