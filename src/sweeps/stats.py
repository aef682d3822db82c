"""Confidence intervals and significance tests. A sample has one score per averaged run."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import sem, t, ttest_ind_from_stats

from src.core.errors import format_metric
from src.sweeps.runs import RunGroup

LEVEL = 0.05  # probability that a group as good as the best is called worse


def corrected_p_values(samples: Sequence[Sequence[float]]) -> list[float]:
    """Return, for each sample but the first, the p-value that its mean equals that of the first.

    Welch's t-test. Bonferroni's correction is for all pairs, though only those with the first are tested: the first was
    chosen for being the best, which biases its mean.
    """
    moments = np.array([(np.mean(sample), np.std(sample, ddof=1), len(sample)) for sample in samples])
    with np.errstate(divide="ignore", invalid="ignore"):  # samples without variance
        p = ttest_ind_from_stats(*moments[0], *moments[1:].T, equal_var=False).pvalue
    return np.nan_to_num(p * math.comb(len(samples), 2), nan=1.0).clip(max=1).tolist()


def format_interval(group: RunGroup, metric: str) -> str:
    """Return half the width of Student's t interval of the mean; an empty string for fewer than two finite scores."""
    if math.isnan(group.std(metric)):
        return ""
    scores = group.scores(metric)
    return f"± {format_metric(metric, sem(scores) * t.isf(LEVEL / 2, len(scores) - 1), digits=2)}"


def compare_with_best(groups: Sequence[RunGroup], metric: str) -> list[str]:
    """Return for each group, best first, whether it is worse than the best; an empty list if none can be tested."""
    ranks = [rank for rank, group in enumerate(groups) if not math.isnan(group.std(metric))]
    if len(ranks) < 2 or ranks[0] > 0:
        return []
    verdicts = ["best"] + [""] * (len(groups) - 1)
    p_values = corrected_p_values([groups[rank].scores(metric) for rank in ranks])
    for rank, p in zip(ranks[1:], p_values, strict=True):
        verdicts[rank] = "worse" if p <= LEVEL else "tied"
    return verdicts
