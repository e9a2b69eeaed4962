"""Atomic creation of several output files, without overwriting existing files."""

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from fedtune.show import new_files as new_files_module
from fedtune.show.new_files import write_new_files
from fedtune.spec import ConfigError


def test_new_files_are_created_together(tmp_path: Path) -> None:
    first, second = paths = [tmp_path / "new" / name for name in ("a", "b")]
    with write_new_files(*(("--to", path) for path in paths), mode=0o600) as texts:
        assert not any(path.exists() for path in paths)
        texts |= {first: "one", second: "zwölf"}
    assert {path: path.read_text() for path in (tmp_path / "new").iterdir()} == {first: "one", second: "zwölf"}
    assert first.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "fault", ["the work fails", "a full disk", "another came", "another came late", "another came last", "one twice"]
)
def test_failed_write_leaves_no_new_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    first, second = tmp_path / "a", tmp_path / "link" / ("a" if fault == "one twice" else "b")
    full = Mock(side_effect=[None, OSError(errno.ENOSPC, "No space left on device")])

    def write_and_fail() -> None:
        with write_new_files(("--to", first), ("--to", second)) as texts:
            texts |= {first: "text", second: "text"}
            if fault == "a full disk":
                monkeypatch.setattr(os, "fsync", full)
            elif fault == "another came late":
                monkeypatch.setattr(new_files_module, "fsync_folder", lambda folder: second.write_text("another's"))
            elif fault == "another came last":  # when all have been looked for
                monkeypatch.setattr(os.path, "lexists", lambda path: second.write_text("another's") and False)
            elif fault == "another came":
                second.write_text("another's")
            else:
                assert fault == "the work fails", "known before it"
                raise KeyboardInterrupt

    with pytest.raises((ConfigError, KeyboardInterrupt)):
        write_and_fail()
    remaining = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert remaining == ({"b": "another's"} if "another" in fault else {})
