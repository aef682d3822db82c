"""Confidence intervals, significance tests and sample sizes. A sample has one score per averaged run."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, sem, t, ttest_ind_from_stats

from src.core.errors import format_metric
from src.sweeps.runs import RunGroup

LEVEL = 0.05  # probability that a group as good as the best is called worse
POWER = 0.8  # probability that `required_seeds` seeds find a difference


def confidence_interval(sample: Sequence[float]) -> tuple[float, float]:
    """Return Student's t interval, which covers the true mean in 95 of 100 sweeps. Needs two scores or more."""
    return t.interval(1 - LEVEL, len(sample) - 1, np.mean(sample), sem(sample))


def corrected_p_values(samples: Sequence[Sequence[float]]) -> list[float]:
    """Return, for each sample but the first, the p-value that its mean equals that of the first.

    Welch's t-test. Bonferroni's correction is for all pairs, though only those with the first are tested: the first was
    chosen for being the best, which biases its mean.
    """
    moments = np.array([(np.mean(sample), np.std(sample, ddof=1), len(sample)) for sample in samples])
    with np.errstate(divide="ignore", invalid="ignore"):  # samples without variance
        p = ttest_ind_from_stats(*moments[0], *moments[1:].T, equal_var=False).pvalue
    return np.nan_to_num(p * math.comb(len(samples), 2), nan=1.0).clip(max=1).tolist()


def required_seeds(first: Sequence[float], second: Sequence[float], groups: int) -> float:
    """Return how many seeds per group find a difference of this size with probability POWER; infinity if there is none.

    Normal approximation with Guenther's correction for the t-test (1981), and Bonferroni's for all pairs of `groups`.
    """
    variance, difference = np.var(first, ddof=1) + np.var(second, ddof=1), np.mean(first) - np.mean(second)
    z = norm.isf(LEVEL / 2 / math.comb(groups, 2))
    if not difference:
        return math.inf
    return math.ceil(variance * ((z + norm.ppf(POWER)) / difference) ** 2 + z**2 / 4)


def format_interval(group: RunGroup, metric: str) -> str:
    """Return the confidence interval of the mean; an empty string for fewer than two finite scores."""
    if math.isnan(group.std(metric)):
        return ""
    limits = confidence_interval(group.scores(metric))
    if metric.endswith("acc"):  # the interval of two seeds may be wider
        limits = max(limits[0], 0.0), min(limits[1], 1.0)
    return " to ".join(format_metric(metric, limit, digits=4) for limit in limits)


def compare_with_best(groups: Sequence[RunGroup], metric: str) -> list[str]:
    """Return for each group, best first, whether it is worse than the best; an empty list if none can be tested."""
    ranks = [rank for rank, group in enumerate(groups) if not math.isnan(group.std(metric))]
    if len(ranks) < 2 or ranks[0] > 0:
        return []
    best, *others = samples = [groups[rank].scores(metric) for rank in ranks]
    verdicts = ["best"] + [""] * (len(groups) - 1)
    for rank, sample, p in zip(ranks[1:], others, corrected_p_values(samples), strict=True):
        verdicts[rank] = "worse" if p <= LEVEL else f"tied (n = {required_seeds(best, sample, len(samples)):,})"
    return verdicts
