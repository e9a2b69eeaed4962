"""An earlier commit and this one, each checked out from git, so that neither is edited while they are compared."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TREE = Path(__file__).parents[2]


@contextmanager
def before_and_after(commit: str) -> Iterator[dict[str, Path]]:
    """Folders of the two, by the names "before" and "after"; they are removed at the end."""
    git = ["git", "-C", str(TREE), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        trees = {name: Path(folder) / name for name in ("before", "after")}
        try:
            for tree, checked_out in zip(trees.values(), (commit, "HEAD"), strict=True):
                subprocess.run([*git, "add", "--quiet", "--detach", str(tree), checked_out], check=True)
            yield trees
        finally:
            for tree in trees.values():
                subprocess.run([*git, "remove", "--force", str(tree)], check=False)
