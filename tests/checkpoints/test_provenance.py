"""The provenance is plain data that says how to make a build again."""

import json
from importlib.metadata import version

from bamoe.checkpoints.provenance import provenance
from bamoe.checkpoints.reader import CheckpointReader
from tests.dense_models import save_dense


def test_it_has_recipe_sources_hashes_versions_and_seed(tmp_path):
    path = save_dense(tmp_path / "model")
    with CheckpointReader(path) as reader:
        made = provenance({"recipe": "bam"}, {"seed": ("owner/model", reader)}, ["[rope] allowed"], router_seed=7)
        hashes = reader.hashes()
    assert json.loads(json.dumps(made)) == made
    assert made["recipe"] == {"recipe": "bam"}
    assert made["router_seed"] == 7
    assert made["overrides"] == ["[rope] allowed"]
    assert made["sources"] == {"seed": {"source": "owner/model", "path": str(path.resolve()), "sha256": hashes}}
    assert made["versions"]["torch"] == version("torch")
