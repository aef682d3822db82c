"""Write backprop.xlsx: the steps of one run with live formulas, and the losses of every run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import xlsxwriter
from xlsxwriter.utility import xl_rowcol_to_cell

from src.backprop.formulas import NAME, format_names, list_formulas
from src.backprop.network import equations, forward, get_group

STEPS_SHEET, LOSSES_SHEET = "steps", "losses"
HEADER = 20  # the row of the column names, below the chart; rows and columns count from 0
COLORS = {"weight": "#FBF3E4", "neuron": "#FAE9E4", "gradient": "#E0EDFB"}  # of the column names, by get_group
SYNTAX = str.maketrans({"½": "0.5", "²": "^2", "·": "*", "−": "-", " ": ""})


def write_workbook(file: Path, rows: Sequence[Mapping[str, float]], losses: Mapping[str, Sequence[float]]) -> None:
    """Write both sheets and a chart; `rows` has the values stored for programs that do not recalculate."""
    names = [format_names(key) for key in rows[0]]
    formulas = list_formulas(forward, rows[0]) | list_formulas(equations, rows[0])

    def translate(formula: str, row: int) -> str:
        """Return the formula in a spreadsheet's syntax: names become cells of the row."""
        formula = re.sub("(.+) if bug else (.+)", r"IF(bug=1,\1,\2)", formula)
        formula = NAME.sub(lambda name: xl_rowcol_to_cell(row, 1 + names.index(name.group())), formula)
        return "=" + re.sub(r"σ\((\w+)\)", r"1/(1+EXP(-\1))", formula).translate(SYNTAX)

    with xlsxwriter.Workbook(file) as book:
        sheet, table = book.add_worksheet(STEPS_SHEET), book.add_worksheet(LOSSES_SHEET)
        bold, yellow = book.add_format({"bold": True}), book.add_format({"bg_color": "#FFF2CC", "border": 1})
        sheet.write(0, 0, "Backpropagation by hand: change a yellow cell, and everything follows", bold)
        sheet.write(1, 0, "η: the learning rate; bug = 1: ∂E/∂w3 and ∂E/∂w4 of the published spreadsheet")
        sheet.write_column(HEADER, 0, ["step", *range(1, len(rows) + 1)])
        for column, (key, name) in enumerate(zip(rows[0], names, strict=True), start=1):
            color = COLORS.get(get_group(key), "#E9EDF0")
            sheet.write(HEADER, column, name, book.add_format({"bold": True, "align": "right", "bg_color": color}))
            for row, numbers in enumerate(rows, start=HEADER + 1):
                if name in formulas:
                    formula = translate(formulas[name], row)
                elif row == HEADER + 1:
                    sheet.write(row, column, numbers[key], yellow)
                    continue
                else:
                    formula = translate(f"{name} − η·∂E/∂{name}" if f"∂E/∂{name}" in names else name, row - 1)
                sheet.write_formula(row, column, formula, None, numbers[key])
        sheet.set_column(1, len(names), 12)
        sheet.freeze_panes(0, 1)

        last, longest = len(losses) + 1, max(map(len, losses.values()))
        table.write_row(0, 0, ["step", *losses, STEPS_SHEET], bold)
        table.write_column(1, 0, range(1, longest + 1))
        for column, values in enumerate(losses.values(), start=1):
            table.write_column(1, column, values)
        for step, numbers in enumerate(rows, start=1):  # the last column follows the other sheet
            cell = xl_rowcol_to_cell(HEADER + step, 1 + names.index("E_total"))
            table.write_formula(step, last, f"={STEPS_SHEET}!{cell}", None, numbers["E_total"])
        table.set_column(1, last, 18)

        chart = book.add_chart({"type": "scatter", "subtype": "straight"})
        for column in range(1, last + 1):
            line = {"color": "black", "dash_type": "dash"} if column == last else {"width": 1.5}
            steps, curve = ([LOSSES_SHEET, 1, number, longest, number] for number in (0, column))
            chart.add_series({"name": [LOSSES_SHEET, 0, column], "categories": steps, "values": curve, "line": line})
        chart.set_x_axis({"name": "step", "label_position": "low"})
        chart.set_y_axis({"name": "E_total", "log_base": 10, "num_format": "0E+00"})
        chart.set_size({"width": 760, "height": 350})
        sheet.insert_chart(2, 1, chart)
