"""Print the scores of docs/seeds.csv as the table rows of docs/results.md: python -m docs.seeds."""

import csv
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import sem, t


def make_rows() -> list[str]:
    """Return the header, then one row per recipe, variant and machine; "–" stands for what was not kept."""
    rows = ["| Recipe | Machine | Seeds | Test accuracy | Lowest | Highest | 95% CI of the mean |"]
    with Path(__file__).with_name("seeds.csv").open(encoding="utf-8", newline="") as file:
        for key, group in groupby(csv.DictReader(file), itemgetter("recipe", "variant", "machine")):
            first, *others = group  # a line per seed, or one line for all
            seeds, sd, lowest, highest, interval = *itemgetter("n", "sd", "lowest", "highest")(first), ""
            scores = [float(line["value"]) for line in (first, *others)]
            if others:
                seeds, sd = len(scores), f"{stdev(scores):.2f}"
                lowest, highest = f"{min(scores):.2f}", f"{max(scores):.2f}"
                interval = "{:.2f} to {:.2f}%".format(*t.interval(0.95, seeds - 1, mean(scores), sem(scores)))
            name = ", ".join(filter(None, (f"`{key[0]}`", key[1])))
            accuracy = f"{mean(scores):.2f}" + (f" ± {sd}%" if sd else "%")
            limits = [f"{limit}%" if limit else "–" for limit in (lowest, highest)]
            rows.append(f"| {' | '.join([name, key[2], str(seeds), accuracy, *limits, interval or '–'])} |")
    return rows


if __name__ == "__main__":
    print(*make_rows(), sep="\n")
