"""A data file's bytes, cut into rows before any is read: where a row ends does not go by whether it can be read."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import cast

from fedtune.spec import DataError

MOST_BYTES = 1 << 24
"""Of a record: far above any that a model reads."""
_BLOCK_BYTES = 1 << 20
"""Read at once: a few kilobytes of gzip can hold a line that fills the memory."""
_PIECES = re.compile(rb"[^\n]*\n|[^\n]+")
"""The lines of a block, or what it has of them."""
_BEGINS, _WITHIN, _QUOTED, _CLOSED = b",", b"x", b',"', b',""'
"""Where a row of CSV stands: at a cell's beginning, in one without quotes, in a quoted one, behind a quote in that."""


def cut_rows(path: Path, state_after: Callable[[bytes, bytes], bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(first line, bytes) of each record; None for the bytes of one that is too long, of which no more is kept.

    Args:
        path: the file.
        state_after: `line_state` or `csv_state`: the state before a piece of the file to the one behind it.

    Raises:
        DataError: the file cannot be opened, or is no whole gzip file.
    """
    first, line, size, state = 1, 1, 0, _BEGINS
    kept = bytearray()
    for block in _blocks(path):
        # A block without a quote, within a quoted cell, is one piece: a cell may have millions of lines.
        for piece in [block] if state == _QUOTED and b'"' not in block else _PIECES.findall(block):
            state, size = state_after(piece, state), size + len(piece)
            if size <= MOST_BYTES:
                kept += piece
            else:
                kept.clear()
            line += piece.count(b"\n")
            if piece.endswith(b"\n") and state != _QUOTED:
                yield first, bytes(kept) if size <= MOST_BYTES else None
                first, size, state = line, 0, _BEGINS
                kept.clear()
    if size:
        yield first, bytes(kept) if size <= MOST_BYTES else None


def line_state(piece: bytes, before: bytes) -> bytes:
    """The state of a file whose rows are its lines."""
    return _BEGINS


def csv_state(piece: bytes, before: bytes) -> bytes:
    """Where in a row of CSV `piece` ends: each state is the shortest text that leads there from a row's beginning.

    A quote opens a cell only at its beginning, and a doubled one does not close it, as the csv module reads them.
    """
    text, place = before + piece, 0
    while (place := text.find(b',"', place) + 2) > 1:
        closed = False
        while not closed:
            place = text.find(b'"', place) + 1
            if not place:
                return _QUOTED
            if place == len(text):
                return _CLOSED
            closed = text[place : place + 1] != b'"'
            place += not closed
    return _BEGINS if text.endswith(b",") else _WITHIN


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, some at a time; without a byte order mark."""
    line = 1
    try:
        with _open(path) as stream:
            block = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8) or stream.read1(_BLOCK_BYTES)
            while block:
                yield block
                line += block.count(b"\n")
                block = stream.read1(_BLOCK_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(at_line(path, line), str(error), "must be a whole gzip file") from None
    except OSError as error:
        raise DataError(str(path), error.strerror, "must be a file that can be read") from None


def _open(path: Path) -> BufferedReader:
    return cast(BufferedReader, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def at_line(file: Path | str, line: int) -> str:
    """A place in a file, as messages name it."""
    return f"{file}:{line}"
