"""The worked sheet as formulas: to be read with their numbers, and to be computed by a spreadsheet.

This is the one place where the network is written down a second time; a test holds it against
src.backprop.network.
"""

import re

import torch

from src.backprop.network import Activations, Weights, hidden_errors, output_deltas

# In the order in which they are computed; σ is the sigmoid.
FORWARD = {
    "h1": "w1·i1 + w2·i2",
    "a_h1": "σ(h1)",
    "h2": "w3·i1 + w4·i2",
    "a_h2": "σ(h2)",
    "o1": "w5·a_h1 + w6·a_h2",
    "a_o1": "σ(o1)",
    "o2": "w7·a_h1 + w8·a_h2",
    "a_o2": "σ(o2)",
    "E1": "½·(t1 − a_o1)²",
    "E2": "½·(t2 − a_o2)²",
    "E_total": "E1 + E2",
}
# Between E and the weights; these have no column in the sheet.
ON_THE_WAY = {
    "dE_do1": "(a_o1 − t1)·a_o1·(1 − a_o1)",
    "dE_do2": "(a_o2 − t2)·a_o2·(1 − a_o2)",
    "dE_da_h1": "∂E/∂o1·w5 + ∂E/∂o2·w7",
    "dE_da_h2": "∂E/∂o1·w6 + ∂E/∂o2·w8",
}
EQUATIONS = {
    "dE_dw1": "∂E/∂a_h1·a_h1·(1 − a_h1)·i1",
    "dE_dw2": "∂E/∂a_h1·a_h1·(1 − a_h1)·i2",
    "dE_dw3": "∂E/∂a_h2·a_h2·(1 − a_h2)·i1",
    "dE_dw4": "∂E/∂a_h2·a_h2·(1 − a_h2)·i2",
    "dE_dw5": "∂E/∂o1·a_h1",
    "dE_dw6": "∂E/∂o1·a_h2",
    "dE_dw7": "∂E/∂o2·a_h1",
    "dE_dw8": "∂E/∂o2·a_h2",
}
# The slip of the published spreadsheet: a_h1 where a_h2 belongs.
SPREADSHEET = EQUATIONS | {
    "dE_dw3": "∂E/∂a_h2·a_h1·(1 − a_h1)·i1",
    "dE_dw4": "∂E/∂a_h2·a_h1·(1 − a_h1)·i2",
}
UPDATE = {f"w{n}": f"w{n} − η·∂E/∂w{n}" for n in range(1, 9)}

NAME = re.compile(r"∂E/∂\w+|[a-zE]\w*|η")


def spoken(name: str) -> str:
    """∂E/∂w1 for the column dE_dw1; other names as they are."""
    return name.replace("dE_d", "∂E/∂")


def expanded(formula: str) -> str:
    """`formula` in terms of the sheet's columns alone."""
    for name, meaning in reversed(ON_THE_WAY.items()):  # the later ones contain the earlier
        formula = formula.replace(spoken(name), f"({meaning})")
    return formula


def worked_step(row: dict[str, float], lr: float, gradients: str) -> str:
    """One step of gradient descent as Markdown tables of formula, numbers and value.

    `row` has a value for each column of the sheet, `gradients` is a key of src.backprop.network.GRADIENTS.
    """
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in row.items()}
    deltas = output_deltas(
        Activations(*(tensors[name] for name in Activations._fields)),
        torch.stack([tensors["t1"], tensors["t2"]]),
    )
    hidden = hidden_errors(Weights(*(tensors[name] for name in Weights._fields)), *deltas)
    values = row | {name: value.item() for name, value in zip(ON_THE_WAY, (*deltas, *hidden), strict=True)}
    after = {name: row[name] - lr * row[f"dE_d{name}"] for name in UPDATE}
    known = {spoken(name): value for name, value in values.items()} | {"η": lr}
    backward = ON_THE_WAY | (SPREADSHEET if gradients == "spreadsheet" else EQUATIONS)

    def table(formulas: dict[str, str], values: dict[str, float], mark: str = "") -> str:
        lines = [
            f"| {spoken(name)}{mark} | {formula} | {_with_numbers(formula, known)} | {values[name]:.10g} |"
            for name, formula in formulas.items()
        ]
        return "\n".join(["| | formula | with its numbers | value |", "|---|---|---|---|", *lines])

    return f"""\
η = {lr:g}. The values come from unrounded numbers; the numbers themselves are shown to 6 digits.

**Forward**

{table(FORWARD, values)}

**Backward** ({gradients})

{table(backward, values)}

**Update**

{table(UPDATE, after, mark=" next")}
"""


def _with_numbers(formula: str, known: dict[str, float]) -> str:
    def number(name: re.Match[str]) -> str:
        text = f"{known[name.group()]:.6g}"
        return f"({text})" if text.startswith("-") else text

    return NAME.sub(number, formula)
