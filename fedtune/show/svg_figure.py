"""SVG figures for notebooks."""

from __future__ import annotations

from pathlib import Path

from fedtune.show.terminal_tables import write_file
from fedtune.spec import ConfigError


class SvgFigure:
    """An SVG figure that notebooks display and `save` writes to a file.

    Attributes:
        svg: the SVG markup, with escaped texts.
    """

    def __init__(self, svg: str) -> None:
        self.svg = str(svg)

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write the figure to an SVG file, and return its path.

        Raises:
            ValueError: the file name does not end in .svg, or the file cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() != ".svg":
            raise ConfigError("path", str(path), "must end in .svg")
        write_file(target, self.svg, option="path")
        return target
