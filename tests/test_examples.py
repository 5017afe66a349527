"""The shipped files are what the code reads, and their rows can be had."""

from pathlib import Path

import pytest
import yaml

from bamoe.experiments.rows import experiment_rows
from bamoe.experiments.schema import Experiment
from bamoe.training import TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/train_*.yaml")), ids=lambda path: path.name)
def test_training_configs(path):
    assert TrainConfig.read(path).parallel is not None


@pytest.mark.parametrize("name", ["examples/experiment.yaml", "benchmarks/quality/quality.yaml"])
def test_experiments_match_parameters_and_compute(name):
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    if "builtin_characters" not in content:
        content["builtin_characters"] = 1000  # the benchmark brings its text
    rows = {row.key: row for row in experiment_rows(Experiment.read(content))}
    btx, bam = (rows[key].costs.parameters for key in ("btx-top-3-of-6", "bam-kv-experts"))
    assert btx.total == pytest.approx(bam.total, rel=0.005)
    assert btx.active == pytest.approx(bam.active, rel=0.005)
    own, reference = rows["bam-kv-experts-compute"], rows["btx-top-1"]
    assert own.flops_per_token * own.tokens == pytest.approx(reference.flops_per_token * reference.tokens, rel=0.005)
