"""backprop.xlsx: the worked sheet with live formulas, and the losses of every learning rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xlsxwriter
from xlsxwriter.utility import xl_rowcol_to_cell

from src.backprop.formulas import EQUATIONS, FORWARD, NAME, SPREADSHEET, UPDATE, expanded, spoken
from src.backprop.network import COLUMNS

SHEET = "worked example"
# The cells that a reader may change, side by side below their names; then the table. Rows count from 0.
SETTINGS = ("η", "t1", "t2", "i1", "i2", *(f"w{n}" for n in range(1, 9)), "slip")
SETTINGS_ROW, HEAD = 2, 5


def write(path: Path, trace: np.ndarray, lr: float, gradients: str, losses: Mapping[str, Sequence[float]]) -> None:
    """Starts the sheet from the first row of `trace`, from `lr` and from `gradients`.

    The rest of `trace`, a structured array with the fields COLUMNS, is what programs see that do not
    calculate: the results which the file keeps beside its formulas. `losses` has a list for each rate.
    """
    with xlsxwriter.Workbook(path) as book:
        bold = book.add_format({"bold": True, "align": "right"})
        title = book.add_format({"bold": True, "font_size": 14})
        entry = book.add_format({"bg_color": "#FFF2CC", "border": 1})
        number = book.add_format({"num_format": "0.000000000"})
        tiny = book.add_format({"num_format": "0.0000000000E+00"})

        sheet = book.add_worksheet(SHEET)
        sheet.write(0, 0, "Backpropagation by hand: change a yellow cell and everything follows", title)
        sheet.write_row(SETTINGS_ROW - 1, 1, SETTINGS, bold)
        sheet.write(SETTINGS_ROW, 0, "start", bold)
        start = {"η": lr, "slip": int(gradients == "spreadsheet")}
        for column, name in enumerate(SETTINGS, start=1):
            sheet.write_number(SETTINGS_ROW, column, start[name] if name in start else trace[name][0].item(), entry)
        sheet.write(
            SETTINGS_ROW + 1,
            1,
            "η is the learning rate. slip = 1 repeats that of the published spreadsheet: "
            "a_h1·(1 − a_h1) in ∂E/∂w3 and ∂E/∂w4, where a_h2·(1 − a_h2) belongs.",
        )
        sheet.write(HEAD, 0, "loss number", bold)
        sheet.write_row(HEAD, 1, [spoken(name) for name in COLUMNS], bold)
        for step, values in enumerate(trace):
            row = HEAD + 1 + step
            sheet.write_number(row, 0, step + 1)
            for column, name in enumerate(COLUMNS, start=1):
                style = tiny if name.startswith(("E", "dE")) else number
                sheet.write_formula(row, column, _formula(name, row), style, values[name].item())
        sheet.freeze_panes(HEAD + 1, 1)
        sheet.set_landscape()
        sheet.fit_to_pages(1, 0)
        sheet.set_column(0, 0, 12)
        sheet.set_column(1, len(COLUMNS), 17)

        _write_losses(book, losses, len(trace), trace["E_total"].tolist())


def _setting(name: str) -> str:
    return xl_rowcol_to_cell(SETTINGS_ROW, 1 + SETTINGS.index(name), row_abs=True, col_abs=True)


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


def _write_losses(
    book: xlsxwriter.Workbook, losses: Mapping[str, Sequence[float]], steps: int, live: Sequence[float]
) -> None:
    sheet = book.add_worksheet("losses")
    bold = book.add_format({"bold": True, "align": "right"})
    tiny = book.add_format({"num_format": "0.0000000000E+00"})
    chart = book.add_chart({"type": "scatter", "subtype": "straight"})
    length = max(map(len, losses.values()))
    sheet.write(0, 0, "loss number", bold)
    sheet.write_column(1, 0, range(1, length + 1))
    for column, (name, values) in enumerate(losses.items(), start=1):
        sheet.write(0, column, f"η = {name}", bold)
        sheet.write_column(1, column, values, tiny)
        _add_line(chart, column, len(values))
    # One more, live: whatever stands on the worked sheet.
    column = len(losses) + 1
    sheet.write(0, column, "worked example", bold)
    for step in range(steps):
        cell = _cell("E_total", HEAD + 1 + step)
        sheet.write_formula(1 + step, column, f"='{SHEET}'!{cell}", tiny, live[step])
    _add_line(chart, column, steps, dash_type="dash", color="black")
    sheet.set_column(0, column, 18)
    chart.set_title({"name": "Variation of losses w.r.t. learning rate"})
    chart.set_x_axis({"name": "loss number", "min": 0, "max": length})
    chart.set_y_axis({"name": "E_total", "num_format": "0.000", "min": 0})
    chart.set_size({"width": 900, "height": 480})
    sheet.insert_chart(1, column + 2, chart)
    sheet.freeze_panes(1, 1)
    sheet.set_landscape()
    sheet.fit_to_pages(1, 0)


def _add_line(chart: xlsxwriter.chart.Chart, column: int, length: int, **line: str) -> None:
    chart.add_series(
        {
            "name": ["losses", 0, column],
            "categories": ["losses", 1, 0, length, 0],
            "values": ["losses", 1, column, length, column],
            "line": {"width": 1.5, **line},
        }
    )
