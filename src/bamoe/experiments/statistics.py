"""Differences between models, with intervals: paired over random seeds, and paired over the same text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from bamoe.reports.record import Interval

CONFIDENCE = 0.95


def interval_over_seeds(differences: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean of one paired difference per random seed; None for fewer than two seeds.

    It speaks of other random seeds on the same text. With three seeds the factor is 4.3 standard errors.
    """
    if len(differences) < 2:
        return None
    from scipy.stats import t

    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    return Interval(mean, mean - half, mean + half, len(differences))


def interval_over_text(
    nats: Mapping[str, Sequence[float]], other_nats: Mapping[str, Sequence[float]], tokens: Mapping[str, Sequence[int]]
) -> Interval | None:
    """Normal interval of the difference in log perplexity per token, the mean over the domains.

    None where a domain has one block only, which says nothing of how blocks vary.

    It speaks of other text of the same domains under the same trained models. A domain's difference is a ratio of sums
    over its blocks (nats over tokens), with the ratio estimator's variance; blocks are taken as independent, which
    neighbours in a document are not quite.

    Args:
        nats, other_nats: per domain, the negative log-likelihood of every block under the two models.
        tokens: scored tokens of every block.
    """
    means, variances, count = [], [], 0
    for domain, lengths in tokens.items():
        differences = np.asarray(nats[domain]) - np.asarray(other_nats[domain])
        weights = np.asarray(lengths, dtype=float)
        blocks, mean = len(weights), differences.sum() / weights.sum()
        if blocks < 2:
            return None
        residuals = differences - mean * weights
        means.append(mean)
        variances.append(blocks * residuals.var(ddof=1) / weights.sum() ** 2)
        count += blocks
    mean = float(np.mean(means))
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(sum(variances)) / len(means)
    return Interval(mean, mean - half, mean + half, count)
