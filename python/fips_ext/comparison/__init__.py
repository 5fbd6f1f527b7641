"""Comparing ways to compress one model at equal bytes, on equal data, with equal training."""

from .methods import Method, methods_of
from .results import Results, Row, provenance
from .run import Cell, Settings, run_cells
from .table import tabulate

__all__ = [
    "Cell",
    "Method",
    "Results",
    "Row",
    "Settings",
    "methods_of",
    "provenance",
    "run_cells",
    "tabulate",
]
