"""Measure how large a step may be, and reproduce the plots and numbers of docs/backprop.md."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from src.backprop.formulas import format_milestones, format_worked_step
from src.backprop.network import INPUTS, NAMES, TARGETS, WEIGHTS, Values, equations, forward
from src.core.plots import label_ends, project_style, save_figure

RATES = 0.1, 0.2, 0.5, 0.8, 1.0, 2.0
SAMPLE = dict(zip(("i1", "i2", "t1", "t2"), torch.tensor(INPUTS + TARGETS, dtype=torch.float64), strict=True))
START = torch.tensor(WEIGHTS, dtype=torch.float64)


def compute_step(weights: Tensor, **settings: Any) -> Values:
    """Return the numbers of one step of the worked example from `weights`, shape (8,)."""
    return equations(forward(Values(**settings, **SAMPLE, **dict(zip(NAMES, weights, strict=False)))))


def descend(lr: Tensor, steps: int, bug: bool = False) -> tuple[Tensor, Tensor]:
    """Train with every rate in `lr` at once; return the losses, [len(lr), steps], and final weights, [len(lr), 8]."""

    def train(rate: Tensor) -> tuple[Tensor, Tensor]:
        weights, losses = START, []
        for _ in range(steps):
            v = compute_step(weights, bug=bug)
            losses.append(v.E_total)
            weights = weights - rate * torch.stack([getattr(v, f"dE_d{name}") for name in NAMES[:8]])
        return torch.stack(losses), weights

    return torch.func.vmap(train)(lr)


def compute_step_limit(weights: Tensor) -> float:
    """Return 2/λ, where λ is the largest eigenvalue of the Hessian of E_total at `weights`, shape (8,).

    Gradient descent converges to a minimum there only if η is below 2/λ.
    """
    hessian = torch.autograd.functional.hessian(lambda w: compute_step(w).E_total, weights)
    return 2 / torch.linalg.eigvalsh(hessian)[-1].item()


def scan_learning_rates() -> SimpleNamespace:
    """Train with 1,201 learning rates from 0.01 to 10,000 for 1,000 steps.

    Return `rates`; their `losses`, shape [1201, 1000]; `limit` and `flatter`, 2/λ at the minima of η = 1 and η = 500;
    `first_rise`, the smallest rate whose loss rises; `stuck`, the smallest above `limit` that ends above 0.1.
    """
    rates = torch.logspace(-2, 4, 1201, dtype=torch.float64)
    losses, _ = descend(rates, 1000)
    limit, flatter = map(compute_step_limit, descend(torch.tensor([1.0, 500.0], dtype=torch.float64), 1000)[1])
    first_rise = rates[(losses.diff() > 1e-20).any(dim=1)].min().item()  # rounding changes a converged loss by less
    stuck = rates[(losses[:, -1] > 0.1) & (rates > limit)].min().item()
    return SimpleNamespace(rates=rates, losses=losses, limit=limit, flatter=flatter, first_rise=first_rise, stuck=stuck)


@project_style
def plot_curves(
    curves: dict[str, Any], title: str, x: Any = None, scales: Sequence[str] = ("linear", "log"), **labels: str
) -> Figure:
    """Plot one curve per name, in one panel per scale of the y axis; `x` counts from 1 by default."""
    figure = Figure(figsize=(2 + 4.5 * len(scales), 4.5))
    figure.suptitle(title)
    colors = colormaps["viridis"](np.linspace(0, 0.65, len(curves)))
    for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
        for (name, values), color in zip(curves.items(), colors, strict=True):
            axes.plot(range(1, len(values) + 1) if x is None else x, values, label=name, color=color)
        axes.set(**{"xlabel": "loss number", "ylabel": "E_total"} | labels)
        if scale == "log":
            axes.set_yscale("log")
    if x is None:
        label_ends(axes)
    else:  # curves that need not end apart
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def make_lesson(folder: Path) -> None:
    """Save the plots of docs/backprop.md in `folder` and print the numbers that it quotes."""
    rates = torch.tensor(RATES, dtype=torch.float64)
    right, wrong = descend(rates, 100)[0], descend(rates, 100, bug=True)[0]
    names = [f"η = {rate}" for rate in RATES]
    figure = plot_curves(dict(zip(names, right, strict=True)), "Variation of losses w.r.t. learning rate")
    save_figure(figure, folder / "backprop_losses.png")

    differences = dict(zip(names, 1e10 * (wrong - right), strict=True))
    labels = {"ylabel": "difference of E_total / 10⁻¹⁰"}
    figure = plot_curves(differences, "Loss with the bug − loss without", None, ["linear"], **labels)
    save_figure(figure, folder / "backprop_bug.png")

    study = scan_learning_rates()
    curves = {f"loss {n}": study.losses[:, n - 1].clamp(min=1e-33) for n in (2, 10, 100, 1000)}
    labels = {"xlabel": "learning rate η", "ylabel": "E_total (smaller values are plotted at 10⁻³³)", "xscale": "log"}
    title = f"How large may a step be? The dashed line is 2/λ = {study.limit:.1f}."
    figure = plot_curves(curves, title, study.rates, ["log"], **labels)
    figure.axes[0].axvline(study.limit, ls="--", color="0.4")
    save_figure(figure, folder / "backprop_past_two.png")

    losses = dict(zip(map(str, RATES), right.tolist(), strict=True))
    first = compute_step(START, η=0.5, bug=False)
    print(format_worked_step(first.to_row()), format_milestones(losses), sep="\n")
    tenth = study.losses[:, 9]
    print(f"With the bug, the first ∂E/∂w3 is {compute_step(START, bug=True).dE_dw3.item():.10f}.")
    print(f"The bug changes no loss by more than {(wrong - right).abs().max().item():.1e}.")
    print(f"The 10th loss is smallest at η = {study.rates[tenth.argmin()].item():.1f}: {tenth.min().item():g}.")
    print(f"The loss rises from η = {study.first_rise:.1f} on, and is stuck from η = {study.stuck:.0f} on.")
    print(f"2/λ is {study.limit:.1f} at the minimum of small steps, {study.flatter:.0f} at that of η = 500.")
