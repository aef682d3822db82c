"""Write the equations as text, for the worked step and the workbook; a test compares them with network.py."""

import re
from collections.abc import Collection, Mapping, Sequence

from src.backprop.network import Activations, Weights, hidden_deltas, hidden_errors, output_deltas

MILESTONES = 1, 10, 50, 100  # the losses that tables list, counted from 1

# In the order of the computation, with biases; σ is the sigmoid.
FORWARD = {
    **{"h1": "w1·i1 + w2·i2 + b1", "a_h1": "σ(h1)", "h2": "w3·i1 + w4·i2 + b1", "a_h2": "σ(h2)"},
    **{"o1": "w5·a_h1 + w6·a_h2 + b2", "a_o1": "σ(o1)", "o2": "w7·a_h1 + w8·a_h2 + b2", "a_o2": "σ(o2)"},
    **{"E1": "½·(t1 − a_o1)²", "E2": "½·(t2 − a_o2)²", "E_total": "E1 + E2"},
}
# Between E and the weights; these values have no column in the workbook. δ is ∂E/∂ of a neuron's weighted sum.
INTERMEDIATE = {
    "dE_do1": "(a_o1 − t1)·a_o1·(1 − a_o1)",
    "dE_do2": "(a_o2 − t2)·a_o2·(1 − a_o2)",
    "dE_da_h1": "δ_o1·w5 + δ_o2·w7",
    "dE_da_h2": "δ_o1·w6 + δ_o2·w8",
    "dE_dh1": "∂E/∂a_h1·a_h1·(1 − a_h1)",
    "dE_dh2": "∂E/∂a_h2·a_h2·(1 − a_h2)",
}
# The bug of the published spreadsheet.
SPREADSHEET = INTERMEDIATE | {"dE_dh2": "∂E/∂a_h2·a_h1·(1 − a_h1)"}
# w1 to w4 lead from i1 and i2 to h1 and h2, w5 to w8 from h1 and h2 to o1 and o2.
EQUATIONS = {f"dE_dw{2 * h + i - 2}": f"δ_h{h}·i{i}" for h in (1, 2) for i in (1, 2)}
EQUATIONS |= {f"dE_dw{2 * o + h + 2}": f"δ_o{o}·a_h{h}" for o in (1, 2) for h in (1, 2)}
EQUATIONS |= {"dE_db1": "δ_h1 + δ_h2", "dE_db2": "δ_o1 + δ_o2"}
UPDATE = {name: f"{name} − η·∂E/∂{name}" for name in Weights._fields}

NAME = re.compile(r"∂E/∂\w+|δ_\w+|[a-zE]\w*|η")


def list_forward(columns: Collection[str]) -> dict[str, str]:
    """Return FORWARD for a network with these columns, that is, with or without biases."""
    return {name: formula if "b1" in columns else re.sub(r" \+ b\d", "", formula) for name, formula in FORWARD.items()}


def format_name(column: str) -> str:
    """Return ∂E/∂w1 for the column dE_dw1, δ_h1 for dE_dh1, and other names unchanged."""
    return re.sub(r"^dE_d(?=[ho]\d)", "δ_", column).replace("dE_d", "∂E/∂")


def expand_formula(formula: str, intermediate: dict[str, str] = INTERMEDIATE) -> str:
    """Replace the intermediate values by their formulas, so that only columns of the workbook remain."""
    for name, definition in reversed(intermediate.items()):  # the later definitions contain the earlier names
        formula = formula.replace(format_name(name), f"({definition})")
    return formula


def format_worked_step(row: dict[str, float], gradients: str) -> str:
    """Write one step as Markdown tables, from COLUMNS and η in `row`; `gradients` is a key of GRADIENTS."""
    a = Activations(*(row[name] for name in Activations._fields))
    deltas = output_deltas(a, (row["t1"], row["t2"]))
    errors = hidden_errors(Weights(*(row[name] for name in Weights._fields if name in row)), *deltas)
    has_bug = gradients == "spreadsheet"
    values = row | dict(zip(INTERMEDIATE, (*deltas, *errors, *hidden_deltas(a, *errors, has_bug)), strict=True))
    numbers = {format_name(name): value for name, value in values.items()}
    updated = {name: row[name] - row["η"] * row[f"dE_d{name}"] for name in UPDATE if f"dE_d{name}" in row}

    def insert_number(name: re.Match[str]) -> str:
        text = f"{numbers[name.group()]:.6g}"
        return f"({text})" if text.startswith("-") else text

    def make_table(formulas: dict[str, str], values: dict[str, float], suffix: str = "") -> str:
        lines = [
            f"| {format_name(name)}{suffix} | {formula} | {NAME.sub(insert_number, formula)} | {values[name]:.10g} |"
            for name, formula in formulas.items()
            if name in values
        ]
        return "\n".join(["| | formula | with its numbers | value |", "|---|---|---|---|", *lines])

    backward = (SPREADSHEET if has_bug else INTERMEDIATE) | EQUATIONS
    rounding = "The values come from unrounded numbers; the numbers themselves are rounded to 6 digits."
    parts = [f"η = {row['η']:g}. {rounding}", "**Forward**", make_table(list_forward(row), values)]
    parts += [f"**Backward** ({gradients})", make_table(backward, values)]
    return "\n\n".join([*parts, "**Update**", make_table(UPDATE, updated, suffix=" next")]) + "\n"


def format_milestones(losses: Mapping[str, Sequence[float]]) -> str:
    """Write the losses at MILESTONES as a Markdown table, one line per learning rate."""
    lines = [["η", *(f"loss {number}" for number in MILESTONES)], ["---:"] * (1 + len(MILESTONES))]
    for name, values in losses.items():
        lines.append([name, *(f"{values[n - 1]:.8e}" if n <= len(values) else "" for n in MILESTONES)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
