"""The numbers and pictures of docs/backprop.md."""

import sys
from pathlib import Path

import rich
import torch
from rich.markdown import Markdown

from src.backprop import plots
from src.backprop.formulas import worked_step
from src.backprop.network import BackpropNet, GradientFunction, equations, forward, make_row, spreadsheet
from src.backprop.report import milestone_table
from src.backprop.stability import SAMPLE, descend, past_two

RATES = 0.1, 0.2, 0.5, 0.8, 1.0, 2.0


def first_row() -> dict[str, float]:
    """The first line of the worked sheet."""
    net = BackpropNet()
    values = net()
    return make_row(net.weights, values, equations(net.weights, values, *SAMPLE), *SAMPLE)


def losses(gradients: GradientFunction) -> dict[str, list[float]]:
    curves, _ = descend(torch.tensor(RATES, dtype=torch.float64), 100, gradients)
    return {str(rate): curve.tolist() for rate, curve in zip(RATES, curves, strict=True)}


def draw_lesson(folder: Path) -> None:
    """Draws the pictures into `folder` and prints the numbers."""
    right, slipped, study = losses(equations), losses(spreadsheet), past_two()
    shown = {number: study.losses[:, number - 1].tolist() for number in (2, 10, 100, 1000)}
    pictures = {
        "network": plots.network(),
        "path": plots.network(plots.PATH_OF_W1, path=True),
        "losses": plots.all_losses(right),
        "slip": plots.slip(right, slipped),
        "past_two": plots.past_two(study.rates.tolist(), shown, study.limit),
    }
    for name, figure in pictures.items():
        plots.save(figure, folder / f"backprop_{name}.png")

    for text in worked_step(first_row(), 0.5, "equations"), milestone_table(right):
        rich.print(Markdown(text)) if sys.stdout.isatty() else print(text)
    w = BackpropNet().weights
    slipped_w3 = spreadsheet(w, forward(w, *SAMPLE), *SAMPLE).w3.item()
    moved = max(abs(a - b) for rate in right for a, b in zip(right[rate], slipped[rate], strict=True))
    tenth = study.losses[:, 9]
    print(f"With the slip the first ∂E/∂w3 is {slipped_w3:.10f}, and no loss moves by more than {moved:.1e}.")
    print(f"The 10th loss is smallest at η = {study.rates[tenth.argmin()].item():.1f}: {tenth.min().item():g}.")
    print(f"The loss rises from η = {study.first_rise:.1f} on, and is stuck from η = {study.stuck:.0f} on.")
    print(f"2/λ is {study.limit:.1f} at the minimum of small steps, {study.flatter:.0f} at that of η = 500.")
