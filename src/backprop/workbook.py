"""backprop.xlsx: the worked example with live formulas, and the losses of every learning rate."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xlsxwriter
from xlsxwriter.utility import xl_rowcol_to_cell

from src.backprop import plots
from src.backprop.formulas import EQUATIONS, FORWARD, NAME, SPREADSHEET, UPDATE, expanded, spoken
from src.backprop.network import COLUMNS

START, STEPS, LOSSES = "worked example", "steps", "losses"
# The cells that a reader may change, below one another on the first sheet. Rows and columns count from 0.
SETTINGS = ("η", "i1", "i2", "t1", "t2", *(f"w{n}" for n in range(1, 9)), "slip")
SETTINGS_ROW = 2
MILESTONES = 1, 10, 50, 100
HEAD = 1  # the row of the columns' names on the second sheet; above it, those of their groups
# Group, its first column, colour, whether a click folds it away.
GROUPS = (
    ("sample", "t1", "#E9EDF0", False),
    ("forward: hidden layer", "w1", "#FBF3E4", True),
    ("forward: output layer", "w5", "#FAE9E4", True),
    ("error", "E1", "#E9EDF0", False),
    ("backward: gradients", "dE_dw1", "#E0EDFB", True),
)
A4, NUMBER, TINY = 9, "0.000000000", "0.0000000000E+00"


def write(path: Path, trace: np.ndarray, lr: float, gradients: str, losses: Mapping[str, Sequence[float]]) -> None:
    """Starts the sheet from the first row of `trace`, from `lr` and from `gradients`.

    The rest of `trace`, a structured array with the fields COLUMNS, is what programs see that do not
    calculate: the results which the file keeps beside its formulas. `losses` has a list for each rate.
    """
    with xlsxwriter.Workbook(path) as book:
        sheets = [book.add_worksheet(name) for name in (START, STEPS, LOSSES)]
        _write_start(book, sheets[0], trace, lr, gradients)
        _write_steps(book, sheets[1], trace)
        _write_losses(book, sheets[2], losses, trace["E_total"].tolist())
        for sheet in sheets:
            sheet.set_landscape()
            sheet.set_paper(A4)
            sheet.set_margins(0.4, 0.4, 0.5, 0.5)
        sheets[0].insert_chart("D18", _chart(book, losses, len(trace), log=True))
        sheets[2].insert_chart(1, len(losses) + 3, _chart(book, losses, len(trace), log=False))


def _write_start(book: Any, sheet: Any, trace: np.ndarray, lr: float, gradients: str) -> None:
    bold = book.add_format({"bold": True, "align": "right"})
    entry = book.add_format({"bg_color": "#FFF2CC", "border": 1})
    tiny = book.add_format({"num_format": TINY})
    title = "Backpropagation by hand: change a yellow cell and everything follows"
    sheet.write(0, 0, title, book.add_format({"bold": True, "font_size": 14}))
    start = {"η": lr, "slip": int(gradients == "spreadsheet")}
    for row, name in enumerate(SETTINGS, start=SETTINGS_ROW):
        sheet.write(row, 0, name, bold)
        sheet.write_number(row, 1, start[name] if name in start else trace[name][0].item(), entry)
    row = SETTINGS_ROW + len(SETTINGS)
    notes = ("η: the learning rate. slip = 1: a_h1·(1 − a_h1)", "in ∂E/∂w3 and ∂E/∂w4, where a_h2 belongs,")
    for offset, note in enumerate((*notes, "as in the published spreadsheet.")):
        sheet.write(row + offset, 0, note, book.add_format({"font_size": 8, "italic": True}))
    row += len(notes) + 2
    for offset, step in enumerate(number for number in MILESTONES if number <= len(trace)):
        cell = _cell("E_total", HEAD + step)
        sheet.write(row + offset, 0, f"loss {step}", bold)
        sheet.write_formula(row + offset, 1, f"='{STEPS}'!{cell}", tiny, trace["E_total"][step - 1].item())
    picture = BytesIO()
    plots.save(plots.network(plots.NAMES), picture)
    sheet.insert_image("D3", "network.png", {"image_data": picture, "x_scale": 0.75, "y_scale": 0.75})
    sheet.set_column(0, 0, 12)
    sheet.set_column(1, 1, 19)
    sheet.fit_to_pages(1, 1)


def _write_steps(book: Any, sheet: Any, trace: np.ndarray) -> None:
    bold = book.add_format({"bold": True, "align": "right"})
    sheet.write(HEAD, 0, "step", bold)
    sheet.write_column(HEAD + 1, 0, range(1, len(trace) + 1))
    ends = [COLUMNS.index(first) for _, first, *_ in GROUPS] + [len(COLUMNS)]
    for (group, _, colour, folds), (begin, end) in zip(GROUPS, pairwise(ends), strict=True):
        head = book.add_format({"bold": True, "align": "right", "bg_color": colour, "border": 1})
        band = book.add_format({"bold": True, "align": "center", "bg_color": colour, "border": 1})
        styles = [book.add_format({"num_format": form, "bg_color": colour}) for form in (NUMBER, TINY)]
        sheet.merge_range(0, 1 + begin, 0, end, group, band)
        for column, name in enumerate(COLUMNS[begin:end], start=1 + begin):
            sheet.write(HEAD, column, spoken(name), head)
            for row, value in enumerate(trace[name].tolist(), start=HEAD + 1):
                sheet.write_formula(row, column, _formula(name, row), styles[name.startswith(("E", "dE"))], value)
        sheet.set_column(1 + begin, end, 16 if "E" in COLUMNS[begin] else 11.5, None, {"level": int(folds)})
    sheet.freeze_panes(HEAD + 1, 1)
    sheet.repeat_rows(0, HEAD)
    sheet.repeat_columns(0)
    sheet.set_column(0, 0, 6)
    sheet.set_v_pagebreaks([1 + COLUMNS.index(name) for name in ("w5", "dE_dw1")])
    sheet.set_print_scale(64)


def _setting(name: str) -> str:
    return f"'{START}'!" + xl_rowcol_to_cell(SETTINGS_ROW + SETTINGS.index(name), 1, row_abs=True, col_abs=True)


def _cell(name: str, row: int) -> str:
    return xl_rowcol_to_cell(row, 1 + COLUMNS.index(name))


def _formula(name: str, row: int) -> str:
    if name in UPDATE and row > HEAD + 1:
        return f"={_cell(name, row - 1)}-{_setting('η')}*{_cell(f'dE_d{name}', row - 1)}"
    if name in SETTINGS:
        return f"={_setting(name)}"
    if name in FORWARD:
        return "=" + _spreadsheet_syntax(FORWARD[name], row)
    right, slipped = (_spreadsheet_syntax(expanded(table[name]), row) for table in (EQUATIONS, SPREADSHEET))
    return f"={right}" if right == slipped else f"=IF({_setting('slip')}=1,{slipped},{right})"


def _spreadsheet_syntax(formula: str, row: int) -> str:
    """σ(x) becomes 1/(1+EXP(-x)), every name its cell, and the signs those of a spreadsheet."""
    cells = NAME.sub(lambda name: _cell(name.group(), row), formula)
    signs = {"σ(": "1/(1+EXP(-", "½": "0.5", "²": "^2", "·": "*", "−": "-", " ": ""}
    closing = ")" if "σ(" in cells else ""
    for written, meant in signs.items():
        cells = cells.replace(written, meant)
    return cells + closing


def _write_losses(book: Any, sheet: Any, losses: Mapping[str, Sequence[float]], live: Sequence[float]) -> None:
    bold = book.add_format({"bold": True, "align": "right"})
    tiny = book.add_format({"num_format": TINY})
    sheet.write(0, 0, "step", bold)
    sheet.write_column(1, 0, range(1, max(map(len, losses.values())) + 1))
    for column, (name, values) in enumerate(losses.items(), start=1):
        sheet.write(0, column, f"η = {name}", bold)
        sheet.write_column(1, column, values, tiny)
    # One more, live: whatever stands on the worked sheet.
    column = len(losses) + 1
    sheet.write(0, column, START, bold)
    for step, value in enumerate(live, start=1):
        sheet.write_formula(step, column, f"='{STEPS}'!{_cell('E_total', HEAD + step)}", tiny, value)
    sheet.set_column(0, column, 18)
    sheet.freeze_panes(1, 1)
    sheet.fit_to_pages(1, 0)


def _chart(book: Any, losses: Mapping[str, Sequence[float]], steps: int, log: bool) -> Any:
    """The columns of the last sheet; the live one is black and dashed."""
    chart = book.add_chart({"type": "scatter", "subtype": "straight"})
    lengths = [*map(len, losses.values()), steps]
    for column, length in enumerate(lengths, start=1):
        live = {"dash_type": "dash", "color": "black"} if column == len(lengths) else {}
        chart.add_series(
            {
                "name": [LOSSES, 0, column],
                "categories": [LOSSES, 1, 0, length, 0],
                "values": [LOSSES, 1, column, length, column],
                "line": {"width": 1.5, **live},
            }
        )
    chart.set_title({"name": "Variation of losses w.r.t. learning rate", "name_font": {"size": 12}})
    chart.set_x_axis({"name": "step", "min": 0, "max": max(lengths), "label_position": "low"})
    scale = {"log_base": 10, "num_format": "0E+00"} if log else {"min": 0, "num_format": "0.000"}
    chart.set_y_axis({"name": "E_total", **scale})
    chart.set_size({"width": 760, "height": 360} if log else {"width": 900, "height": 480})
    return chart
