"""The same parsers under coverage-guided fuzzing, by hand (docs/fuzzing.md); atheris is no dependency of fedtune.

    python -m tests.fuzz.atheris_drive "update" -max_total_time=120

The words after the target's name are libFuzzer's.  An input that breaks the property is written to ./crash-*.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

CORPUS = 200


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["fedtune"]):
        from . import file_targets, ledger_target, wire_targets
    targets = {one.name: one for one in (*wire_targets.TARGETS, *file_targets.TARGETS, *ledger_target.TARGETS)}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        raise SystemExit(f"name one of: {', '.join(targets)}")
    target, folder = targets[sys.argv[1]], Path(tempfile.mkdtemp(prefix="fedtune-corpus-"))
    logging.disable(logging.WARNING)

    def keep(data: bytes) -> None:
        (folder / f"{len(list(folder.iterdir())):04d}").write_bytes(data[: 1 << 16])

    limits = settings(
        max_examples=CORPUS,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    limits(given(target.broken())(keep))()
    atheris.Setup([sys.argv[0], "-timeout=60", "-rss_limit_mb=4096", *sys.argv[2:], str(folder)], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
