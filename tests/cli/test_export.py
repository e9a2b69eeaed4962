"""`fedtune export`: what a person is told; what it writes is in tests/export."""

import json
from pathlib import Path
from typing import Any

import pytest


def test_the_adapter_goes_out_with_its_card_and_tokenizer(finished: Path, command: Any, tmp_path: Path) -> None:
    report = json.loads(command("export", str(finished), "--to", str(tmp_path / "new" / "out"), "--json").printed)
    assert (report["format"], report["folder"]) == ("peft", str(tmp_path / "new" / "out"))
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert set(report["files"]) == names
    adapter = {path.name for path in (finished / "adapter").iterdir()}
    assert names == adapter | {"labels.txt", "tokenizer.json", "tokenizer_config.json"}
    for name in adapter - {"README.md"}:
        assert (tmp_path / "new" / "out" / name).read_bytes() == (finished / "adapter" / name).read_bytes()
    out = command("export", str(finished), "--to", str(tmp_path / "out")).printed
    assert "as peft" in out
    assert "adapter_model.safetensors" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "{taken}"], "--to = '{taken}': must be a new folder; there is something of that name"),
        (
            ["--merge", "--format", "onnx"],
            "--merge = 'onnx': and --format exclude each other: --merge is a format of its own",
        ),
        (
            ["--format", "merged"],
            "--format = 'merged': must be one of peft, sentence-transformers, onnx for task classification",
        ),
        (["--int8"], "--int8: goes with --format onnx of a model with a base, whose matrices it makes small"),
        (["--to", "{taken}/adapter/out"], "--to = '{taken}/adapter/out': must lie outside the run's adapter folder"),
    ],
)
def test_what_cannot_be_is_said(finished: Path, command: Any, tmp_path: Path, words: list[str], message: str) -> None:
    places = {"taken": str(finished), "new": str(tmp_path / "new")}
    asked = (word.format(**places) for word in words)
    assert command("export", str(finished), "--to", places["new"], *asked).failed() == message.format(**places)
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_not_finished_is_refused(finished: Path, command: Any, tmp_path: Path) -> None:
    message = command("export", str(finished.parent), "--to", str(tmp_path / "new")).failed()
    assert message.startswith(f"run folder = '{finished.parent}': must hold a config.yaml; ")
