"""What an experiment's YAML may say, and what is refused before anything runs."""

import copy

import pytest

from bamoe.errors import ConfigError
from bamoe.experiments.demo import demo_experiment
from bamoe.experiments.schema import Experiment
from bamoe.experiments.variants import variant
from bamoe.recipes.schema import Recipe
from tests.experiments.tiny import experiment


@pytest.fixture
def content(tmp_path):
    return experiment(tmp_path)


def changed(content, path, value):
    content = copy.deepcopy(content)
    *sections, key = path.split(".")
    place = content
    for section in sections:
        place = place[section]
    place[key] = value
    return content


def test_defaults_are_the_papers(content):
    read = Experiment.read(content)
    assert read.general == "general"
    assert read.branches.domains == ["code", "law", "math"]
    assert read.branches.general_share == 0.1
    assert read.branches.relative_learning_rate == 0.5
    assert [entry.key for entry in read.variants] == ["dense-mixture", "dense-all", "btx-top-1", "bam-kv-experts"]
    assert read.seeds == [0]


def test_reading_what_was_resolved_gives_the_same(content):
    read = Experiment.read(content)
    dumped = read.model_dump(mode="json")
    assert Experiment.read(dumped) == read


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("variants", ["bam-kv-expert"], "did you mean 'bam-kv-experts'"),
        ("variants", ["btx-top-7-of-6"], "selects 7 of 6 experts"),
        ("variants", ["dense-all", "dense-all"], "two rows are called dense-all; give one of them a key"),
        ("variants", [{"variant": "dense-all", "key": "code"}], "code is the seed's or a branch's name"),
        ("variants", [{"variant": "dense-all", "recipe": {"x": 1}}], "is a dense model and has no recipe"),
        ("variants", [{"variant": "bam-kv-experts", "budget": "compute"}], "budget_of is 'btx-top-1'; it must be"),
        ("variants", [{"variant": "btx-top-1", "parameters_of": "btx-top-1"}], "it must be another variant's key"),
        ("variants", [{"variant": "dense-all", "parameters_of": "x"}], "chooses the seats of a btx variant"),
        ("variants", [{"variant": "dense-all", "budget_of": "x"}], "budget_of belongs to budget: compute"),
        ("variants", [{"variant": "dense-all", "seeds": [7]}], r"seeds \[7\] are not among \[0\]"),
        ("variants", [{"variant": "dense-all", "key": "a/b"}], "names become folders"),
        ("variants", [{"variant": "dense-all", "training": {"tokens": 7}}], "tokens is set by the experiment"),
        ("variants", [{"variant": "sparse-all", "recipe": {"num_experts": 8}}], "num_experts cannot be set here"),
        ("variants", [{"variant": "btx-soft", "parameters_of": "dense-all"}], "btx-soft uses all its experts"),
        ("launch", "torchrun 'a", "launch: .*torchrun 'a.* is no command: No closing quotation"),
        ("domains", {"text": {"train": "t", "valid": "v"}, "seed": {"train": "t", "valid": "v"}}, "seed is the row of"),
        ("training", {"micro_batch_token": 7}, "did you mean 'micro_batch_tokens'"),
        ("builtin_characters", 1000, "either domains or builtin_characters"),
        ("domains", {}, "either domains or builtin_characters"),
        ("general", "poetry", "general: no domain poetry; there are general, code, law, math"),
        ("seed.data", {"poetry": 1.0}, "seed.data: no domain poetry"),
        ("seed.data", {"general": 0.0}, "greater than 0"),
        ("seed.model", "some/model", "a given model is not trained: leave out architecture, tokens"),
        ("seed.tokens", None, "missing: tokens"),
        ("branches.domains", ["general"], "its expert is the seed itself"),
        ("branches.data", {"general": {"code": 1.0}}, "branches.data: general is no branch"),
        ("seeds", [1, 1], "seeds must differ"),
        ("tables", [{"title": "t", "rows": ["btx"]}], "tables: no row btx"),
        ("samples", {"row": "btx", "prompts": {"code": "def"}}, "samples.row: no row btx"),
        ("batch_token", 3, "did you mean 'batch_tokens'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(content, path, value, message):
    with pytest.raises(ConfigError, match=message):
        Experiment.read(changed(content, path, value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": {"row": "btx-top-1", "prompts": {"code": "def"}}}, "btx-top-1 lacks the first random seed, 0"),
        ({"tables": [{"title": "t", "rows": ["dense-all"], "against": "btx-top-1"}]}, "dense-all and btx-top-1 have"),
        ({"variants": [{"variant": "bam-kv-experts", "budget": "device time"}]},
         r"bam-kv-experts-time: btx-top-1, whose device time it gets, lacks its seeds \[0\]"),
    ],
)  # fmt: skip
def test_rows_that_need_each_other_need_the_same_seeds(content, changes, message):
    variants = [{"variant": "btx-top-1", "seeds": [1]}, {"variant": "dense-all", "seeds": [0]}]
    content = {**content, "seeds": [0, 1], "variants": variants}
    assert Experiment.read(content)
    with pytest.raises(ConfigError, match=message):
        Experiment.read({**content, **changes, "variants": variants + changes.get("variants", [])})


def test_the_peak_of_a_given_seed_is_not_known(content):
    given = changed(content, "seed", {"model": "models/seed"})
    with pytest.raises(ConfigError, match=r"branches.learning_rate: the peak of a given seed is not known"):
        Experiment.read(given)
    given["branches"]["learning_rate"] = given["mixture"]["learning_rate"] = 1e-3
    assert Experiment.read(given).seed.model == "models/seed"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("btx-top-1", ("btx", "top_k", 1, False, None)),
        ("btx-top-2", ("btx", "top_k", 2, True, None)),
        ("btx-top-3-of-6", ("btx", "top_k", 3, True, None)),
        ("btx-soft", ("btx", "soft", None, False, None)),
        ("bam-kv-experts", ("bam", "top_k", 1, False, ("experts", "soft", None))),
        ("bam-kv-sharing", ("bam", "top_k", 1, False, ("shared", "soft", None))),
        ("bam-kv-sharing-top-2", ("bam", "top_k", 1, False, ("shared", "top_k", 2))),
    ],
)
def test_variants_are_recipes(name, expected):
    models = [{"name": str(i), "model": str(i)} for i in range(6)]
    recipe = Recipe.read({**variant(name).recipe, "seed": "s", "experts": models})
    routed, attention = recipe.feed_forward, recipe.attention
    experts = (attention.key_value, attention.routing, attention.num_experts_per_tok) if attention else None
    assert (recipe.recipe, routed.routing, routed.num_experts_per_tok, routed.norm_topk_prob, experts) == expected


def test_the_demo_is_an_experiment():
    demo, quick = demo_experiment(3), demo_experiment(3, quick=True)
    assert demo.seeds == quick.seeds == [3]
    assert demo.variants == quick.variants
    assert quick.seed.architecture == demo.seed.architecture
    assert quick.seed.tokens * 18 <= demo.seed.tokens
    assert quick.name != demo.name
