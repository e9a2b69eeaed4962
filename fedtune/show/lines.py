"""Text formatting for the terminal: line wrapping, removal of control characters, and shortened names."""

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
    """Wrap a text at word boundaries with a hanging indent.

    Paths, keys and hashes are never broken, so that they can be copied.  Commands are continued with a backslash for
    the same reason.
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


def replace_control_characters(text: str) -> str:
    """Replace control characters in untrusted text, which a terminal would execute."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def to_printable(text: object, most: int = 200) -> str:
    """Shorten untrusted text to a single line of at most `most` characters, without control characters."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in str(text)[: most + 1])
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def duration(seconds: float) -> str:
    """Format a duration rounded up to the precision of an estimate: `0.4 s`, `12 s`, `3 min`, `5.0 h`."""
    if seconds < 10:
        return f"{max(seconds, 0.1):.1f} s"
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shorten_middle(text: str, most: int = 32) -> str:
    """Shorten a long name in the middle to at most `most` characters."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def format_power_of_ten(exponent: int) -> str:
    """Format a power of ten with superscript digits, such as 10⁻⁵."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"
