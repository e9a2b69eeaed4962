"""How the page's charts are drawn: matplotlib's SVG, made part of a page.

Colours are Okabe and Ito's, which colour-blind people tell apart; lines also differ in dashes and markers and areas in
hatching, so that nothing is lost in grey.  Equal charts give equal bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fedtune.report.page.catalogue import power_of_ten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 6
"""Sites that are drawn as lines; more could not be told apart."""
_WIDTH = 4.3  # inches, at which text of 10 points reads well at half a page's width and on a phone
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00")
_DASHES = ("-", (0, (6, 2)), (0, (2, 1)), (0, (6, 2, 1, 2)), (0, (10, 3)), (0, (1, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "X")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}


def drawn(code: str, draw: Callable[[Sequence[Axes]], None], *, panels: int, height: float) -> str:
    """The SVG that `draw` makes on so many axes, one under the other; `height` in inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE | {"svg.hashsalt": code}), warnings.catch_warnings():
        # The reader's own fonts draw the text: a letter that matplotlib's font lacks is not missing there.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        draw(list(axes))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


def inline(svg: str, code: str, title: Markup, description: Markup) -> Markup:
    """As part of a page: named for screen readers, with ids that no other chart has, and no style for the page."""
    inner = re.sub(r"<(style|metadata)\b.*?</\1>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    inner = re.sub(r'\bid="', f'id="{code}-', inner)
    inner = re.sub(r'xlink:href="#|\bhref="#', f'href="#{code}-', inner).replace("url(#", f"url(#{code}-")
    inner = re.sub(r' style="([^"]*)"', _attributes, inner)
    opening, rest = inner.split(">", 1)
    (box,) = re.findall(r'viewBox="([^"]*)"', opening)
    names = f'<title id="{code}-title">{title}</title><desc id="{code}-desc">{description}</desc>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" stroke-linejoin="round"'
        f' aria-labelledby="{code}-title {code}-desc">'
    )
    return Markup(head + names + rest)  # matplotlib escapes the texts that it was given


def _attributes(style: re.Match[str]) -> str:
    """A style as attributes, which every reader of SVG knows; the font is the page's own."""
    pairs = re.findall(r"([\w-]+):\s*([^;]+)", style.group(1))
    return "".join(f' {name}="{value}"' for name, value in pairs if name != "font-family")


def line_style(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line with a number."""
    place = number % MOST_LINES
    return {"color": COLOURS[place], "linestyle": _DASHES[place], "marker": _MARKERS[place]}


def legend(axes: Axes) -> None:
    """Above the axes, where there is more than one thing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)


def whole_numbers(axes: Axes) -> None:
    """Ticks at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def powers_of_ten(axes: Axes) -> None:
    """Ticks of a logarithmic axis as 10⁻⁵."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(round(math.log10(value)))))
    axes.xaxis.set_minor_formatter(NullFormatter())
