"""A model in a site's store that is not the one the run names, or that a record could break, costs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.model import ModelSpec, load_base, load_tokenizer
from fedtune.model.manifest import manifest_of
from fedtune.privacy.release import Reason, Update


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert = ModelSpec(path="random:bert")
    load_base(bert, task="classification").save_pretrained(tmp_path / "bert")
    load_tokenizer(bert).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def at_site(folder: Path, station: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A site whose store holds `folder`, for a run that names it by the hash that it has now."""

    def make() -> Any:
        made = station(model={"path": str(folder), "sha256": manifest_of(folder).sha256})
        monkeypatch.setattr(made, "installed", lambda sha256: folder)
        made.restart()
        return made

    return make


def changed_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_named_model_is_trained(at_site: Callable[[], Any]) -> None:
    assert isinstance(at_site().ask().body, Update)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_another_file_in_the_store_is_refused_before_the_charge(
    at_site: Callable[[], Any], folder: Path, name: str
) -> None:
    site = at_site()
    changed_json(folder / name, note="changed")
    site.refusal()
    assert site.ledger().history.runs == {}


@pytest.mark.parametrize("text", ["nothing of it", "a metastasis"])
def test_a_token_beyond_the_embedding_is_no_oracle(at_site: Callable[[], Any], folder: Path, text: str) -> None:
    """Before, the site failed where a record held the token, and answered where none did."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    fields["added_tokens"].append({"id": 400, "content": "metastasis", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    site = at_site()
    site.data.write_text(f"body,kind\n{text},praise\n" * 20)
    assert site.refusal() is Reason.SITE_ERROR
    assert site.ledger().history.runs == {}
