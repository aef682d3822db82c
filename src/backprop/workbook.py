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
SETTINGS = ("η", "i1", "i2", "t1", "t2", *(f"w{n}" for n in range(1, 9)), "bug", "b1", "b2")
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
NUMBER, TINY, BOLD = {"num_format": "0.000000000"}, {"num_format": "0.0000000000E+00"}, {"bold": True, "align": "right"}
NOTES = "η: the learning rate. bug = 1:", "∂E/∂w3 and ∂E/∂w4 of the", "published spreadsheet"


class Workbook(xlsxwriter.Workbook):
    """Three sheets and their charts, written by `write_all`.

    The first row of `trace`, an array with the fields COLUMNS, gives the settings; all its values are stored beside
    the formulas, for programs that do not recalculate. `losses` has the losses of every learning rate.
    """

    def __init__(self, file: Path, trace: np.ndarray, losses: Mapping[str, Sequence[float]]) -> None:
        super().__init__(file)
        self.trace, self.losses = trace, losses
        self.columns = [name for name in COLUMNS if name in (trace.dtype.names or ())]
        self.bold, self.tiny = self.add_format(BOLD), self.add_format(TINY)

    def write_all(self, lr: float, gradients: str) -> None:
        """Write the three sheets."""
        example, steps, table = map(self.add_worksheet, (EXAMPLE_SHEET, STEPS_SHEET, LOSSES_SHEET))
        self._write_example(example, lr, gradients)
        self._write_steps(steps)
        self._write_losses(table)
        example.insert_chart("D18", self._make_chart({"log_base": 10, "num_format": "0E+00"}))
        table.insert_chart(1, len(self.losses) + 3, self._make_chart({"min": 0, "num_format": "0.000"}))
        for sheet in self.worksheets():
            sheet.set_landscape()
            sheet.fit_to_pages(1, 0)

    def _write_example(self, sheet: Any, lr: float, gradients: str) -> None:
        title = "Backpropagation by hand: change a yellow cell and everything follows"
        sheet.write(0, 0, title, self.add_format({"bold": True, "font_size": 14}))
        numbers = {name: self.trace[name][0].item() for name in self.columns}
        numbers |= {"η": lr, "bug": int(gradients == "spreadsheet")}
        settings = [name for name in SETTINGS if name in numbers]
        sheet.write_column(SETTINGS_ROW, 0, settings, self.bold)
        yellow = self.add_format({"bg_color": "#FFF2CC", "border": 1})
        sheet.write_column(SETTINGS_ROW, 1, [numbers[name] for name in settings], yellow)
        end = SETTINGS_ROW + len(settings)
        sheet.write_column(end, 0, NOTES, self.add_format({"font_size": 8, "italic": True}))
        steps = [number for number in formulas.MILESTONES if number <= len(self.trace)]
        for row, step in enumerate(steps, start=end + len(NOTES) + 1):
            sheet.write(row, 0, f"loss {step}", self.bold)
            sheet.write_formula(row, 1, self._link_loss(step), self.tiny, self.trace["E_total"][step - 1].item())
        sheet.insert_image("D3", ROOT / "docs/backprop_names.png", {"x_scale": 0.32, "y_scale": 0.32})
        sheet.set_column(0, 0, 12)
        sheet.set_column(1, 1, 19)

    def _write_steps(self, sheet: Any) -> None:
        sheet.write(HEADER, 0, "step", self.bold)
        sheet.write_column(HEADER + 1, 0, range(1, len(self.trace) + 1))
        ends = [self.columns.index(first) for _, first, *_ in GROUPS] + [len(self.columns)]
        for (group, _, color, can_fold), (begin, end) in zip(GROUPS, pairwise(ends), strict=True):
            header = self.add_format({**BOLD, "bg_color": color, "border": 1})
            group_header = self.add_format({"bold": True, "align": "center", "bg_color": color, "border": 1})
            number, tiny = (self.add_format({**style, "bg_color": color}) for style in (NUMBER, TINY))
            sheet.merge_range(0, 1 + begin, 0, end, group, group_header)
            for column, name in enumerate(self.columns[begin:end], start=1 + begin):
                sheet.write(HEADER, column, formulas.format_name(name), header)
                style = tiny if name.startswith(("E", "dE")) else number
                for row, value in enumerate(self.trace[name].tolist(), start=HEADER + 1):
                    sheet.write_formula(row, column, self._make_formula(name, row), style, value)
            width = 16 if "E" in self.columns[begin] else 11.5
            sheet.set_column(1 + begin, end, width, None, {"level": int(can_fold)})
        sheet.freeze_panes(HEADER + 1, 1)
        sheet.set_column(0, 0, 6)

    def _link_loss(self, step: int) -> str:
        return f"='{STEPS_SHEET}'!{self._get_cell('E_total', HEADER + step)}"

    def _get_cell(self, name: str, row: int) -> str:
        return xl_rowcol_to_cell(row, 1 + self.columns.index(name))

    def _make_formula(self, name: str, row: int) -> str:
        if f"dE_d{name}" in self.columns and row > HEADER + 1:
            gradient = self._get_cell(f"dE_d{name}", row - 1)
            return f"={self._get_cell(name, row - 1)}-{_link_setting('η')}*{gradient}"
        if name in SETTINGS:
            return f"={_link_setting(name)}"
        if name in formulas.FORWARD:
            return "=" + self._translate(formulas.list_forward(self.columns)[name], row)
        formula, tables = formulas.EQUATIONS[name], (formulas.INTERMEDIATE, formulas.SPREADSHEET)
        right, wrong = (self._translate(formulas.expand_formula(formula, table), row) for table in tables)
        return f"={right}" if right == wrong else f"=IF({_link_setting('bug')}=1,{wrong},{right})"

    def _translate(self, formula: str, row: int) -> str:
        """Return the formula in a spreadsheet's syntax: names become cells, σ(x) becomes 1/(1+EXP(-x))."""
        formula = formulas.NAME.sub(lambda name: self._get_cell(name.group(), row), formula)
        closing = ")" if "σ(" in formula else ""
        for sign, syntax in {"σ(": "1/(1+EXP(-", "½": "0.5", "²": "^2", "·": "*", "−": "-", " ": ""}.items():
            formula = formula.replace(sign, syntax)
        return formula + closing

    def _write_losses(self, sheet: Any) -> None:
        last = len(self.losses) + 1  # the last column is live: it follows the worked example
        sheet.write_row(0, 0, ["step", *(f"η = {name}" for name in self.losses), EXAMPLE_SHEET], self.bold)
        sheet.write_column(1, 0, range(1, max(map(len, self.losses.values())) + 1))
        for column, values in enumerate(self.losses.values(), start=1):
            sheet.write_column(1, column, values, self.tiny)
        for step, value in enumerate(self.trace["E_total"].tolist(), start=1):
            sheet.write_formula(step, last, self._link_loss(step), self.tiny, value)
        sheet.set_column(0, last, 18)
        sheet.freeze_panes(1, 1)

    def _make_chart(self, y_axis: dict[str, Any]) -> Any:
        """Plot the columns of the last sheet; the live one is black and dashed."""
        lengths = [*map(len, self.losses.values()), len(self.trace)]
        chart = self.add_chart({"type": "scatter", "subtype": "straight"})
        for column, length in enumerate(lengths, start=1):
            line = {"width": 1.5} | ({"dash_type": "dash", "color": "black"} if column == len(lengths) else {})
            steps, values = ([LOSSES_SHEET, 1, number, length, number] for number in (0, column))
            chart.add_series({"name": [LOSSES_SHEET, 0, column], "categories": steps, "values": values, "line": line})
        chart.set_title({"name": plots.TITLE, "name_font": {"size": 12}})
        chart.set_x_axis({"name": "step", "min": 0, "max": max(lengths), "label_position": "low"})
        chart.set_y_axis({"name": "E_total", **y_axis})
        chart.set_size({"width": 760, "height": 360})
        return chart


def _link_setting(name: str) -> str:
    return f"'{EXAMPLE_SHEET}'!" + xl_rowcol_to_cell(SETTINGS_ROW + SETTINGS.index(name), 1, row_abs=True, col_abs=True)
