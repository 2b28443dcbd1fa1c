"""What came out: one page, plots and tables from a run's plain files, and the comparison of a study's runs."""

from __future__ import annotations

from kore_fast.report.comparison import build_comparison
from kore_fast.report.page import build_report, load_lines
from kore_fast.report.tables import terminal_table

__all__ = ["build_comparison", "build_report", "load_lines", "terminal_table"]
