"""Writes the JSON schema of reports, fedtune/report/schema/report-2.json, from its types; `--check` compares it.

Raise `SCHEMA_VERSION` where readers of older reports would break.
"""

import sys
from pathlib import Path

from fedtune.report.model import schema_text

FILE = Path(__file__).parents[1] / "fedtune" / "report" / "schema" / "report-2.json"

if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if FILE.read_text() == schema_text() else f"{FILE} is out of date: run {sys.argv[0]}")
    FILE.write_text(schema_text())
