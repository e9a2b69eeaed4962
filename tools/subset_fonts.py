"""Write the fonts that pages carry: subsets of Liberation 2.1.5 with the letters and signs that pages use.

    python tools/subset_fonts.py FOLDER    # with LiberationSans-Regular.ttf, -Bold.ttf and LiberationMono-Regular.ttf

The license keeps the name Liberation for the whole font, so the subsets have a name of their own.  It needs fontTools
and brotli, which the extra `pdf` brings.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fontTools.pens.boundsPen import BoundsPen
from fontTools.pens.transformPen import TransformPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.subset import Options, Subsetter, parse_unicodes
from fontTools.ttLib import TTFont

INTO = Path(__file__).parents[1] / "fedtune/report/page/fonts"
FONTS = {
    "LiberationSans-Regular.ttf": ("sans-regular.woff2", "Fedtune Sans"),
    "LiberationSans-Bold.ttf": ("sans-bold.woff2", "Fedtune Sans"),
    "LiberationMono-Regular.ttf": ("mono-regular.woff2", "Fedtune Mono"),
}
LATIN = "20-7E,A0-17F"
SIGNS = "3B4,3B5,3C3,2010-2015,2018-201E,2022,2026,2030,2032,2033,2039,203A,2044,2070,2074-207B,20AC,2122"
ARROWS_AND_MATHS = "2190-2195,2202,2211,2212,221A,221E,2248,2260,2264,2265,25A0,25A1,25B2,25B6,25BA,25BC,25C4,25CB,25CF"
UNICODES = parse_unicodes(f"{LATIN},{SIGNS},{ARROWS_AND_MATHS}")
RAISED = {0x2070: ord("0"), 0x207B: 0x2212}
"""Superscripts that Liberation lacks -> the sign that is raised and made smaller in their place."""


def main(folder: Path) -> None:
    """Write all of them."""
    for source, (name, family) in FONTS.items():
        font = TTFont(folder / source, recalcTimestamp=False)
        for code, raised in RAISED.items():
            if code not in font.getBestCmap():
                _raise(font, code, raised)
        options = Options(flavor="woff2", hinting=False, layout_features=["kern"], name_IDs=[0, 1, 2, 4, 6, 13, 14])
        options.drop_tables += ["FFTM"]
        options.recalc_timestamp = False
        subsetter = Subsetter(options)
        subsetter.populate(unicodes=UNICODES)
        subsetter.subset(font)
        for record in font["name"].names:
            whole = f"{family} {font['name'].getDebugName(2)}"
            if record.nameID in (1, 4, 6):
                record.string = {1: family, 4: whole, 6: whole.replace(" ", "")}[record.nameID]
        font.flavor = "woff2"
        font.save(INTO / name)
        sys.stdout.write(f"{name}: {len(font.getBestCmap())} signs, {(INTO / name).stat().st_size} bytes\n")


def _raise(font: Any, code: int, raised: int) -> None:
    """Draw the superscript `code` from the sign `raised`, as large, high and wide as the superscript 4."""
    glyphs, known = font.getGlyphSet(), font.getBestCmap()
    small, large = (_compute_share_bounds(glyphs, known[one]) for one in (0x2074, ord("4")))
    scale = (small[3] - small[1]) / (large[3] - large[1])
    width, (left, _, right, _) = font["hmtx"][known[0x2074]][0], _compute_share_bounds(glyphs, known[raised])
    across = (width - scale * (left + right)) / 2
    pen = TTGlyphPen(None)
    glyphs[known[raised]].draw(TransformPen(pen, (scale, 0, 0, scale, across, small[1] - large[1] * scale)))
    name = f"uni{code:04X}"
    font["glyf"][name] = pen.glyph()
    font["hmtx"][name] = (width, round(across + scale * left))
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap[code] = name


def _compute_share_bounds(glyphs: Any, name: str) -> tuple[float, float, float, float]:
    pen = BoundsPen(glyphs)
    glyphs[name].draw(pen)
    return pen.bounds


if __name__ == "__main__":
    main(Path(sys.argv[1]))
