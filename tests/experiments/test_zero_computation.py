"""A row with zero-computation experts goes through a whole experiment, to its record and its tables."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from bamoe.checkpoints.loading import load_config
from bamoe.evaluation import evaluate
from bamoe.experiments.rows import experiment_rows
from bamoe.experiments.run import run_experiment
from bamoe.experiments.schema import Experiment
from bamoe.reports.experts_per_token import TokenCosts, experts_per_token_tables
from tests.experiments.tiny import DOMAINS, experiment

# Routers of models that learn nothing may well collapse.
pytestmark = pytest.mark.filterwarnings("ignore::bamoe.training.collapse.CollapseWarning")

PLUS = {"zero_computation": {"zero": 1, "copy": 1, "constant": 2}, "tau": 0.5, "num_experts_per_tok": 2}
VARIANTS: list[Any] = [
    "btx-top-2",
    {"variant": "btx-top-2", "key": "plus", "name": "BTX, MoE++", "recipe": {"feed_forward": PLUS}},
]


def test_rows_with_zero_computation_experts(tmp_path: Path) -> None:
    content = experiment(tmp_path, variants=VARIANTS)
    record = run_experiment(content, tmp_path / "out", workers=0)
    assert record is not None
    (run,) = record.row("plus").runs
    folder = tmp_path / "out" / "run-0"
    written = yaml.safe_load((folder / "mix" / "plus" / "upcycle.yaml").read_text())
    # A variant's own routing holds unless the row says otherwise.
    assert written["feed_forward"] == {**PLUS, "norm_topk_prob": True}
    config = load_config(folder / "train" / "plus" / "model")
    assert (config.num_experts, config.num_zero_computation_experts, config.zero_computation_tau) == (4, 4, 0.5)

    paths = {name: content["domains"][name]["valid"] for name in DOMAINS}
    again = evaluate(folder / "train" / "plus" / "model", paths, sequence_length=32, specialization=True).to_dict()
    assert (run.routing, run.token_classes) == (again["routing"], again["token_classes"])

    tables = experts_per_token_tables(
        [
            TokenCosts(row.name, [run.routing for run in row.runs], [run.token_classes for run in row.runs])
            for row in record.rows
            if row.runs[0].routing
        ]
    )
    by_domain, by_class, by_layer = tables.values()
    assert [each["model"] for each in by_domain.records] == ["BTX, MoE++"]  # BTX: always two
    layers = again["routing"]["feed_forward"]
    means = {name: [layer["experts_per_token"] for layer in layers[name]] for name in DOMAINS}
    for name in DOMAINS:
        assert by_domain.records[0][f"mean {name}"] == pytest.approx(fmean(means[name]))
    for number in range(2):
        assert by_layer.records[0][f"mean {number}"] == pytest.approx(fmean(each[number] for each in means.values()))
    for name, each in again["token_classes"]["feed_forward"].items():
        assert by_class.records[0][f"mean {name}"] == pytest.approx(fmean(each["experts_per_token"]))
    assert "word start" in by_class.markdown()
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert by_layer.markdown() in report


def test_a_row_costs_what_its_mixture_costs_and_its_mistakes_are_named(tmp_path: Path) -> None:
    rows = {row.key: row for row in experiment_rows(Experiment.read(experiment(tmp_path, variants=VARIANTS)))}
    plain, plus = (rows[key].costs.parameters.total for key in ("btx-top-2", "plus"))
    # Two layers: four more rows of the router and three rows for each constant expert (width 16); gating residuals.
    assert plus - plain == 2 * (4 * 16 + 2 * 3 * 16) + 8 * 8
    wrong = {"variant": "btx-top-2", "recipe": {"feed_forward": {"zero_computation": {"constants": 2}}}}
    with pytest.raises(ValueError, match=r"btx-top-2: .*did you mean 'constant'\?"):
        experiment_rows(Experiment.read(experiment(tmp_path, variants=[wrong])))
