"""Names from the field's vocabulary, each with a single meaning."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import fedtune

ROOT = Path(__file__).parents[1]
TEXTS = {".py", ".md", ".toml", ".yaml", ".j2", ".ipynb"}
FOLDERS = ("conf", "docs", "fedtune", "tests")


def test_retired_names_do_not_reappear() -> None:
    table = tomllib.loads((ROOT / "tests/names.toml").read_text())
    old = {name for names in table.values() for name in names}
    word = re.compile(rf"(?<!\w)(?:{'|'.join(sorted(old))})(?!\w)")
    assert all(word.search(f"config.{name}") for name in old)
    assert not word.search("straggler_grace_s")
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in TEXTS]
    # German texts contain the capitalized "Organisation", which the table does not retire.
    retired = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in paths
        if path.name != "names.toml"
        for match in word.finditer(path.read_text(encoding="utf-8"))
    }
    assert not retired


def test_class_names_are_unique() -> None:
    files = defaultdict(set)
    for path in Path(fedtune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                files[node.name].add(path.name)
    assert {name: sorted(paths) for name, paths in files.items() if len(paths) > 1} == {}
