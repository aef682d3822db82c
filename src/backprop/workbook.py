"""Write backprop.xlsx: the worked example with live formulas, and the losses of every learning rate."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xlsxwriter
from xlsxwriter.utility import xl_rowcol_to_cell

from src.backprop import formulas, plots
from src.backprop.network import COLUMNS
from src.core.config import ROOT

EXAMPLE_SHEET, STEPS_SHEET, LOSSES_SHEET = "worked example", "steps", "losses"
# The cells that a reader may change, one per row on the first sheet. Rows and columns count from 0.
SETTINGS = ("η", "i1", "i2", "t1", "t2", *(f"w{n}" for n in range(1, 9)), "bug")
SETTINGS_ROW = 2
HEADER = 1  # the row of the column names on the second sheet, below the names of their groups
# Name, first column, color, and whether a click folds the group.
GROUPS = (
    ("sample", "t1", "#E9EDF0", False),
    ("forward: hidden layer", "w1", "#FBF3E4", True),
    ("forward: output layer", "w5", "#FAE9E4", True),
    ("error", "E1", "#E9EDF0", False),
    ("backward: gradients", "dE_dw1", "#E0EDFB", True),
)
NUMBER, TINY = {"num_format": "0.000000000"}, {"num_format": "0.0000000000E+00"}
BOLD = {"bold": True, "align": "right"}
NOTES = "η: the learning rate. bug = 1:", "∂E/∂w3 and ∂E/∂w4 of the", "published spreadsheet"


def write_workbook(
    file: Path, trace: np.ndarray, lr: float, gradients: str, losses: Mapping[str, Sequence[float]]
) -> None:
    """Write the three sheets and their charts.

    The first row of `trace`, an array with the fields COLUMNS, gives the settings; all its values are stored beside
    the formulas, for programs that do not recalculate. `losses` has the losses of every learning rate.
    """
    with xlsxwriter.Workbook(file) as book:
        example, steps, table = (book.add_worksheet(name) for name in (EXAMPLE_SHEET, STEPS_SHEET, LOSSES_SHEET))
        _write_example(book, example, trace, lr, gradients)
        _write_steps(book, steps, trace)
        _write_losses(book, table, losses, trace["E_total"].tolist())
        lengths = [*map(len, losses.values()), len(trace)]
        example.insert_chart("D18", _make_chart(book, lengths, {"log_base": 10, "num_format": "0E+00"}))
        table.insert_chart(1, len(lengths) + 2, _make_chart(book, lengths, {"min": 0, "num_format": "0.000"}))
        for sheet in book.worksheets():
            sheet.set_landscape()
            sheet.fit_to_pages(1, 0)


def _write_example(book: Any, sheet: Any, trace: np.ndarray, lr: float, gradients: str) -> None:
    bold, tiny = book.add_format(BOLD), book.add_format(TINY)
    title = "Backpropagation by hand: change a yellow cell and everything follows"
    sheet.write(0, 0, title, book.add_format({"bold": True, "font_size": 14}))
    numbers = {name: trace[name][0].item() for name in COLUMNS} | {"η": lr, "bug": int(gradients == "spreadsheet")}
    sheet.write_column(SETTINGS_ROW, 0, SETTINGS, bold)
    yellow = book.add_format({"bg_color": "#FFF2CC", "border": 1})
    sheet.write_column(SETTINGS_ROW, 1, [numbers[name] for name in SETTINGS], yellow)
    end = SETTINGS_ROW + len(SETTINGS)
    sheet.write_column(end, 0, NOTES, book.add_format({"font_size": 8, "italic": True}))
    steps = [number for number in formulas.MILESTONES if number <= len(trace)]
    for row, step in enumerate(steps, start=end + len(NOTES) + 1):
        sheet.write(row, 0, f"loss {step}", bold)
        sheet.write_formula(row, 1, _link_loss(step), tiny, trace["E_total"][step - 1].item())
    sheet.insert_image("D3", ROOT / "docs/backprop_names.png", {"x_scale": 0.75, "y_scale": 0.75})
    sheet.set_column(0, 0, 12)
    sheet.set_column(1, 1, 19)


def _write_steps(book: Any, sheet: Any, trace: np.ndarray) -> None:
    sheet.write(HEADER, 0, "step", book.add_format(BOLD))
    sheet.write_column(HEADER + 1, 0, range(1, len(trace) + 1))
    ends = [COLUMNS.index(first) for _, first, *_ in GROUPS] + [len(COLUMNS)]
    for (group, _, color, can_fold), (begin, end) in zip(GROUPS, pairwise(ends), strict=True):
        header = book.add_format({**BOLD, "bg_color": color, "border": 1})
        group_header = book.add_format({"bold": True, "align": "center", "bg_color": color, "border": 1})
        number, tiny = (book.add_format({**style, "bg_color": color}) for style in (NUMBER, TINY))
        sheet.merge_range(0, 1 + begin, 0, end, group, group_header)
        for column, name in enumerate(COLUMNS[begin:end], start=1 + begin):
            sheet.write(HEADER, column, formulas.format_name(name), header)
            style = tiny if name.startswith(("E", "dE")) else number
            for row, value in enumerate(trace[name].tolist(), start=HEADER + 1):
                sheet.write_formula(row, column, _make_formula(name, row), style, value)
        sheet.set_column(1 + begin, end, 16 if "E" in COLUMNS[begin] else 11.5, None, {"level": int(can_fold)})
    sheet.freeze_panes(HEADER + 1, 1)
    sheet.set_column(0, 0, 6)


def _link_setting(name: str) -> str:
    return f"'{EXAMPLE_SHEET}'!" + xl_rowcol_to_cell(SETTINGS_ROW + SETTINGS.index(name), 1, row_abs=True, col_abs=True)


def _link_loss(step: int) -> str:
    return f"='{STEPS_SHEET}'!{_get_cell('E_total', HEADER + step)}"


def _get_cell(name: str, row: int) -> str:
    return xl_rowcol_to_cell(row, 1 + COLUMNS.index(name))


def _make_formula(name: str, row: int) -> str:
    if name in formulas.UPDATE and row > HEADER + 1:
        return f"={_get_cell(name, row - 1)}-{_link_setting('η')}*{_get_cell(f'dE_d{name}', row - 1)}"
    if name in SETTINGS:
        return f"={_link_setting(name)}"
    if name in formulas.FORWARD:
        return "=" + _translate(formulas.FORWARD[name], row)
    formula, tables = formulas.EQUATIONS[name], (formulas.INTERMEDIATE, formulas.SPREADSHEET)
    right, wrong = (_translate(formulas.expand_formula(formula, table), row) for table in tables)
    return f"={right}" if right == wrong else f"=IF({_link_setting('bug')}=1,{wrong},{right})"


def _translate(formula: str, row: int) -> str:
    """Return the formula in a spreadsheet's syntax: names become cells, σ(x) becomes 1/(1+EXP(-x))."""
    formula = formulas.NAME.sub(lambda name: _get_cell(name.group(), row), formula)
    closing = ")" if "σ(" in formula else ""
    for sign, syntax in {"σ(": "1/(1+EXP(-", "½": "0.5", "²": "^2", "·": "*", "−": "-", " ": ""}.items():
        formula = formula.replace(sign, syntax)
    return formula + closing


