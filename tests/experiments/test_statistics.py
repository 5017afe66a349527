"""Intervals against scipy's own tests, and their coverage on data whose answer is known."""

import numpy as np
import pytest
from scipy import stats

from bamoe.experiments.statistics import interval_over_seeds, interval_over_text


def test_over_seeds_is_the_paired_t_interval():
    own, other = [2.31, 2.36, 2.29], [2.40, 2.41, 2.37]
    found = interval_over_seeds([a - b for a, b in zip(own, other, strict=True)])
    expected = stats.ttest_rel(own, other).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(np.mean(own) - np.mean(other))
    assert found.count == 3
    assert interval_over_seeds([0.1]) is None


def test_over_text_with_equal_blocks_is_the_normal_interval_of_paired_means():
    generator = np.random.default_rng(0)
    own, other = generator.normal(size=(2, 50))
    found = interval_over_text({"a": own}, {"a": other}, {"a": [10] * 50})
    difference = (own - other) / 10
    half = stats.norm.ppf(0.975) * difference.std(ddof=1) / np.sqrt(50)
    assert (found.mean, found.high - found.mean) == pytest.approx((difference.mean(), half))


def test_over_text_averages_domains_whatever_their_length():
    found = interval_over_text(
        {"a": [10.0, 30.0], "b": [8.0] * 9}, {"a": [20.0, 20.0], "b": [7.0] * 9}, {"a": [10, 10], "b": [5] * 9}
    )
    assert found.mean == pytest.approx((0 + 1 / 5) / 2)
    assert found.count == 11


def test_over_text_covers_the_truth_about_as_often_as_it_says():
    generator, covered = np.random.default_rng(1), 0
    for _ in range(400):
        tokens = {"a": generator.integers(5, 20, 60), "b": np.full(40, 12)}
        other = {name: generator.normal(3.0, 1.0, len(length)) * length for name, length in tokens.items()}
        # The true difference is -0.1 nats per token in both domains.
        own = {
            name: other[name] + (generator.normal(-0.1, 0.3, len(length))) * length for name, length in tokens.items()
        }
        found = interval_over_text(own, other, tokens)
        covered += found.low <= -0.1 <= found.high
    assert 0.9 <= covered / 400 <= 0.98


def test_one_block_gives_no_certainty():
    assert interval_over_text({"a": [1.0]}, {"a": [2.0]}, {"a": [4]}) is None
    many = [1.0, 2.0, 4.0]
    assert interval_over_text({"a": many, "b": [1.0]}, {"a": many, "b": [2.0]}, {"a": [4] * 3, "b": [4]}) is None
