"""Measure how large a step may be, and make the plots and numbers of docs/backprop.md."""

import sys
from pathlib import Path
from typing import NamedTuple

import rich
import torch
from rich.markdown import Markdown
from torch import Tensor

from src.backprop import plots
from src.backprop.formulas import format_milestones, format_worked_step
from src.backprop.network import INPUTS, TARGETS, WEIGHTS, GradientFunction, Weights
from src.backprop.network import equations, forward, make_row, spreadsheet

RATES = 0.1, 0.2, 0.5, 0.8, 1.0, 2.0
SAMPLE = torch.tensor(INPUTS, dtype=torch.float64), torch.tensor(TARGETS, dtype=torch.float64)
START = Weights(*torch.tensor(WEIGHTS, dtype=torch.float64))


def descend(lr: Tensor, steps: int, gradients: GradientFunction = equations) -> tuple[Tensor, Tensor]:
    """Train with every rate in `lr` at once; return the losses, [len(lr), steps], and final weights, [len(lr), 8]."""

    def train(rate: Tensor) -> tuple[Tensor, Tensor]:
        w, losses = START, []
        for _ in range(steps):
            activations = forward(w, *SAMPLE)
            losses.append(activations.E_total)
            slopes = gradients(w, activations, *SAMPLE)
            w = Weights(*(weight - rate * slope for weight, slope in zip(w, slopes, strict=True)))
        return torch.stack(losses), torch.stack(w)

    return torch.func.vmap(train)(lr)


class StabilityStudy(NamedTuple):
    """Hold the losses of many learning rates, and the rates at which the behaviour changes."""

    rates: Tensor  # shape [n]
    losses: Tensor  # shape [n, 1000]
    limit: float  # 2/λ at the minimum that η = 1 reaches
    first_rise: float  # the smallest rate whose loss rises at some step
    stuck: float  # the smallest rate above `limit` whose last loss is above 0.1
    flatter: float  # 2/λ at the minimum that η = 500 reaches


def compute_step_limit(weights: Tensor) -> float:
    """Return 2/λ, where λ is the largest eigenvalue of the Hessian of E_total at `weights`, shape (8,).

    Gradient descent converges to a minimum there only if η is below 2/λ.
    """
    hessian = torch.autograd.functional.hessian(lambda w: forward(Weights(*w), *SAMPLE).E_total, weights)
    return 2 / torch.linalg.eigvalsh(hessian)[-1].item()


def past_two() -> StabilityStudy:
    """Train with 1,201 learning rates from 0.01 to 10,000 for 1,000 steps."""
    rates = torch.logspace(-2, 4, 1201, dtype=torch.float64)
    losses, _ = descend(rates, 1000)
    _, (small, large) = descend(torch.tensor([1.0, 500.0], dtype=torch.float64), 1000)
    limit = compute_step_limit(small)
    rises = (losses.diff() > 1e-20).any(dim=1)  # rounding alone changes a converged loss by less
    stuck = (losses[:, -1] > 0.1) & (rates > limit)
    flatter = compute_step_limit(large)
    return StabilityStudy(rates, losses, limit, rates[rises].min().item(), rates[stuck].min().item(), flatter)


def compute_first_row() -> dict[str, float]:
    """Return the numbers of the worked example's first step."""
    activations = forward(START, *SAMPLE)
    return make_row(START, activations, equations(START, activations, *SAMPLE), *SAMPLE)


def make_lesson(folder: Path) -> None:
    """Save the plots of docs/backprop.md in `folder` and print the numbers that it quotes."""
    rates = torch.tensor(RATES, dtype=torch.float64)
    tables = [descend(rates, 100, gradients)[0] for gradients in (equations, spreadsheet)]
    right, wrong = (dict(zip(map(str, RATES), table.tolist(), strict=True)) for table in tables)
    study = past_two()
    loss_curves = {f"loss {n}": study.losses[:, n - 1].clamp(min=1e-33).numpy() for n in (2, 10, 100, 1000)}
    labels = {"xlabel": "learning rate η", "ylabel": "E_total (smaller values are plotted at 1e-33)"}
    past_limit = plots.plot_curves(
        loss_curves, study.rates.numpy(), "How large may a step be?", **labels, scales=["log"]
    )
    past_limit.axes[0].set_xscale("log")
    past_limit.axes[0].axvline(study.limit, ls="--", color=plots.ACCENT)
    past_limit.axes[0].text(study.limit, 1e-32, f" 2/λ = {study.limit:.1f}", color=plots.ACCENT)
    differences = {name: [a - b for a, b in zip(wrong[name], right[name], strict=True)] for name in right}
    labels = {"title": "Effect of the bug", "ylabel": "loss with bug − loss without"}
    figures = {
        "network": plots.plot_network(),
        "path": plots.plot_network(plots.PATH_OF_W1, is_path=True),
        "losses": plots.plot_curves(right),
        "bug": plots.plot_curves(differences, **labels, scales=["linear"]),
        "past_two": past_limit,
    }
    for name, figure in figures.items():
        plots.save_figure(figure, folder / f"backprop_{name}.png")

    for text in format_worked_step(compute_first_row(), 0.5, "equations"), format_milestones(right):
        rich.print(Markdown(text)) if sys.stdout.isatty() else print(text)
    wrong_w3 = spreadsheet(START, forward(START, *SAMPLE), *SAMPLE).w3.item()
    tenth = study.losses[:, 9]
    print(f"With the bug, the first ∂E/∂w3 is {wrong_w3:.10f}.")
    print(f"The bug changes no loss by more than {(tables[1] - tables[0]).abs().max().item():.1e}.")
    print(f"The 10th loss is smallest at η = {study.rates[tenth.argmin()].item():.1f}: {tenth.min().item():g}.")
    print(f"The loss rises from η = {study.first_rise:.1f} on, and is stuck from η = {study.stuck:.0f} on.")
    print(f"2/λ is {study.limit:.1f} at the minimum of small steps, {study.flatter:.0f} at that of η = 500.")
