"""How many lines each room of the house has, beside what it may have: `python -m tests.weights` prints the table."""

import tomllib
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
BUDGETS = tomllib.loads((REPOSITORY / "tests" / "budgets.toml").read_text())
# Some parts lie where they were; they are weighed where they belong.
BELONGS = {"tracking.py": "export"}
GOLDEN = {".txt", ".json", ".html", ".svg", ".md", ".yaml", ".toml", ".csv", ".jsonl", ".ambr"}


class Weight(NamedTuple):
    """Lines of a room, and what it may have with what issues bring."""

    room: str
    lines: int
    most: int


def weights() -> list[Weight]:
    """Every room, and the sums: the core, all of fedtune/, its other text, tests, and their golden files."""
    lines: dict[str, int] = {}
    for path in (REPOSITORY / "fedtune").rglob("*.py"):
        name = path.relative_to(REPOSITORY / "fedtune").as_posix()
        room = BELONGS.get(name) or (name.partition("/")[0] if "/" in name else "root")
        lines[room] = lines.get(room, 0) + _lines(path)
    other = [path for path in _files("fedtune") if path.suffix not in {".py", ".woff2"}]
    sums = {
        "core": sum(count for room, count in lines.items() if room in BUDGETS["core"]),
        "all": sum(lines.values()),
        "other_text": sum(map(_lines, other)),
        "tests": sum(_lines(path) for path in _files("tests") if path.suffix == ".py"),
        "golden": sum(
            _lines(path)
            for path in _files("tests")
            if path.suffix in GOLDEN and not {"mutants", "budgets.toml"} & set(path.parts)
        ),
    }
    found = {**dict.fromkeys(BUDGETS["rooms"], 0), **lines, **sums}
    budgets, added = {**BUDGETS["rooms"], **BUDGETS["sums"]}, _added()
    return [Weight(room, count, budgets[room] + added.get(room, 0)) for room, count in found.items()]


def _added() -> dict[str, int]:
    """The lines that issues bring, by room: the core, all of fedtune/ and the tests grow with them."""
    rooms: dict[str, int] = {}
    for of_issue in BUDGETS["added"].values():
        for room, lines in of_issue.items():
            rooms[room] = rooms.get(room, 0) + lines
    every = sum(rooms.values())
    core = sum(lines for room, lines in rooms.items() if room in BUDGETS["core"])
    return {**rooms, "core": core, "all": every, "tests": every}


def _files(folder: str) -> list[Path]:
    hidden = {"__pycache__", ".cache"}
    return [p for p in (REPOSITORY / folder).rglob("*") if p.is_file() and not hidden & set(p.parts)]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


if __name__ == "__main__":
    for weight in weights():
        over = f"   over by {weight.lines - weight.most:,}" if weight.lines > weight.most else ""
        print(f"{weight.room:12} {weight.lines:7,} of {weight.most:7,}{over}")
