"""Training configs: what is refused, and with what words; the learning-rate schedule."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from bamoe.errors import ConfigError
from bamoe.training import Schedule, TrainConfig

MINIMAL = """
model: models/bam
output: runs/bam
data: [{name: code, path: code.jsonl.gz, weight: 0.9}, {name: general, path: general.txt, weight: 0.1}]
sequence_length: 256
tokens: 400_000
batch_tokens: 4096
learning_rate: 1.0e-3
schedule: {warmup_tokens: 80_000, decay: cosine, final: 0.1}
seed: 0
"""


def values(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load(MINIMAL) | changes


def stages(*parts: Any) -> list[dict[str, Any]]:
    """Stages from what trains and until when, in turn."""
    return [
        {"trainable": trainable} | ({"until_tokens": until} if until else {})
        for trainable, until in zip(parts[::2], [*parts[1::2], None], strict=True)
    ]


def test_a_step_belongs_to_the_stage_in_which_it_begins() -> None:
    config = TrainConfig.read(values(stages=stages("routers", 4096, ["routers", "experts"], 4097 + 4096, "all")))
    assert config.stage_starts == [0, 1, 3]
    assert TrainConfig.read(config.model_dump(mode="json")) == config
    assert TrainConfig.read(values()).stage_starts == [0]


def test_reads_the_documented_file(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(MINIMAL)
    config = TrainConfig.read(tmp_path / "train.yaml")
    assert (config.tokens, config.batch_tokens, config.steps) == (400_000, 4096, 97)
    assert [corpus.weight for corpus in config.data] == [0.9, 0.1]
    assert config.schedule == Schedule(warmup_tokens=80_000, decay="cosine", final=0.1)
    # What is recorded beside a model reads back as the same run.
    assert TrainConfig.read(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 4000}, r"batch_tokens \(4000\) must be a multiple of sequence_length \(256\).* 3840 or 4096"),
        (
            {"batch_tokens": 100},
            r"batch_tokens \(100\) must be a multiple of sequence_length \(256\), for instance 256",
        ),
        ({"micro_batch_tokens": 300}, r"micro_batch_tokens \(300\) must be a multiple of sequence_length"),
        ({"micro_batch_tokens": 768}, r"batch_tokens \(4096\) must be a multiple of micro_batch_tokens \(768\)"),
        ({"tokens": 4095}, r"tokens \(4095\) is less than one step"),
        ({"schedule": {"warmup_tokens": 400_001}}, r"warmup_tokens \(400001\) is more than tokens \(400000\)"),
        ({"schedule": {"decay": "constant", "final": 0.1}}, "a constant schedule has no final value"),
        ({"schedule": {"decay": "cosinus"}}, r"schedule.decay.*'cosine', 'linear' or 'constant' \(found 'cosinus'\)"),
        ({"schedule": {"warmup": 3}}, "unknown key 'schedule.warmup'; did you mean 'warmup_tokens'"),
        ({"learning_rte": 1}, "unknown key 'learning_rte'; did you mean 'learning_rate'"),
        ({"data": []}, "data: List should have at least 1 item"),
        ({"data": [{"name": "a", "path": "b", "weight": 0}]}, r"data.0.weight.*greater than 0 \(found 0\)"),
        ({"data": [{"name": "a", "path": "b"}] * 2}, "names in data must differ; repeated: a"),
        ({"data": [{"name": "a", "path": "b", "wieght": 1}]}, "did you mean 'weight'"),
        ({"betas": [0.9, 1.0]}, r"betas must be at least 0 and less than 1, found \[0.9, 1.0\]"),
        ({"evaluate_every_tokens": 4096}, "evaluate_every_tokens needs validation"),
        ({"autocast": "bfloat16", "dtype": "bfloat16"}, "autocast is for float32 weights"),
        ({"output": "models"}, "output models holds the input models/bam"),
        ({"output": "./models/../models/bam"}, "holds the input models/bam"),
        ({"learning_rate": 0}, "learning_rate.*greater than 0"),
        ({"learning_rate": float("inf")}, "learning_rate.*finite"),
        ({"weight_decay": float("inf")}, "weight_decay.*finite"),
        ({"router_aux_loss_coef": float("inf")}, "router_aux_loss_coef.*finite"),
        ({"router_z_loss_coef": float("nan")}, "router_z_loss_coef.*finite"),
        ({"trainable": "router"}, r"trainable.*'all', 'routers', 'experts' or 'shared' \(found 'router'\)"),
        (
            {"trainable": ["all", "routers"]},
            r"trainable: name each part once, and all alone, found \['all', 'routers'\]",
        ),
        ({"trainable": ["shared", "shared"]}, "trainable: name each part once"),
        ({"trainable": []}, "trainable.*at least 1 item"),
        ({"stages": [{"trainable": "all"}], "trainable": "routers"}, "stages say what trains; leave trainable out"),
        ({"stages": [{"trainable": "routers"}, {"trainable": "all"}]}, "every stage but the last needs until_tokens"),
        ({"stages": [{"trainable": "all", "until_tokens": 4096}]}, "and the last has none"),
        (
            {"stages": [{"trainable": "all", "until": 4096}]},
            "unknown key 'stages.0.until'; did you mean 'until_tokens'",
        ),
        ({"stages": [{"trainable": "all", "reset_optimizer": True}]}, "the first stage starts as optimizer_state says"),
        ({"stages": stages("routers", 8192, "all", 5000, "routers")}, r"until_tokens must grow.*found \[8192, 5000\]"),
        ({"stages": stages("routers", 397_312, "all")}, r"leave one for the last stage, found \[397312\] of 400000"),
        ({"optimizer_state": "kept"}, "optimizer_state.*'reset' or 'keep'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.read(values(**changes))


def test_cosine_goes_from_warm_up_to_final() -> None:
    schedule = Schedule(warmup_tokens=100, decay="cosine", final=0.1)
    assert [schedule.factor(seen, 300) for seen in (50, 100)] == [0.5, 1.0]
    assert schedule.factor(200, 300) == pytest.approx(0.55)
    assert schedule.factor(150, 300) == pytest.approx(0.1 + 0.9 * (1 + 0.5**0.5) / 2)
    assert schedule.factor(300, 300) == pytest.approx(0.1)


def test_linear_and_constant() -> None:
    linear = Schedule(decay="linear", final=0.0)
    assert [linear.factor(seen, 100) for seen in (0, 25, 100)] == pytest.approx([1, 0.75, 0])
    constant = Schedule(warmup_tokens=50, decay="constant")
    assert [constant.factor(seen, 100) for seen in (25, 50, 100)] == [0.5, 1, 1]
    only_warm_up = Schedule(warmup_tokens=100)
    assert only_warm_up.factor(100, 100) == 1
