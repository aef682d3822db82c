"""What a sweep of the backprop experiment leaves in its folder: the learning rates side by side."""

import csv
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

MILESTONES = 1, 10, 50, 100
LESSON_RATE = 0.5


class SweepReport(Callback):
    """After a multirun: losses.csv, losses.md, the plots and backprop.xlsx, from the traces of its runs."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        write_report(Path(config.hydra.sweep.dir))


def write_report(folder: Path) -> None:
    """`folder` holds the run folders of one sweep. Runs that left no trace.csv are left out."""
    # Here, because Hydra imports this file before it has read the command line to its end.
    import numpy as np
    from rich import print
    from rich.markdown import Markdown

    from src.backprop import plots, workbook

    runs = []
    for trace in folder.glob("*/trace.csv"):
        config = OmegaConf.load(trace.parent / ".hydra/config.yaml")
        rows = np.atleast_1d(np.genfromtxt(trace, delimiter=",", names=True))
        runs.append((config.optimizer.lr, trace.parent.name, config.task.gradients, rows))
    if not runs:
        return
    runs.sort(key=lambda run: run[:2])
    only_lr_differs = len({lr for lr, *_ in runs}) == len(runs)
    losses = {str(lr) if only_lr_differs else name: rows["E_total"].tolist() for lr, name, _, rows in runs}

    with (folder / "losses.csv").open("w", newline="") as file:
        steps = enumerate(zip_longest(*losses.values()), start=1)
        csv.writer(file, lineterminator="\n").writerows(
            [["step", *losses], *([step, *values] for step, values in steps)]
        )
    table = milestone_table(losses)
    (folder / "losses.md").write_text(table)
    # Not losses.png: the report of every sweep has one.
    plots.save(plots.all_losses(losses), folder / "losses_by_lr.png")
    for name, values in losses.items():
        plots.save(plots.one_loss(name, values), folder / f"loss_{'lr=' if only_lr_differs else ''}{name}.png")
    # The sheet starts where docs/backprop.md does, if that was among the runs.
    lr, _, gradients, rows = next((run for run in runs if run[0] == LESSON_RATE), runs[0])
    workbook.write(folder / "backprop.xlsx", rows, lr, gradients, losses)
    print(Markdown(table))
    print(f"report in {folder}")


def milestone_table(losses: dict[str, list[float]]) -> str:
    """The losses at MILESTONES as a Markdown table, one line a learning rate."""
    heads = ["η", *(f"loss {number}" for number in MILESTONES)]
    lines = [
        [name, *(f"{values[number - 1]:.8e}" if number <= len(values) else "" for number in MILESTONES)]
        for name, values in losses.items()
    ]
    rule = ["---:"] * len(heads)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, rule, *lines])
