"""A plan as a page of its own, and its chart: epsilon by round as SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from fedtune.cli import plan_sections as words
from fedtune.cli.plan_sections import Outlook
from fedtune.cli.sections import Section
from fedtune.privacy.accountant import epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with any colour vision; in print, each line has a dash and a mark of its own.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h2 { margin: 2rem 0 .5rem; font-size: 1.2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: .5rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem .3rem 0; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #666; font-weight: 600; white-space: pre-line; vertical-align: bottom; }
th.word, td.word { text-align: left; }
td { font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; max-width: 48rem; }
.promise { border-left: .4rem solid #0072B2; padding-left: 1rem; font-size: 1.1rem; }
.none { border-color: #D55E00; }
.note { color: #444; margin: .2rem 0; }
@media print { body { margin: 0; font-size: 11px; } h2 { break-after: avoid; } table, svg { break-inside: avoid; } }
"""


def page_html(outlook: Outlook) -> str:
    """A self-contained page with every table and the chart; no script, no network."""
    title = f"Plan of {html.escape(outlook.config.name)}"
    kind = "promise" if outlook.guaranteed else "promise none"
    facts = "".join(_row("td", pair, words={0, 1}) for pair in words.facts(outlook).items())
    sections = [
        words.accountants(outlook),
        words.sites(outlook),
        words.what_if(outlook),
        words.bytes_and_time(outlook),
        *words.policies(outlook),
        words.rounds(outlook),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p class="{kind}"><strong>{html.escape(words.promise(outlook))}</strong></p>
<table>{facts}</table>
{_inline(chart_svg(outlook))}
{"".join(map(_section, sections))}
<p class="note">Worked out from settings and declared sizes alone; no record was read.</p>
</body></html>
"""


def chart_svg(outlook: Outlook) -> str:
    """Epsilon after each round by each accountant, as an SVG of its own; without privacy it says so, without lines."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text stays text, and the same figures give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedtune", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _draw(axes, outlook)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Title": "Epsilon after each round"})
    return out.getvalue()


def _draw(axes: Axes, outlook: Outlook) -> None:
    from matplotlib.ticker import MaxNLocator

    plan, price = outlook.plan, outlook.price
    axes.set_xlabel(f"rounds (of {plan.local_steps} steps each)")
    axes.set_ylabel(f"epsilon at delta {plan.delta:g}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not price.rounds:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "No epsilon is promised: privacy=none", ha="center", va="center", transform=axes.transAxes)
        return
    counts = [one.round for one in price.rounds]
    lines = (
        ([one.filter for one in price.rounds], "Renyi filter", price.epsilon_filter, _GREEN, "-.", "^"),
        ([one.rdp for one in price.rounds], "RDP", price.epsilon_rdp, _ORANGE, "--", "s"),
        ([one.pld for one in price.rounds], "PLD, the run's figure", price.epsilon, _BLUE, "-", "o"),
    )
    for values, name, last, colour, dashes, mark in lines:
        label = f"{name}: {epsilon_text(last)}"
        axes.plot(counts, values, dashes, color=colour, marker=mark, markersize=4, linewidth=1.8, label=label)
    forgets = f"WRONG, starts anew each round: {epsilon_text(price.epsilon_of_one_round)}"
    axes.plot(counts, [price.epsilon_of_one_round] * len(counts), ":", color=_GREY, linewidth=1.8, label=forgets)
    if plan.spare_rounds:
        ends = plan.num_rounds + 0.5, plan.most_rounds + 0.5
        axes.axvspan(*ends, color="#000000", alpha=0.07, linewidth=0, label="spare rounds")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.figure.legend(frameon=False, loc="outside upper left", ncols=2, fontsize=9)


def _inline(svg: str) -> str:
    """An SVG document as part of a page, with a name for those who do not see it."""
    inner = svg[svg.index("<svg") :]
    name = "Epsilon after each round by each accountant; the table at the end of the page has the figures."
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{name}" ', inner, count=1)


def _section(section: Section) -> str:
    if not section.rows and not section.notes:
        return ""
    table = ""
    if section.rows:
        rows = "".join(_row("td", row, words=section.words) for row in section.rows)
        table = f"<table>{_row('th', section.headings, words=section.words)}{rows}</table>"
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in section.notes)
    return f"<h2>{html.escape(section.title)}</h2>{table}{notes}\n"


def _row(cell: str, texts: Iterable[str], *, words: Collection[int]) -> str:
    cells = (
        f"<{cell}{' class=word' if number in words else ''}>{html.escape(text)}</{cell}>"
        for number, text in enumerate(texts)
    )
    return f"<tr>{''.join(cells)}</tr>"
