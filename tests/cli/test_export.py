"""Output and errors of `fedtune export`; the exported files are tested in tests/export."""

import json
from pathlib import Path

from ..conftest import run_command
from . import snapshots


def test_export_writes_the_adapter_with_card_and_tokenizer(run_folder: Path, tmp_path: Path) -> None:
    report = json.loads(run_command("export", str(run_folder), "--to", str(tmp_path / "new" / "out"), "--json").printed)
    assert (report["format"], report["folder"]) == ("peft", str(tmp_path / "new" / "out"))
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert set(report["files"]) == names
    adapter = {path.name for path in (run_folder / "adapter").iterdir()}
    assert names == adapter | {"labels.txt", "tokenizer.json", "tokenizer_config.json"}
    for name in adapter - {"README.md"}:
        assert (tmp_path / "new" / "out" / name).read_bytes() == (run_folder / "adapter" / name).read_bytes()
    out = run_command("export", str(run_folder), "--to", str(tmp_path / "out")).printed
    assert "as peft" in out
    assert "adapter_model.safetensors" in out


@snapshots.parametrize_mistakes("mistakes-export")
def test_unsupported_export_is_refused_without_creating_files(finished_run: Path, tmp_path: Path, typed: str) -> None:
    words = typed.replace("RUN", str(finished_run)).split()
    message = run_command("export", str(finished_run), "--to", str(tmp_path / "new"), *words).failed()
    snapshots.check_message("mistakes-export", typed, message.replace(str(finished_run), "RUN"))
    assert not (tmp_path / "new").exists()
