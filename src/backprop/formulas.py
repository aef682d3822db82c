"""Write the equations of network.py as text, for the worked step and the workbook."""

import inspect
import re
from collections.abc import Collection, Mapping, Sequence

from src.backprop.network import NAMES, equations, forward

MILESTONES = 1, 10, 50, 100  # the losses that the table lists, counted from 1
SIGNS = {"v.": "", "0.5 * ": "½·", " * ": "·", " - ": " − ", " ** 2": "²", "sigmoid": "σ"}
NAME = re.compile(r"∂E/∂\w+|δ_\w+|[a-zE]\w*|η")


def format_names(text: str) -> str:
    """Replace dE_dw1 by ∂E/∂w1, and dE_dh1 by δ_h1."""
    return re.sub(r"dE_d(?=[ho]\d)", "δ_", text).replace("dE_d", "∂E/∂")


def list_formulas(function: object, names: Collection[str]) -> dict[str, str]:
    """Return the assignments of forward() or equations() as text, without biases that are not among `names`."""
    code = inspect.getsource(function)  # type: ignore[arg-type]
    for syntax, sign in SIGNS.items():
        code = code.replace(syntax, sign)
    if "b1" not in names:
        code = re.sub(r" \+ b\d", "", code)
    return dict(re.findall(r"^ +(\S+) = (.+)$", format_names(code), re.MULTILINE))


def format_worked_step(row: Mapping[str, float]) -> str:
    """Write one step as Markdown tables."""
    learned = [name for name in NAMES if f"dE_d{name}" in row]
    numbers = {format_names(name): number for name, number in row.items()}
    numbers |= {f"{name} next": row[name] - row["η"] * row[f"dE_d{name}"] for name in learned}

    def insert_number(name: re.Match[str]) -> str:
        text = f"{numbers[name.group()]:.6g}"
        return f"({text})" if text.startswith("-") else text

    text = f"η = {row['η']:g}. The values come from unrounded numbers; the numbers in the formulas have 6 digits.\n"
    update = {f"{name} next": f"{name} − η·∂E/∂{name}" for name in learned}
    tables = {"Forward": list_formulas(forward, row), "Backward": list_formulas(equations, row), "Update": update}
    for title, formulas in tables.items():
        text += f"\n**{title}**\n\n| | formula | with its numbers | value |\n|---|---|---|---|\n"
        for name, formula in formulas.items():
            if name in numbers:
                formula = re.sub("(.+) if bug else (.+)", r"\1" if row["bug"] else r"\2", formula)
                text += f"| {name} | {formula} | {NAME.sub(insert_number, formula)} | {numbers[name]:.10g} |\n"
    return text


def format_milestones(losses: Mapping[str, Sequence[float]]) -> str:
    """Write the losses at MILESTONES as a Markdown table, one line per run."""
    lines = [["η", *(f"loss {number}" for number in MILESTONES)], ["---:"] * (1 + len(MILESTONES))]
    for name, values in losses.items():
        lines.append([name, *(f"{values[n - 1]:.8e}" if n <= len(values) else "" for n in MILESTONES)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
