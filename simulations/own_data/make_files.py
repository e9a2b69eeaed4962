"""Cut the small classifications of problems.toml from the files of simulations/data, by a hash of each text.

python simulations/own_data/make_files.py                  into `files` beside this script
python simulations/own_data/make_files.py --sst2 FOLDER    also those of SST-2, whose files are not in the repository
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE.parent / "data"


def rows(file: Path, problem: dict[str, Any]) -> list[dict[str, str]]:
    """Rows with one of the labels, ordered by a hash of their text."""
    labels = problem["labels"]
    names = dict(zip(problem.get("values", labels), labels, strict=True))
    column = problem.get("column", "label")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    if column == "priceRange":
        prices = [re.search(r"priceRange\[(.*?)\]", row["mr"]) for row in found]
        found = [{"text": row["ref"], column: one[1]} for row, one in zip(found, prices, strict=True) if one]
    by_text = {row["text"]: names[row[column]] for row in found if row[column] in names}
    order = sorted(by_text, key=lambda text: sha256(text.encode()).digest())
    return [{"text": text, "label": by_text[text]} for text in order]


def write(folder: Path, problem: dict[str, Any], source: Path) -> None:
    """Write the sites' file, and the file that is scored."""
    found, needed = rows(source / problem["train"], problem), problem["sites"] * problem["size"]
    scored = rows(source / problem["test"], problem) if "test" in problem else found[needed:]
    parts = {"train": found[:needed], "test": scored[: problem.get("test_rows", 600)]}
    assert len(parts["train"]) == needed, f"{folder.name}: {len(found)} rows"
    assert len(parts["test"]) >= 50, f"{folder.name}: {len(scored)} rows to score"
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sst2", type=Path, help="folder with SST-2's train.jsonl.gz and dev.jsonl.gz")
    sst2 = options.parse_args().sst2
    for key, problem in tomllib.loads((HERE / "problems.toml").read_text()).items():
        if not problem["train"].startswith("sst2/"):
            write(HERE / "files" / key, problem, DATA)
        elif sst2 is not None:
            write(HERE / "files" / key, problem, sst2.absolute().parent)


if __name__ == "__main__":
    main()
