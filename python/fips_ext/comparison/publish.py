"""The folder of a comparison: results, tables, plot."""

from __future__ import annotations

from pathlib import Path

from .._atomic import replace_file
from .plot import plot
from .results import Results, Row
from .table import Table, tabulate

RESULT_FILE, TABLE_FILE, PLOT_FILE = "compare.json", "compare.md", "compare.png"


def publish(results: Results, rows: list[Row], folder: Path) -> list[Table]:
    """Write the tables and the plot of the first text beside the results; returns the tables."""
    tables = [tabulate(results, rows, text) for text in results.dense]
    replace_file(folder / TABLE_FILE, "\n".join(table.to_markdown() for table in tables))
    plot(results, rows, next(iter(results.dense)), folder / PLOT_FILE)
    return tables
