"""How many lines each room of the house has, beside what it may have: `python -m tests.weights` prints the table."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
BUDGETS = tomllib.loads((REPOSITORY / "tests" / "budgets.toml").read_text())
# Some parts lie where they were; they are weighed where they belong.
BELONGS = {"tracking.py": "export"}
GOLDEN = {".txt", ".json", ".html", ".svg", ".md", ".yaml", ".toml", ".csv", ".jsonl", ".ambr"}


class Weight(NamedTuple):
    """Lines of a room, what it may have, and the ceiling of one that is over its budget yet."""

    room: str
    lines: int
    budget: int
    ceiling: int | None

    @property
    def most(self) -> int:
        return self.budget if self.ceiling is None else self.ceiling


def weights() -> list[Weight]:
    """Every room, and the sums: the core, all of fedtune/, its other text, tests, and their golden files."""
    lines: dict[str, int] = {}
    for path in (REPOSITORY / "fedtune").rglob("*.py"):
        room = _room(path.relative_to(REPOSITORY / "fedtune").as_posix())
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
    budgets = {**BUDGETS["rooms"], **BUDGETS["sums"]}
    return [Weight(room, count, budgets[room], BUDGETS["ceilings"].get(room)) for room, count in found.items()]


def _room(name: str) -> str:
    folder, _, _ = name.rpartition("/")
    for part, room in BELONGS.items():
        if name == part or folder == part or folder.startswith(f"{part}/"):
            return room
    return name.partition("/")[0] if "/" in name else "root"


def _files(folder: str) -> list[Path]:
    hidden = {"__pycache__", ".cache"}
    return [p for p in (REPOSITORY / folder).rglob("*") if p.is_file() and not hidden & set(p.parts)]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


if __name__ == "__main__":
    for weight in weights():
        over = f"   over by {weight.lines - weight.budget:,}" if weight.lines > weight.budget else ""
        print(f"{weight.room:12} {weight.lines:7,} of {weight.budget:7,}{over}")
