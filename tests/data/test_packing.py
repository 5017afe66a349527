"""Packed mixtures: exact proportions, every block of a pass once, a function of the index alone."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamoe.data.corpora import Corpus
from bamoe.data.packing import PackedMixture, blocks_per_corpus
from bamoe.data.tokens import TokenStream, read_tokens
from bamoe.errors import DataError
from tests.training.tiny import corpus, tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStream]:
    folder = tmp_path_factory.mktemp("corpora")
    return [
        read_tokens(Corpus(name=name, path=str(corpus(folder / f"{name}.jsonl", name))), tokenizer())
        for name in ("sea", "code")
    ]


def mixture(streams: list[TokenStream], weights: list[float], blocks: int, seed: int = 0) -> PackedMixture:
    return PackedMixture(streams, weights, LENGTH, blocks, seed)


def blocks_of(stream: TokenStream) -> list[bytes]:
    return [stream.tokens(i, i + LENGTH).tobytes() for i in range(0, len(stream) - LENGTH + 1, LENGTH)]


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    st.integers(0, 500),
)
def test_shares_are_exact_to_less_than_one_block(weights: list[float], blocks: int) -> None:
    counts = blocks_per_corpus(weights, blocks)
    assert sum(counts) == blocks
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - blocks * weight / sum(weights)) < 1


def test_weights_hold_over_the_run_and_on_the_way(streams: list[TokenStream]) -> None:
    packed = mixture(streams, [9.0, 1.0], 200)
    assert packed.blocks() == {"sea": 180, "code": 20}
    sea = set(blocks_of(streams[0]))
    from_sea = [packed[i]["input_ids"].tobytes() in sea for i in range(200)]
    for stop in range(1, 201):
        assert abs(sum(from_sea[:stop]) - 0.9 * stop) <= 1


def test_each_pass_has_every_block_once_in_a_new_order(streams: list[TokenStream]) -> None:
    every = blocks_of(streams[0])
    packed = mixture(streams[:1], [1.0], 2 * len(every))
    seen = [packed[i]["input_ids"].tobytes() for i in range(len(packed))]
    first, second = seen[: len(every)], seen[len(every) :]
    assert sorted(first) == sorted(second) == sorted(every)
    assert first != second
    assert first != every


def test_a_block_depends_on_its_index_and_the_seed_only(streams: list[TokenStream]) -> None:
    packed = mixture(streams, [1.0, 2.0], 120)
    again = mixture(streams, [1.0, 2.0], 120)
    backwards = [again[i]["input_ids"] for i in reversed(range(120))][::-1]
    for i in range(120):
        np.testing.assert_array_equal(packed[i]["input_ids"], backwards[i])
    other = mixture(streams, [1.0, 2.0], 120, seed=1)
    assert any((packed[i]["input_ids"] != other[i]["input_ids"]).any() for i in range(120))


def test_the_order_of_a_corpus_does_not_depend_on_the_others(streams: list[TokenStream]) -> None:
    alone = mixture(streams[1:], [1.0], 20)
    mixed = mixture(streams, [1.0, 1.0], 40)
    from_code = [i for i in range(40) if int(mixed._corpus[i]) == 1]
    for i, j in enumerate(from_code):
        np.testing.assert_array_equal(alone[i]["input_ids"], mixed[j]["input_ids"])


def test_document_mask_gives_positions_that_restart(streams: list[TokenStream]) -> None:
    packed = PackedMixture(streams, [1.0, 1.0], LENGTH, 40, document_mask=True)
    restarts = 0
    for i in range(40):
        ids, positions = packed[i]["input_ids"], packed[i]["position_ids"]
        assert positions[0] == 0
        for j in range(1, LENGTH):
            assert positions[j] == (0 if ids[j - 1] == 0 else positions[j - 1] + 1)
        restarts += int((positions[1:] == 0).sum())
    assert restarts > 0


def test_a_corpus_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("sea")
    short = read_tokens(Corpus(name="short", path=str(tmp_path / "short.txt")), tokenizer())
    with pytest.raises(DataError, match=f"'short' has {len(short)} tokens, less than one block of {LENGTH}"):
        mixture([short], [1.0], 4)


def test_a_corpus_that_would_never_be_seen_is_refused(streams: list[TokenStream]) -> None:
    message = r"'code' gets none of the run's 50 blocks: its weight of 0\.002 is 0\.001 of all"
    with pytest.raises(DataError, match=message):
        mixture(streams, [1.998, 0.002], 50)
    assert mixture(streams, [1.998, 0.002], 1000).blocks() == {"sea": 999, "code": 1}
