"""Information about tokens and domains against counts made one token at a time."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from bamoe.checkpoints.loading import load_model
from bamoe.data.corpora import Corpus
from bamoe.data.tokens import read_tokens
from bamoe.evaluation import evaluate
from bamoe.evaluation.perplexity import evaluate_streams
from bamoe.evaluation.specialization import MIN_COUNT, TOP_TOKENS, TokenExperts, mutual_information
from tests.training.tiny import corpus, dense, mixture, tokenizer

LENGTH = 16
EXPERTS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {name: corpus(folder / f"{name}.jsonl", name, documents) for name, documents in (("sea", 30), ("code", 12))}


def ids_of(path: Path) -> list[int]:
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [token for text in texts for token in [*tokenizer()(text)["input_ids"], 0]]


def information(joint: dict[tuple[object, int], float]) -> float:
    """Sum of p(a, b) ln(p(a, b) / p(a) p(b)), term by term."""
    total = sum(joint.values())
    rows: dict[object, float] = defaultdict(float)
    columns: dict[int, float] = defaultdict(float)
    for (row, column), weight in joint.items():
        rows[row] += weight / total
        columns[column] += weight / total
    return sum(
        weight / total * math.log(weight / total / rows[row] / columns[column])
        for (row, column), weight in joint.items()
        if weight
    )


@pytest.mark.parametrize(("top_k", "attention_top_k"), [(1, None), (2, 1)])
def test_agrees_with_counting(tmp_path: Path, data: dict[str, Path], top_k: int, attention_top_k: int | None) -> None:
    directory = mixture(
        tmp_path / "model",
        initializer_range=0.5,
        num_experts_per_tok=top_k,
        attention_routing="soft" if attention_top_k is None else "top_k",
        num_attention_experts_per_tok=attention_top_k,
    )
    result = evaluate(directory, data, sequence_length=LENGTH, batch_tokens=3 * LENGTH, specialization=True)
    assert result.specialization is not None
    model = load_model(directory)
    # Per kind and layer: weight of (token, expert) and of (domain, expert), counted one token at a time.
    tokens: dict[tuple[str, int], dict[tuple[object, int], float]] = defaultdict(lambda: defaultdict(float))
    domains: dict[tuple[str, int], dict[tuple[object, int], float]] = defaultdict(lambda: defaultdict(float))
    occurrences: Counter[int] = Counter()
    for name, path in data.items():
        ids = ids_of(path)
        seen = len(ids) - 1
        occurrences.update(ids[:seen])
        for start in range(0, seen, LENGTH):
            block = ids[start : min(start + LENGTH, seen)]
            with torch.no_grad():
                output = model(torch.tensor([block]), output_router_logits=True)
            for kind, logits, selected in (
                ("feed_forward", output.router_logits, top_k),
                ("attention", output.attention_router_logits, attention_top_k),
            ):
                for layer, rows in enumerate(logits):
                    for token, row in zip(block, rows, strict=True):
                        p = row.double().softmax(-1).tolist()
                        chosen = sorted(range(EXPERTS), key=lambda expert: -p[expert])[:selected]
                        for expert in chosen:
                            weight = p[expert] if selected is None else 1 / selected
                            tokens[kind, layer][token, expert] += weight
                            domains[kind, layer][name, expert] += weight / seen
    frequent = {token for token, count in occurrences.items() if count >= MIN_COUNT}
    assert 10 < len(frequent) < len(occurrences)
    for (kind, layer), joint in tokens.items():
        found = result.specialization[kind][layer]
        assert found.domain_information == pytest.approx(information(domains[kind, layer]), abs=1e-6)
        among = {pair: weight for pair, weight in joint.items() if pair[0] in frequent}
        assert found.token_information == pytest.approx(information(among), abs=1e-6)
        total = sum(joint.values())
        for expert in range(EXPERTS):
            marginal = sum(weight for (_, chosen), weight in joint.items() if chosen == expert) / total
            pmi = {token: joint[token, expert] / total for token in frequent if joint[token, expert] > 0}
            pmi = {token: math.log(p / marginal / (occurrences[token] / total)) for token, p in pmi.items()}
            best = sorted((token for token in pmi if pmi[token] > 1e-9), key=lambda token: -pmi[token])[:TOP_TOKENS]
            listed = found.tokens[expert]
            assert [affinity.pmi for affinity in listed] == pytest.approx([pmi[token] for token in best], abs=1e-6)
            for affinity in listed:
                assert affinity.pmi == pytest.approx(pmi[affinity.token], abs=1e-6)
                assert affinity.count == occurrences[affinity.token]
                assert affinity.share == pytest.approx(joint[affinity.token, expert] / affinity.count, abs=1e-6)
                assert affinity.text == tokenizer().decode([affinity.token])
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))["specialization"]
    assert plain["attention"][1]["token_information"] == result.specialization["attention"][1].token_information
    assert {"token", "text", "count", "share", "pmi"} == plain["feed_forward"][0]["tokens"][0][0].keys()


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_counts_are_of_the_tokens_that_routers_see(
    tmp_path: Path, data: dict[str, Path], max_tokens: int | None
) -> None:
    model = load_model(mixture(tmp_path / "model"))
    streams = [
        read_tokens(Corpus(name=name, path=str(path)), tokenizer(), count_bytes=True) for name, path in data.items()
    ]
    counted = TokenExperts(model.config, streams, max_tokens)
    routing = evaluate_streams(model, streams, LENGTH, max_tokens=max_tokens, token_experts=counted).routing
    assert routing is not None
    counts = counted.kinds["feed_forward"].counts
    assert counts is not None
    seen = sum(min(len(stream) - 1, max_tokens or len(stream)) for stream in streams)
    assert counts.sum(dim=(1, 2)).tolist() == [seen] * 2
    assert (counts[:, :-1].sum(dim=-1) == torch.from_numpy(counted.kinds["feed_forward"].occurrences)).all()


def test_mutual_information_of_known_tables() -> None:
    assert mutual_information(np.eye(4)) == pytest.approx(math.log(4))
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-15)
    assert mutual_information(np.zeros((2, 3))) == 0


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_information_by_chance_is_that_of_independent_choices(tmp_path: Path, top_k: int | None) -> None:
    """Random logits that know nothing of the token, with experts that are not equally likely."""
    text = tmp_path / "c.txt"
    random = np.random.default_rng(0)
    text.write_text(" ".join(random.choice(["the", "tide", "boat", "bar", "gulls", "def", "sum"], size=4000)))
    stream = read_tokens(Corpus(name="c", path=str(text)), tokenizer())
    model = load_model(mixture(tmp_path / "model"))
    model.config.num_experts_per_tok = top_k
    torch.manual_seed(0)
    ids = torch.from_numpy(stream.tokens(0, len(stream) - 1))
    layers, experts = 40, 6
    logits = [torch.randn(len(ids), experts) + 0.2 * torch.arange(experts) for _ in range(layers)]
    counted = TokenExperts(model.config, [stream])
    counted.update(ids, type("Output", (), {"router_logits": logits}))
    load = [layer.softmax(-1).sum(dim=0).tolist() for layer in logits]
    routing = {"feed_forward": {"c": [type("Routing", (), {"load": shares}) for shares in load]}}
    found = counted.layers(routing, tokenizer())["feed_forward"]  # type: ignore[arg-type]
    measured = np.mean([layer.token_information for layer in found])
    expected = np.mean([layer.chance_information for layer in found])
    assert measured == pytest.approx(expected, rel=0.15)
    assert expected > 1e-4


def test_an_expert_that_is_never_chosen_has_no_tokens(tmp_path: Path, data: dict[str, Path]) -> None:
    model = load_model(mixture(tmp_path / "model", num_experts_per_tok=1))
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.zeros_(parameter)  # the first expert wins every tie
    result = evaluate(model, data, tokenizer=tokenizer(), sequence_length=LENGTH, specialization=True)
    assert result.specialization is not None
    for layer in result.specialization["feed_forward"]:
        assert layer.tokens == [[], [], []]  # nor has the first one a preference
        assert layer.token_information == pytest.approx(0, abs=1e-12)
        assert layer.domain_information == 0
        assert layer.chance_information == pytest.approx(0, abs=1e-12)


def test_part_of_a_character_is_named_as_in_the_vocabulary(tmp_path: Path) -> None:
    text = tmp_path / "c.txt"
    text.write_text("€" * 40)
    result = evaluate(mixture(tmp_path / "model", initializer_range=0.5), {"c": text}, specialization=True)
    assert result.specialization is not None
    names = {
        token.text for layer in result.specialization["feed_forward"] for expert in layer.tokens for token in expert
    }
    assert names
    assert "\ufffd" not in "".join(names)


def test_a_dense_model_has_none(tmp_path: Path, data: dict[str, Path]) -> None:
    result = evaluate(dense(tmp_path / "dense"), data, specialization=True)
    assert result.specialization is None
    assert "specialization" not in result.to_dict()
