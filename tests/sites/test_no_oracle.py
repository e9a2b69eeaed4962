"""Whatever settings and model a lead chooses, an answer must not depend on whether some record fits them."""

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fedtune.sites.real_site as real_site
from fedtune.data import tokenization
from fedtune.federation.protocol import Invitation
from fedtune.federation.site_round import answer_invitation
from fedtune.model.adapter import Adapter
from fedtune.model.base_model import load_base, load_tokenizer
from fedtune.model.manifest import build_manifest
from fedtune.model.spec import HeadSpec, ModelSpec
from fedtune.privacy.release import Offer, Reason
from fedtune.sites.shared_model import LoadedModel
from fedtune.sites.shared_settings import select_settings_for_sites
from fedtune.spec import ConfigError

from .conftest import make_letters, write_records

LABELS = [{"labels": ("invoice", "complaint")}, {"labels": ("never", "declared")}]


@pytest.mark.by_day("{'labels': ('never', 'declared')}", "{'max_length': 3}")
@pytest.mark.parametrize("data", [*LABELS, {"heldout_fraction": 0.999999}, {"max_length": 3}], ids=str)
def test_no_run_setting_makes_a_record_fail(data: dict[str, Any], station: Any) -> None:
    site = station(data=data)
    first = LoadedModel(select_settings_for_sites(site.config)).initial_adapter
    write_records(site.data, [("one letter", "praise"), ("", "praise"), ("two letters", ""), ("three", "unheard of")])
    site.update(adapter=first)
    write_records(site.data, [])
    site.update(round=2, adapter=first)  # nor does the next answer reveal such a record


WELL_FORMED = {
    "a text of 140,000 characters": "word " * 28_000,
    "one of 17 MiB": "x" * (17 << 20),
    "quotes and line ends": '"he said\r\n""hi",\n',
    "a NUL": "a\0b",
    "an unpaired surrogate": "a\ud800",
}


@pytest.mark.parametrize("text", WELL_FORMED.values(), ids=list(WELL_FORMED))
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_record_text_cannot_end_a_round(text: str, suffix: str, station: Any) -> None:
    site = station()
    path = site.data.with_suffix(suffix)
    site.edit(dataset={"path": path.name})
    rows = [("one letter", "praise"), (text, "praise"), ("another", "invoice")]
    if suffix == ".csv":
        write_records(path, rows)
    else:
        path.write_text("".join(json.dumps({"body": body, "kind": kind}) + "\n" for body, kind in rows))
    site.update()
    training = {record.fields["text"] for record in site.real._warm[1].records.training}
    assert {"one letter", "another"} <= training


@pytest.mark.parametrize("unread", ["9" * 5000, "[" * 100_000 + "]" * 100_000], ids=["a number", "a depth"])
def test_unread_column_contents_cannot_end_a_round(unread: str, station: Any) -> None:
    site = station()
    path = site.data.with_suffix(".jsonl")
    site.edit(dataset={"path": path.name})
    path.write_text(f'{{"body": "a letter", "kind": "praise", "other": {unread}}}\n')
    site.update()


@pytest.mark.nightly
def test_no_run_setting_makes_a_held_out_record_fail(station: Any) -> None:
    noised = {"metrics": "noised", "metrics_noise_multiplier": 50.0}
    site = station(data={"labels": ("invoice", "complaint"), "heldout_fraction": 0.5}, privacy=noised)
    write_records(site.data, [(f"letter {n}", "praise" if n % 2 else "invoice") for n in range(40)])
    assert site.update(adapter=LoadedModel(select_settings_for_sites(site.config)).initial_adapter).scores is not None


