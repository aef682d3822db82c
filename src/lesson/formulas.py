"""The worked sheet as formulas: to be read with their numbers, and to be computed by a spreadsheet.

This is the one place where the network is written down a second time; a test holds it against
src.models.backprop.
"""

import re

# In the order in which they are computed. The letters are those of src.models.backprop.COLUMNS; σ is the sigmoid.
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
_DELTA_1 = "(a_o1 − t1)·a_o1·(1 − a_o1)"
_DELTA_2 = "(a_o2 − t2)·a_o2·(1 − a_o2)"
_HIDDEN_1 = f"({_DELTA_1}·w5 + {_DELTA_2}·w7)"
_HIDDEN_2 = f"({_DELTA_1}·w6 + {_DELTA_2}·w8)"
EQUATIONS = {
    "dE_dw1": f"{_HIDDEN_1}·a_h1·(1 − a_h1)·i1",
    "dE_dw2": f"{_HIDDEN_1}·a_h1·(1 − a_h1)·i2",
    "dE_dw3": f"{_HIDDEN_2}·a_h2·(1 − a_h2)·i1",
    "dE_dw4": f"{_HIDDEN_2}·a_h2·(1 − a_h2)·i2",
    "dE_dw5": f"{_DELTA_1}·a_h1",
    "dE_dw6": f"{_DELTA_1}·a_h2",
    "dE_dw7": f"{_DELTA_2}·a_h1",
    "dE_dw8": f"{_DELTA_2}·a_h2",
}
# The slip of the published spreadsheet: a_h1 where a_h2 belongs.
SPREADSHEET = EQUATIONS | {
    "dE_dw3": f"{_HIDDEN_2}·a_h1·(1 − a_h1)·i1",
    "dE_dw4": f"{_HIDDEN_2}·a_h1·(1 − a_h1)·i2",
}
UPDATE = {f"w{n}": f"w{n} − η·∂E/∂w{n}" for n in range(1, 9)}

NAME = re.compile(r"∂E/∂w\d|[a-zE]\w*|η")


def spoken(name: str) -> str:
    """∂E/∂w1 for the column dE_dw1; other names as they are."""
    return name.replace("dE_d", "∂E/∂")


def worked_step(row: dict[str, float], lr: float, gradients: str) -> str:
    """One step of gradient descent as Markdown tables of formula, numbers and value. `row` has one value a column."""
    known = {spoken(name): value for name, value in row.items()} | {"η": lr}
    backward = SPREADSHEET if gradients == "spreadsheet" else EQUATIONS
    after = {name: row[name] - lr * row[f"dE_d{name}"] for name in UPDATE}

    def table(formulas: dict[str, str], values: dict[str, float], digits: int, mark: str = "") -> str:
        lines = [
            f"| {spoken(name)}{mark} | {formula} | {_with_numbers(formula, known)} | {values[name]:.{digits}g} |"
            for name, formula in formulas.items()
        ]
        return "\n".join(["| | formula | with its numbers | value |", "|---|---|---|---|", *lines])

    return f"""\
i1 = {row["i1"]:g}, i2 = {row["i2"]:g}, t1 = {row["t1"]:g}, t2 = {row["t2"]:g}, η = {lr:g}; the values are exact, \
the numbers before them are rounded to 6 digits.

**Forward**

{table(FORWARD, row, 12)}

**Backward** ({gradients})

{table(backward, row, 10)}

**Update**

{table(UPDATE, after, 12, mark=" next")}
"""


def _with_numbers(formula: str, known: dict[str, float]) -> str:
    return NAME.sub(lambda name: f"{known[name.group()]:.6g}", formula)
