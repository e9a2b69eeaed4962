"""Tables of test cases, stored in the `cases.yaml` of each room."""

from pathlib import Path
from typing import Any

import yaml


def read_cases(test_file: str, name: str) -> Any:
    """Read the table of this name from the `cases.yaml` in the test file's folder."""
    return yaml.safe_load(Path(test_file).with_name("cases.yaml").read_text(encoding="utf-8"))[name]
