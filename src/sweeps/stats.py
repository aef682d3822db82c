"""Confidence intervals, corrected p-values and sample sizes. A sample has one score per averaged run."""

import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.05  # probability that a group as good as the best is called worse
POWER = 0.8  # probability that `required_seeds` seeds find a difference


def confidence_interval(sample: Sequence[float]) -> tuple[float, float]:
    """Return Student's t interval, which covers the true mean in 95 of 100 sweeps. Needs two scores or more."""
    from scipy.stats import sem, t  # imported when needed: it takes a second

    half_width = t.ppf(1 - LEVEL / 2, len(sample) - 1) * sem(sample)
    return float(np.mean(sample) - half_width), float(np.mean(sample) + half_width)


def corrected_p_values(samples: Sequence[Sequence[float]]) -> list[float]:
    """Return, for each sample but the first, the p-value that its mean equals that of the first.

    Welch's t-test. Bonferroni's correction is for all pairs, though only those with the first are tested: the first was
    chosen for being the best, which biases its mean.
    """
    from scipy.stats import ttest_ind_from_stats

    moments = np.array([(np.mean(sample), np.std(sample, ddof=1), len(sample)) for sample in samples])
    with np.errstate(divide="ignore", invalid="ignore"):  # samples without variance
        p = ttest_ind_from_stats(*moments[0], *moments[1:].T, equal_var=False).pvalue
    return np.nan_to_num(p * math.comb(len(samples), 2), nan=1.0).clip(max=1).tolist()


def required_seeds(first: Sequence[float], second: Sequence[float], groups: int) -> float:
    """Return how many seeds per group find a difference of this size with probability POWER; infinity if there is none.

    Normal approximation with Guenther's correction for the t-test (1981), and Bonferroni's for all pairs of `groups`.
    """
    from scipy.stats import norm

    variance, difference = np.var(first, ddof=1) + np.var(second, ddof=1), np.mean(first) - np.mean(second)
    z = norm.isf(LEVEL / 2 / math.comb(groups, 2))
    if not difference:
        return math.inf
    return math.ceil(variance * ((z + norm.ppf(POWER)) / difference) ** 2 + z**2 / 4)
