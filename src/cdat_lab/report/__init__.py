"""The report of a study: one self-contained HTML page, and its tables as CSV."""

from cdat_lab.report.page import render, write_report

__all__ = ["render", "write_report"]
