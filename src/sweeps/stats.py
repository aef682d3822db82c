"""Confidence intervals, corrected p-values and sample sizes. A sample has one score per averaged run."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

LEVEL = 0.05  # probability that a setting as good as the best is called worse
POWER = 0.8  # probability that `required_seeds` seeds find a difference
MAX_SEEDS = 1000


def confidence_interval(sample: Sequence[float]) -> tuple[float, float]:
    """Return Student's t interval, which covers the true mean in 95 of 100 sweeps. Needs two scores or more."""
    from scipy.stats import t  # imported when needed: it takes a second

    half_width = t.ppf(1 - LEVEL / 2, len(sample) - 1) * np.std(sample, ddof=1) / len(sample) ** 0.5
    return float(np.mean(sample) - half_width), float(np.mean(sample) + half_width)


def corrected_p_values(samples: Sequence[Sequence[float]]) -> list[float]:
    """Return, for each sample but the first, the p-value that its mean equals that of the first.

    Welch's t-test with Holm's correction (1979) over all pairs, not only those with the first, which looks better than
    it is because it was chosen for being best.
    """
    from scipy.stats import ttest_ind_from_stats

    moments = np.array([(np.mean(sample), np.std(sample, ddof=1), len(sample)) for sample in samples])
    first, second = np.array(list(combinations(range(len(samples)), 2))).T
    with np.errstate(divide="ignore", invalid="ignore"):  # samples without variance
        p = ttest_ind_from_stats(*moments[first].T, *moments[second].T, equal_var=False).pvalue
    p = np.nan_to_num(p, nan=1.0)
    order = p.argsort()
    p[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return p[: len(samples) - 1].tolist()


def required_seeds(first: Sequence[float], second: Sequence[float], settings: int) -> int | None:
    """Return how many seeds per setting find a difference of this size with probability POWER; None above MAX_SEEDS.

    Noncentral t distribution with Bonferroni's correction for `settings` settings, which is Holm's first step.
    """
    from scipy.stats import nct, t

    variances = np.array([np.var(first, ddof=1), np.var(second, ddof=1)])
    seeds = np.arange(2, MAX_SEEDS + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = abs(np.mean(first) - np.mean(second)) / np.sqrt(variances.sum() / seeds)
        freedom = (seeds - 1) * variances.sum() ** 2 / (variances**2).sum()
        limit = t.isf(LEVEL / (settings * (settings - 1)), freedom)
        enough = seeds[nct.sf(limit, freedom, shift) >= POWER]
    return int(enough[0]) if len(enough) else None
