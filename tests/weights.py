"""Code lines of each room and its budget: `python -m tests.weights` prints the table.

A code line is a line with a token of code. Docstrings, comments and blank lines are not counted, so that explaining
code is free.
"""

import ast
import io
import re
import subprocess
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
BUDGETS = tomllib.loads((REPOSITORY / "tests" / "budgets.toml").read_text())
GOLDEN = {".txt", ".json", ".html", ".svg", ".md", ".yaml", ".toml", ".csv", ".jsonl", ".ambr"}
BINARY = {".woff2", ".ttf"}
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_RECORD = re.compile(r"dataclass|\bspec\b|BaseModel|NamedTuple|TypedDict")


class Weight(NamedTuple):
    """The lines (or record classes) of a room, and its budget."""

    room: str
    lines: int
    most: int


def compute_weights() -> list[Weight]:
    """Compute the weight of every room with a budget, then the sums."""
    rooms: dict[str, int] = {}
    for path in _list_files("fedtune", ".py"):
        parts = path.relative_to(REPOSITORY / "fedtune").parts
        room = parts[0] if len(parts) > 1 else "root"
        rooms[room] = rooms.get(room, 0) + count_code_lines(path)
    sums = {
        "shell": sum(rooms.get(room, 0) for room in BUDGETS["shell"]),
        "all": sum(rooms.values()),
        "tests": sum(map(count_code_lines, _list_files("tests", ".py"))),
        "simulations": sum(map(count_code_lines, _list_files("simulations", ".py"))),
        "records": sum(map(_record_classes, _list_files("fedtune", ".py"))),
        "other_text": sum(map(_lines, [p for p in _list_files("fedtune") if p.suffix not in {".py", *BINARY}])),
        "golden": sum(map(_lines, [p for p in _list_files("tests", *GOLDEN) if "mutant" not in str(p)])),
    }
    budgets = _read_budgets()
    unknown = set(rooms) - set(budgets) - set(BUDGETS["shell"])
    assert not unknown, f"rooms without a budget: {unknown}"
    return [Weight(room, count, budgets[room]) for room, count in {**rooms, **sums}.items() if room in budgets]


def _read_budgets() -> dict[str, int]:
    """Read the budgets of rooms and sums, including the additions of the entries in `landed`."""
    budgets = {**BUDGETS["rooms"], **BUDGETS["sums"]}
    for entry in BUDGETS["landed"]:
        for room, lines in BUDGETS["added"][entry].items():
            if room == "simulations":
                budgets["simulations"] += lines
                continue
            budgets["shell" if room in BUDGETS["shell"] else room] += lines
            budgets["all"] += lines
            budgets["tests"] += int(1.1 * lines)
    return budgets


@cache
def _list_tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.splitlines() if (path := REPOSITORY / name).is_file()]


def _list_files(folder: str, *suffixes: str) -> list[Path]:
    """List tracked files below a folder of the repository, optionally by suffix."""
    root = REPOSITORY / folder
    return [p for p in _list_tracked() if root in p.parents and (not suffixes or p.suffix in suffixes)]


@cache
def count_code_lines(path: Path) -> int:
    source = path.read_text()
    docstrings: set[int] = set()
    count = 0
    for statement in _iter_statements(path):
        match statement:
            case ast.Expr(value=ast.Constant(value=str())):
                docstrings |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
                count += 1
    if source.count('"""') == 2 * count and "'''" not in source:
        # Only docstrings span several lines, so the file need not be tokenized, which is ten times slower.
        lines = enumerate(map(str.strip, source.split("\n")), 1)
        return len({at for at, line in lines if line and not line.startswith("#")} - docstrings)
    return len(_list_token_lines(source) - docstrings)


def _list_token_lines(source: str) -> set[int]:
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code


def _record_classes(path: Path) -> int:
    """List the dataclasses, specs, NamedTuples and TypedDicts that a file defines."""
    classes = [node for node in _iter_statements(path) if isinstance(node, ast.ClassDef)]
    return sum(bool(_RECORD.search(" ".join(map(ast.unparse, [*c.decorator_list, *c.bases])))) for c in classes)


def _iter_statements(path: Path) -> Iterator[ast.stmt]:
    """Yield every statement of a file; expressions, which are most of the nodes, are not visited."""
    blocks: list[ast.AST] = [ast.parse(path.read_text())]
    while blocks:
        block = blocks.pop()
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(block, name, None)
            for one in inner if isinstance(inner, list) else []:
                if isinstance(one, ast.stmt):
                    yield one
                blocks.append(one)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


if __name__ == "__main__":
    for weight in compute_weights():
        over = f"   over by {weight.lines - weight.most:,}" if weight.lines > weight.most else ""
        print(f"{weight.room:12} {weight.lines:7,} of {weight.most:7,}{over}")
