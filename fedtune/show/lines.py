"""Format text for the terminal: fit lines to its width, strip control sequences, and shorten long names."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_COPIED = re.compile(r"/|[0-9a-f]{32,}")
_FRONT = re.compile(r" *(?:\d+\. |- )?")
_TO_TYPE = re.compile(r"(^ *|^.*: )(fedtune \w(?:(?![.;] ).)*[^.;])$")
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\S)+""")


def wrap_text(text: str, *, width: int) -> list[str]:
    """Wrap a text at word boundaries, with a hanging indent.

    Paths, keys and hashes are never broken, whatever the width, because they are copied.  A command continues after a
    backslash, so that the copied text is the same command.
    """
    lines: list[str] = []
    for part in text.split("\n"):
        typed = _TO_TYPE.match(part) if len(part) > width else None
        front, command = typed.groups() if typed else (part, "")
        indent = re.sub(".", " ", _FRONT.findall(front)[0])
        if front.strip() or not command:
            breaks = any(len(word) > width and not _COPIED.search(word) for word in front.split())
            lines += textwrap.wrap(
                front,
                max(1, width),
                subsequent_indent=indent,
                break_long_words=breaks and not _COPIED.search(front),
                break_on_hyphens=breaks,
            ) or [""]
        if command:
            lines += _wrap_command(command, indent=indent + "  " * bool(front.strip()), width=width)
    return lines


def _wrap_command(command: str, *, indent: str, width: int) -> Iterator[str]:
    line = ""
    for word in _WORD.findall(command):
        if line and len(indent) + len(line) + len(word) + 3 > width:
            yield f"{indent}{line} \\"
            line = f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    yield indent + line


def strip_control(text: str) -> str:
    """Replace control characters, which could steer a terminal: names and texts may come from others."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def to_printable(text: object, most: int = 200) -> str:
    """Shorten an external text to one line of at most `most` characters, with control characters replaced."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in str(text)[: most + 1])
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min`, `5.0 h`: rounded up, as exactly as an estimate is."""
    if seconds < 10:
        return f"{max(seconds, 0.1):.1f} s"
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shorten_middle(text: str, most: int) -> str:
    """A long name, cut in its middle."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def format_power_of_ten(exponent: int) -> str:
    """10⁻⁵ and the like."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"
