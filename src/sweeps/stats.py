"""What the seeds of a sweep allow to say: intervals of means, which settings differ, how many seeds would tell."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

LEVEL = 0.05  # the share of sweeps over equally good settings in which one is called different from the best
POWER = 0.8  # the share of sweeps in which `seeds_needed` seeds find a difference
MOST = 1000  # seeds

Sample = Sequence[float]  # a setting's scores, one a seed


def confidence_interval(sample: Sample) -> tuple[float, float]:
    """Of the mean, with Student's t: it covers the true one in 95 of 100 sweeps. NaN for fewer than two scores."""
    from scipy.stats import t  # here and below: a second that only sweeps over seeds should wait

    half = t.ppf(1 - LEVEL / 2, len(sample) - 1) * np.std(sample, ddof=1) / len(sample) ** 0.5
    return float(np.mean(sample) - half), float(np.mean(sample) + half)


def corrected_p_values(samples: Sequence[Sample]) -> list[float]:
    """For each sample but the first, the p-value of the hypothesis that its mean is that of the first.

    Welch's t-test with Holm's correction (1979) for all pairs, not just for those with the first: it was chosen for
    being best, which makes it look better than it is. Each sample has two scores or more.
    """
    from scipy.stats import ttest_ind_from_stats

    facts = np.array([(np.mean(sample), np.std(sample, ddof=1), len(sample)) for sample in samples])
    one, other = np.array(list(combinations(range(len(samples)), 2))).T
    with np.errstate(divide="ignore", invalid="ignore"):  # samples without any spread
        found = ttest_ind_from_stats(*facts[one].T, *facts[other].T, equal_var=False).pvalue
    p = np.nan_to_num(found, nan=1.0)
    order = p.argsort()
    p[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return p[one == 0].tolist()


def required_seeds(one: Sample, other: Sample, settings: int) -> int | None:
    """How many a setting find a difference of this size, as `differences` does, with `POWER`; None for too many.

    By the noncentral t distribution, with Bonferroni's correction, which Holm's first step is.
    """
    from scipy.stats import nct, t

    squares = np.array([np.var(one, ddof=1), np.var(other, ddof=1)])
    seeds = np.arange(2, MOST + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = abs(np.mean(one) - np.mean(other)) / np.sqrt(squares.sum() / seeds)
        freedom = (seeds - 1) * squares.sum() ** 2 / (squares**2).sum()
        limit = t.isf(LEVEL / (settings * (settings - 1)), freedom)
        enough = seeds[nct.sf(limit, freedom, shift) >= POWER]
    return int(enough[0]) if len(enough) else None