def _write_losses(book: Any, sheet: Any, losses: Mapping[str, Sequence[float]], live: Sequence[float]) -> None:
    bold, tiny = book.add_format(BOLD), book.add_format(TINY)
    sheet.write_row(0, 0, ["step", *(f"η = {name}" for name in losses), EXAMPLE_SHEET], bold)
    sheet.write_column(1, 0, range(1, max(map(len, losses.values())) + 1))
    for column, values in enumerate(losses.values(), start=1):
        sheet.write_column(1, column, values, tiny)
    # The last column is live: it follows the worked example.
    for step, value in enumerate(live, start=1):
        sheet.write_formula(step, len(losses) + 1, _link_loss(step), tiny, value)
    sheet.set_column(0, len(losses) + 1, 18)
    sheet.freeze_panes(1, 1)


def _make_chart(book: Any, lengths: Sequence[int], y_axis: dict[str, Any]) -> Any:
    """Plot the columns of the last sheet, which have these lengths; the live one is black and dashed."""
    chart = book.add_chart({"type": "scatter", "subtype": "straight"})
    for column, length in enumerate(lengths, start=1):
        line = {"dash_type": "dash", "color": "black"} if column == len(lengths) else {}
        steps, values = ([LOSSES_SHEET, 1, number, length, number] for number in (0, column))
        name = [LOSSES_SHEET, 0, column]
        chart.add_series({"name": name, "categories": steps, "values": values, "line": {"width": 1.5, **line}})
    chart.set_title({"name": plots.TITLE, "name_font": {"size": 12}})
    chart.set_x_axis({"name": "step", "min": 0, "max": max(lengths), "label_position": "low"})
    chart.set_y_axis({"name": "E_total", **y_axis})
    chart.set_size({"width": 760, "height": 360})
    return chart
