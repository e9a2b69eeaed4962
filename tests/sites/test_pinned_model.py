"""A model in a site's store that is not the one the run names, or that a record could break, costs nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.model.base_model import load_base, load_tokenizer
from fedtune.model.manifest import manifest_of
from fedtune.model.spec import ModelSpec
from fedtune.privacy.release import Reason
from fedtune.sites.shared_model import SharedModel
from fedtune.spec import ConfigError

from .conftest import letters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert = ModelSpec(path="random:bert")
    load_base(bert).save_pretrained(tmp_path / "bert")
    load_tokenizer(bert).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def at_site(folder: Path, station: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A site whose store holds `folder`, for a run that names it by the hash that it has now."""

    def make() -> Any:
        made = station(model={"path": str(folder), "sha256": manifest_of(folder).sha256})
        monkeypatch.setattr(made, "installed", lambda sha256: folder)
        made.restart()
        return made

    return make


def changed_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_another_file_in_the_store_is_refused_before_the_charge(at_site: Any, folder: Path, name: str) -> None:
    site = at_site()
    site.update()
    site.edit(ledger="another.db")
    site.restart()
    changed_json(folder / name, note="changed")
    site.refusal()
    assert site.ledger().history.runs == {}


@pytest.mark.parametrize("text", ["nothing of it", "a metastasis"])
def test_a_token_beyond_the_embedding_is_no_oracle(at_site: Any, folder: Path, text: str) -> None:
    """Before, the site failed where a record held the token, and answered where none did."""
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    changed_json(folder / "tokenizer.json", added_tokens=[*tokens, {"id": 400, "content": "metastasis", **flags}])
    site = at_site()
    site.data.write_text(f"body,kind\n{text},praise\n" * 20)
    assert site.refusal() is Reason.SITE_ERROR
    assert site.ledger().history.runs == {}


GIVES_UP = {"type": "Replace", "pattern": {"Regex": "JANE ROE(?:(?:|.)(?:|.)(?:|.)){30}(?!)"}, "content": "z"}
GROWS = {"type": "Replace", "pattern": {"String": "JANE ROE"}, "content": "X" * 1000}


@pytest.mark.parametrize("text", ["nothing of it", "JANE ROE was seen"])
@pytest.mark.parametrize(
    "part",
    [{"normalizer": GIVES_UP}, {"normalizer": GROWS}, {"pre_tokenizer": {"type": "FixedLength", "length": 0}}],
    ids=["gives up", "grows", "panics always"],
)
def test_a_tokenizer_that_breaks_over_a_word_is_no_oracle(
    at_site: Any, folder: Path, part: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the site's process ended where a record held the word, and answered where none did."""
    changed_json(folder / "tokenizer.json", **part)
    with monkeypatch.context() as lax:
        # A lead may name such a folder's hash, whatever its own fedtune says of it.
        lax.setattr("fedtune.model.manifest.check_content", lambda *args, **options: None)
        site = at_site()
    site.data.write_text(f"body,kind\n{text},praise\n" * 20)
    assert site.refusal() is Reason.SITE_ERROR
    assert site.ledger().history.runs == {}


def test_a_tokenizer_that_ends_no_text_is_refused_where_the_model_is_loaded(tmp_path: Path) -> None:
    """Before, each round was charged before its records could not be tokenised."""
    llama = ModelSpec(path="random:llama")
    load_base(llama, predicts_tokens=True).save_pretrained(tmp_path)
    load_tokenizer(llama).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del fields["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields | {"pad_token": "<s>"}))
    data = {"labels": (), "columns": {"prompt": "p", "completion": "c"}}
    config = letters(task="causal_lm", model={"path": str(tmp_path), "sha256": None}, data=data)
    with pytest.raises(ConfigError, match="its tokenizer must have an end-of-text token"):
        SharedModel(config)
