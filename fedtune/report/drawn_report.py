"""The notebook display of a privacy report."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

from fedtune.formatting import format_html_table
from fedtune.privacy.accountant import format_epsilon
from fedtune.report.facts import LedgerFacts
from fedtune.report.model import Report
from fedtune.report.page.render import render_label
from fedtune.show.svg_figure import SvgFigure


class DrawnReport(Report):
    """A report that a notebook displays as a table of its main figures, and that can draw its privacy label."""

    @classmethod
    def from_report(cls, report: Report) -> DrawnReport:
        """Copy the fields of a report."""
        return cls(**{one.name: getattr(report, one.name) for one in fields(report)})

    def scale(self, language: Literal["en", "de"] = "en") -> SvgFigure:
        """Draw the privacy label: epsilon and its meaning, the verdict, and the limits of the guarantee."""
        return SvgFigure(render_label(self, language=language))

    def _repr_html_(self) -> str:
        name = self.facts.site if isinstance(self.facts, LedgerFacts) else self.facts.name
        rows = {"epsilon": format_epsilon(self.epsilon), "verdict": self.verdict.state, "sites": len(self.sites)}
        return format_html_table(f"Privacy report of {name}", rows.items())
