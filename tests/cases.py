"""Tables of cases that lie beside the tests of a room, in its `cases.yaml`."""

from pathlib import Path
from typing import Any

import yaml


def read_cases(test_file: str, name: str) -> Any:
    """The table of this name beside a test's file."""
    return yaml.safe_load(Path(test_file).with_name("cases.yaml").read_text(encoding="utf-8"))[name]
