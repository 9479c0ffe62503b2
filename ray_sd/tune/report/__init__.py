"""A sweep as one HTML file: who wins, what the trials drew, how they went, and which settings mattered."""

from ray_sd.tune.report.page import report_html

__all__ = ["report_html"]