def test_records_are_opened_only_for_charged_rounds(station: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site, charged_then, read = station(), [], real_site.read_own_records

    def record_reads(*args: Any, **rest: Any) -> Any:
        charged_then.append(site.ledger().history.count_total_charges().total())
        return read(*args, **rest)

    monkeypatch.setattr(real_site, "read_own_records", record_reads)
    useless = Adapter({"another": next(iter(site.first.tensors.values()))})
    assert site.refusal(adapter=useless) is Reason.ADAPTER_SHAPE
    assert charged_then == []
    assert not list((site.folder / "runs").glob("*")), "nothing may be written for it"
    site.update()
    assert len(charged_then) == 1
    assert charged_then[0] > 0


def test_folder_of_records_is_not_listed_before_a_charge(station: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of an uncharged answer must not grow with the number of files."""
    site, listed = station(), list[Path]()
    (site.folder / "images/a").mkdir(parents=True)
    site.edit(dataset={"path": "images"})

    def note_listing(list_folder: Callable[[Any], Any], path: Any = ".") -> Any:
        listed.append(Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path))
        return list_folder(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(note_listing, getattr(os, name)))
    request = site.request()
    settings = json.dumps(select_settings_for_sites(site.config).to_json())
    invitation = Invitation(proposal=request.proposal, site="north", expires=1e12, nonce="ab" * 16)
    answer = answer_invitation(site.real.site(settings), invitation.sign_with(site.lead))
    assert isinstance(answer.body, Offer)
    assert site.refusal(adapter=Adapter({"another": next(iter(site.first.tensors.values()))})) is Reason.ADAPTER_SHAPE
    assert [path for path in listed if (site.folder / "images") in (path, *path.parents)] == []


def test_garbage_collector_does_not_scan_the_records(station: Any) -> None:
    """The time of a full collection, which a lead can cause without a charge, must not grow with the records."""
    site = station()
    write_records(site.data, [(f"letter {row}", "praise") for row in range(3000)])
    site.update()
    assert len(gc.get_objects()) < 3000


def test_removed_record_is_not_used_in_the_next_round(station: Any) -> None:
    site = station()
    site.update()
    write_records(site.data, [("the only one that stayed", "praise")])
    site.update(round=2)
    assert len(site.real._warm[1].records.training) == 1


def test_record_without_tokens_does_not_end_a_round(station: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tokenization.encode

    def encode(texts: Sequence[str], *args: Any, **options: Any) -> Iterator[list[int]]:
        for text, ids in zip(texts, original(texts, *args, **options), strict=True):
            yield [] if text == "\u200b" else ids

    monkeypatch.setattr(tokenization, "encode", encode)
    site = station()
    write_records(site.data, [("one letter", "praise"), ("\u200b", "praise"), ("another", "invoice")])
    site.update()
    assert list(map(len, site.real._warm[1].examples._dataset.input_ids)).count(1) == 1, "the text must have no tokens"


SPANNED, TAGGED = {"text": "text", "spans": "spans"}, {"tokens": "tokens", "tags": "tags"}
MARKED: dict[str, tuple[dict[str, str], dict[str, str | None]]] = {
    "a line of another space": (TAGGED, {"a.conll": "my B-drug\ncard O\n\n\u00a0\n\nlost O\n"}),
    "an offset of 5,000 digits": (SPANNED, {"a.pubtator": "1|t|my card\n1\t0\t" + "9" * 5000 + "\tmy\tdrug\n"}),
    "the same in brat": (SPANNED, {"a.txt": "my card", "a.ann": f"T1\tdrug 0 {'9' * 5000}\tmy\n"}),
    "a mark without its text": (SPANNED, {"a.ann": "T1\tdrug 0 2\tmy\n"}),
    "a text that is a link to itself": (SPANNED, {"a.txt": None, "a.ann": "T1\tdrug 0 2\tmy\n"}),
    "no text at all": (SPANNED, {}),
}


@pytest.mark.parametrize("case", MARKED)
def test_annotated_text_cannot_end_a_round(case: str, station: Any, tmp_path: Path) -> None:
    columns, files = MARKED[case]
    run: dict[str, Any] = {
        "task": "token_classification",
        "head": HeadSpec(scale=20.0, center=False, init="zero"),
        "data": {"columns": columns, "labels": ("drug", "dose")},
    }
    site = station(**run)
    folder = site.folder / "notes"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).symlink_to(folder / name) if text is None else (folder / name).write_text(text)
    (file_name,) = [name for name in files if name in ("a.conll", "a.pubtator")] or [""]
    site.edit(dataset={"path": f"notes/{file_name}", "columns": columns})
    site.update(adapter=LoadedModel(make_letters(**run)).initial_adapter)


# A stored model that is not the run's, or that a record could crash, must not cost any budget.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert = ModelSpec(path="random:bert")
    load_base(bert).save_pretrained(tmp_path / "bert")
    load_tokenizer(bert).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def site_with_model(folder: Path, station: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a site whose store holds `folder`, for a run that names it by its current hash."""

    def make() -> Any:
        new_site = station(model={"path": str(folder), "sha256": build_manifest(folder).sha256})
        monkeypatch.setattr(new_site, "installed", lambda sha256: folder)
        new_site.restart()
        return new_site

    return make


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_changed_model_file_is_refused_before_the_charge(site_with_model: Any, folder: Path, name: str) -> None:
    site = site_with_model()
    site.update()
    site.edit(ledger="another.db")
    site.restart()
    change_json(folder / name, note="changed")
    site.refusal()
    assert site.ledger().history.runs == {}


@pytest.mark.parametrize("text", ["nothing of it", "a metastasis"])
def test_token_beyond_the_embedding_reveals_nothing(site_with_model: Any, folder: Path, text: str) -> None:
    """Regression: the site failed if a record contained the token, and answered otherwise."""
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    change_json(folder / "tokenizer.json", added_tokens=[*tokens, {"id": 400, "content": "metastasis", **flags}])
    site = site_with_model()
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
def test_crashing_tokenizer_reveals_nothing(
    site_with_model: Any, folder: Path, part: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the site's process ended if a record contained the word, and answered otherwise."""
    change_json(folder / "tokenizer.json", **part)
    with monkeypatch.context() as lax:
        # A lead may name the hash of such a folder, even if its own fedtune refuses it.
        lax.setattr("fedtune.model.manifest.check_content", lambda *args, **options: None)
        site = site_with_model()
    site.data.write_text(f"body,kind\n{text},praise\n" * 20)
    assert site.refusal() is Reason.SITE_ERROR
    assert site.ledger().history.runs == {}


def test_tokenizer_without_an_end_token_is_refused_at_loading(tmp_path: Path) -> None:
    """Regression: each round was charged before its records could not be tokenized."""
    llama = ModelSpec(path="random:llama")
    load_base(llama, predicts_tokens=True).save_pretrained(tmp_path)
    load_tokenizer(llama).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del fields["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields | {"pad_token": "<s>"}))
    data = {"labels": (), "columns": {"prompt": "p", "completion": "c"}}
    config = make_letters(task="causal_lm", model={"path": str(tmp_path), "sha256": None}, data=data)
    with pytest.raises(ConfigError, match="its tokenizer must have an end-of-sequence token"):
        LoadedModel(config)
