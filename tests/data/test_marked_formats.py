"""Annotation formats: each format gives the same record, and each invalid file gives one message."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.formats import detect_format, fingerprint_files, iter_raw_rows, list_data_files
from fedtune.data.load import read_lead_records
from fedtune.data.records import Record, iter_records, validate_rows
from fedtune.data.text_rows import MAX_BYTES
from fedtune.spec import DataError
from fedtune.tasks.registry import get_task
from fedtune.tasks.token_classification import make_entity_reader

from .conftest import make_data_spec

TEXT = "Aspirin cures 😀 colds, not asthma"
FOUND = (("Aspirin", "drug"), ("colds", "disease"), ("asthma", "disease"))
PLACES = [(TEXT.index(word), TEXT.index(word) + len(word), label) for word, label in FOUND]
IN_UNITS = [(PLACES[0][0], PLACES[0][1], "drug"), *((first + 1, end + 1, label) for first, end, label in PLACES[1:])]
TOKENS = ["Aspirin", "cures", "😀", "colds", ",", "not", "asthma"]
SPANNED, TAGGED = {"text": "text", "spans": "spans"}, {"tokens": "tokens", "tags": "tags"}


def list_span_objects(
    start: str, end: str, label: str, places: list[tuple[int, int, str]] = PLACES
) -> list[dict[str, Any]]:
    labels = [place[2] if label == "label" else [place[2]] for place in places]
    return [{start: place[0], end: place[1], label: name} for place, name in zip(places, labels, strict=True)]


def write_conll(*tags: str, columns: str = "", comma: str = " ") -> str:
    return "".join(f"{token}{comma}{columns}{tag}\n" for token, tag in zip(TOKENS, tags, strict=True))


def count_tokens_from(*tags: str) -> str:
    """Return numbered tokens, in which 1-2 and 3.1 have no token of their own."""
    lines = [f"{place}\t{word}\tN\t{tag}\t_\n" for place, (word, tag) in enumerate(zip(TOKENS, tags, strict=True), 1)]
    return "".join([lines[0].replace("1", "1-2", 1), *lines[:3], lines[0].replace("1", "3.1", 1), *lines[3:]])


BIO = ("B-drug", "O", "O", "B-disease", "O", "O", "B-disease")
BILOU = ("U-drug", "O", "O", "U-disease", "O", "O", "U-disease")
STUDIO = list_span_objects("start", "end", "labels", IN_UNITS)
RESULT = [{"type": "labels", "value": one} for one in STUDIO] + [{"type": "choices", "value": {"choices": ["x"]}}]
RELATED = {"text": TEXT, "entities": list_span_objects("start_offset", "end_offset", "label")}
STUDIO_TASK = {"id": 1, "data": {"text": TEXT}, "annotations": [{"result": RESULT}]}
STUDIO_MIN = {"text": TEXT, "label": STUDIO}
CELL = json.dumps(PLACES).replace('"', '""')
PUBTATOR = "7|t|Aspirin cures 😀\n7|a|colds, not asthma\n" + "".join(
    f"7\t{first}\t{end}\t{TEXT[first:end]}\t{label}\tD1\n" for first, end, label in PLACES
)


def make_bioc_document(*marks: tuple[int, int, str], sentences: bool = False, **other: Any) -> dict[str, Any]:
    """Make a document with two passages that are separated by two characters."""
    annotations = [
        {
            "id": str(first),
            "infons": {"type": label, "identifier": "D1"},
            "text": TEXT[first:end],
            "locations": [{"offset": first + 2 * (first > 15) + 100, "length": end - first}],
        }
        for first, end, label in marks
    ]
    parts = [
        {"offset": 100, "text": TEXT[:15], "annotations": annotations[:1]},
        {"offset": 118, "text": TEXT[16:], "annotations": annotations[1:]},
    ]
    if sentences:
        parts = [{"offset": 100, "infons": {}, "text": "", "annotations": [], "sentences": parts}]
    return {"id": "7", "infons": {}, "passages": parts, "relations": []} | other


def make_bioc_collection(*documents: dict[str, Any], name: str = "documents") -> str:
    return json.dumps({"source": "s", "infons": {"a": "[x"}, name: documents, "version": "1"}, indent=1)


FORMATS: dict[str, tuple[str, str, dict[str, str]]] = {
    "Prodigy": ("a.jsonl", json.dumps({"text": TEXT, "spans": list_span_objects("start", "end", "label")}), SPANNED),
    "doccano": ("a.jsonl", json.dumps({"text": TEXT, "label": PLACES}), {"text": "text", "spans": "label"}),
    "doccano with relations": ("a.jsonl", json.dumps(RELATED), {"text": "text", "spans": "entities"}),
    "Label Studio": ("a.json", json.dumps([STUDIO_TASK]), {"text": "data", "spans": "annotations"}),
    "Label Studio, JSON_MIN": ("a.json", json.dumps([STUDIO_MIN]), {"text": "text", "spans": "label"}),
    "spans in a cell": ("a.tsv", f'text\tspans\n{TEXT}\t"{CELL}"\n', SPANNED),
    "lists": ("a.jsonl", json.dumps({"tokens": TOKENS, "tags": BIO}), TAGGED),
    "lists in cells": ("a.tsv", f"tokens\ttags\n{TOKENS}\t{[*BILOU]}\n", TAGGED),
    "CoNLL": ("a.conll", "\n\n" + write_conll(*BIO) + "\n", TAGGED),
    "CoNLL of four columns": (
        "a.bio",
        f"-DOCSTART- -X- O O\n\n# a note\n{write_conll(*BIO, columns='NN B-NP ')}",
        TAGGED,
    ),
    "CoNLL-U": ("a.conll", "# global.columns = ID\n" + count_tokens_from(*BIO), TAGGED),
    "CoNLL with the tag first": ("a.bio", "".join(f"{tag} 0 3 {TOKENS[n]}\n" for n, tag in enumerate(BIO)), TAGGED),
    "CoNLL with a score": ("a.bio", "".join(f"{TOKENS[n]} {tag} 0.5\n" for n, tag in enumerate(BIO)), TAGGED),
    "CoNLL of a number first": ("a.bio", "".join(f"{n} {tag} {TOKENS[n]}\n" for n, tag in enumerate(BIO)), TAGGED),
    "CoNLL in tabs": ("a.iob", write_conll(*BILOU, columns="NN\t", comma="\t").replace("\n", "\r\n"), TAGGED),
    "BioC": ("a.bioc", make_bioc_collection(make_bioc_document(*PLACES)), SPANNED),
    "BioC of PubTator's server": (
        "a.biocjson",
        make_bioc_collection(make_bioc_document(*PLACES), name="PubTator3"),
        SPANNED,
    ),
    "BioC by sentences": ("a.bioc", make_bioc_collection(make_bioc_document(*PLACES, sentences=True)), SPANNED),
    "PubTator": ("a.pubtator", PUBTATOR + "7\tCID\tD1\tD2\n\n", SPANNED),
}


def find_spans(record: Record) -> list[tuple[str, str]]:
    layout = SPANNED if "text" in record.fields else TAGGED
    labels = ("disease", "drug")
    text, entities = make_entity_reader(make_data_spec(columns=layout, labels=labels))(record)
    return [(text[first:end], labels[label]) for first, end, label in entities]


@pytest.mark.parametrize("name", FORMATS)
def test_all_annotation_formats_are_parsed_to_the_same_record(tmp_path: Path, name: str) -> None:
    file, text, columns = FORMATS[name]
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    (record,) = iter_records(tmp_path / file, columns)
    assert find_spans(record) == [*FOUND]


PIECES = (
    *(bytes([one]) for one in b"a \t\nO#\x0c\xff\r\0"),
    *(b"B-x", b"-DOCSTART-", b"\xc2\xa0", b"\xe2\x80\xa8"),
    *(b"1|t|", b"1|a|", b"1\t0\t1\ta\tx\n", b"1\t" + b"9" * 5000 + b"\t1\ta\tx", b"\xd9\xa1", b"\xef\xbb\xbf"),
    *(b"T1\tx 0 1\ta\n", b"T1\tx 0 1;2 3\ta\n", b"T1\tx 0 " + b"9" * 5000 + b"\ta\n", b"R1\t", b"\n\xc2\xa0\n"),
)
"""Messages for invalid documents."""


def write_brat(folder: Path, text: str = TEXT, marked: str | None = None, *, name: str = "a") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text)
    lines = [f"T{n}\t{label} {first} {end}\t{TEXT[first:end]}\n" for n, (first, end, label) in enumerate(PLACES, 1)]
    (folder / f"{name}.ann").write_text("".join(lines) + "R1\tcures Arg1:T1 Arg2:T2\n" if marked is None else marked)
    return folder


def test_brat_folder_yields_one_record_per_text(tmp_path: Path) -> None:
    folder = write_brat(tmp_path / "notes")
    before = fingerprint_files(folder)
    write_brat(folder, "no\nmark", "", name="b")
    first, second = iter_records(folder, SPANNED)
    assert find_spans(first) == [*FOUND]
    assert second.fields == {"text": "no\nmark", "spans": "[]"}
    assert detect_format(folder) == "brat"
    assert [file.name for file in list_data_files(folder)] == ["a.txt", "a.ann", "b.txt", "b.ann"]
    for path in (folder / "b.txt", folder / "b.ann", folder / "a.txt"):
        path.unlink()
    assert len(fingerprint_files(folder)) == 2
    assert fingerprint_files(folder) != before
    (folder / "a.txt").symlink_to(folder / "a.txt")
    assert [type(row) for _, row in iter_raw_rows(folder)] == [DataError]
    assert len(fingerprint_files(folder)) == 2
    for file in folder.iterdir():
        file.unlink()
    assert (detect_format(folder), fingerprint_files(folder), [*iter_raw_rows(folder)]) == ("brat", [], [])
    (folder / "state.json").write_text("{}")
    assert detect_format(folder) == "folder"


def list_sentence_tokens(path: Path, text: str) -> list[tuple[int, Any]]:
    """Return the line and the tokens of each sentence."""
    path.write_text(text)
    return [(line, dict(row)["tokens"]) for line, row in iter_raw_rows(path) if not isinstance(row, DataError)]


def test_conll_sentences_are_separated_only_by_blank_lines(tmp_path: Path) -> None:
    found = list_sentence_tokens(tmp_path / "a.conll", "a O\n\n\n b B-x\nc O\n \nd O\n# O\n")
    assert found == [(1, ["a"]), (4, ["b", "c"]), (7, ["d", "#"])], "tokens must start on their own lines"
    sentences = {
        "#5 B-drug\nb O\n": ["#5", "b"],
        "# newdoc\n# text = a b\na O\nb O\n": ["a", "b"],
        "# text = blood group O\na X O\n": ["a"],
        "# O\n": ["#"],
        "10\u00a0mg B-dose\n": ["10\u00a0mg"],
        "# sent\nNew York\tB-place\n#\tO\n": ["New York", "#"],
    }
    found = list_sentence_tokens(tmp_path / "b.conll", "\n".join([*sentences, "# newdoc\n"]))
    assert [tokens for _, tokens in found] == [*sentences.values()]


def test_unreadable_document_yields_one_error_among_valid_documents(tmp_path: Path) -> None:
    whole, long = b"a O\n\n", b"x" * MAX_BYTES + b" O\n"
    (tmp_path / "a.conll").write_bytes(whole + b"secret\n\n" + whole + b"\xff O\n\n" + long + b"b O\n\n" + whole)
    rows = [*iter_raw_rows(tmp_path / "a.conll")]
    assert [line for line, _ in rows] == [1, 3, 5, 7, 9, 12]
    faults = [str(row.value) for _, row in rows if isinstance(row, DataError)]
    assert faults == [
        "a line with a single column",
        "byte 0xff at position 1 of the record",
        f"more than {MAX_BYTES} bytes",
    ]
    first, other = (
        make_bioc_document(*PLACES),
        [make_bioc_document(*PLACES) | {"passages": one} for one in ([{"text": "no offset"}], [3], "x", 7)],
    )
    (tmp_path / "a.bioc").write_text(make_bioc_collection(first, *other, first))
    assert [type(row) for _, row in iter_raw_rows(tmp_path / "a.bioc")] == [dict, *[DataError] * 4, dict]
    (tmp_path / "b.bioc").write_text(make_bioc_collection(first, first)[:-80])
    found = [type(row) for _, row in iter_raw_rows(tmp_path / "b.bioc", lenient=True)]
    assert found == [dict, DataError], "a real site must keep valid documents"


@pytest.mark.parametrize("suffix", ["conll", "pubtator", "brat"])
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=14).map(b"".join))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_damaged_document_does_not_affect_its_neighbors(suffix: str, junk: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder)
        if suffix == "brat":
            for name in "ac":
                write_brat(path, name=name)
            (path / "b.ann").write_bytes(junk)
            (path / "b.txt").write_bytes(junk[:5])
        else:
            path /= f"a.{suffix}"
            whole = write_conll(*BIO) if suffix == "conll" else PUBTATOR
            path.write_bytes(f"{whole}\n".encode() + junk + f"\n\n{whole}".encode())
        columns = TAGGED if suffix == "conll" else SPANNED
        first, *_, last = [row for _, row in validate_rows(path, columns) if isinstance(row, Record)]
    assert find_spans(first) == find_spans(last) == [*FOUND]


def test_unannotated_text_differs_from_text_without_entities(tmp_path: Path) -> None:
    skipped = {"was_cancelled": True, "result": []}
    finished = {"was_cancelled": False, "result": RESULT}
    cases = ([], [skipped], [skipped, finished], [{"result": []}], [finished, skipped])
    tasks = [{"data": {"text": TEXT}, "annotations": annotations, "predictions": []} for annotations in cases]
    (tmp_path / "a.json").write_text(json.dumps(tasks))
    rows = [row for _, row in validate_rows(tmp_path / "a.json", {"text": "data", "spans": "annotations"})]
    spans = [str(r.value) if isinstance(r, DataError) else find_spans(r) for r in rows]
    assert spans == ["null", "skipped", [*FOUND], [], [*FOUND]]


CARD = '[{"text": "my card", "spans": [%s]}]'
BEYOND = {"start": 0, "end": 8, "labels": ["drug"]}
TWO_LABELS = {"start": 0, "end": 2, "labels": ["drug", "disease"]}
SPLIT = '"locations": [{"offset": 0, "length": 1}, '
WHOLE, MOVED = (
    make_bioc_collection(make_bioc_document(*PLACES)),
    make_bioc_collection(make_bioc_document((1, 8, "drug"))).replace("101", "102"),
)
# Invalid tags and spans of a record: tests/tasks/test_token_classification.py.
INVALID: dict[str, tuple[str, str, dict[str, str], str]] = {
    "numbers for tags": ("a.jsonl", '{"tokens": ["my"], "tags": [3]}', TAGGED, "must be tag names"),
    "no tags": ("a.jsonl", '{"tokens": ["my"]}', TAGGED, "is missing (role tags)"),
    "a label that nobody declared": ("a.conll", "my B-other\n", TAGGED, "must be one of the 2 labels in data.labels"),
    "no tags in columns": ("a.conll", "1\tmy\tDET\t_\n2\tcard\tN\t_\n", TAGGED, "must have tags such as B-PER"),
    "one column": ("a.conll", "my\ncard\n", TAGGED, "must have a token and its tag on each line"),
    "another encoding": ("a.conll", "caf\udce9 O\n", TAGGED, "must be UTF-8 text"),
    "units beyond the text": ("a.json", CARD % json.dumps(BEYOND), SPANNED, "must have 0 <= start < end"),
    "two labels of a span": ("a.json", CARD % json.dumps(TWO_LABELS), SPANNED, "and a text label"),
    "no passages": ("a.bioc", make_bioc_collection({"id": "1"}), SPANNED, "must have passages with offset and text"),
    "a mark in several parts": ("a.bioc", WHOLE.replace('"locations": [', SPLIT), SPANNED, "contiguous annotations"),
    "another offset": ("a.bioc", MOVED, SPANNED, "must have offsets"),
    "no documents": ("a.bioc", '{"source": "card"}', SPANNED, "must be an object with an array of documents"),
    "documents that break off": ("a.bioc", WHOLE[:900], SPANNED, "it is truncated"),
    "two collections": ("a.bioc", 2 * WHOLE, SPANNED, "must be one array of objects"),
    "half a line of PubTator": (
        "a.pubtator",
        "7|t|my card\nstray\n",
        SPANNED,
        "must start with id|t| or id|a|, or be a span",
    ),
    "no title": ("a.pubtator", "7\t0\t2\tmy\tdrug\n", SPANNED, "must have a line id|t|"),
    "offsets in bytes": ("a.pubtator", "7|t|né card\n7\t4\t8\tcard\tdrug\n", SPANNED, "must have offsets"),
}


def read_refusal(path: Path, columns: dict[str, str]) -> str:
    """Return the lead's error message about one of its own files."""
    fault = get_task("token_classification").record_validator(
        make_data_spec(columns=columns, labels=("drug", "disease"))
    )
    with pytest.raises(DataError) as caught:
        read_lead_records(str(path), columns=columns, key="data.train_file", fault=fault)
    return str(caught.value)


@pytest.mark.parametrize("name", INVALID)
def test_invalid_annotation_file_raises_one_error(tmp_path: Path, name: str) -> None:
    file, text, columns, bound = INVALID[name]
    (tmp_path / file).write_bytes(text.encode(errors="surrogateescape"))
    message = read_refusal(tmp_path / file, columns)
    assert bound in message
    assert not any(word in message for word in ("card", "stray", "B-other"))


def test_invalid_brat_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    for marked, bound in (
        ("T1\tdrug 0 3;5 7\tmy rd\n", "must be one contiguous part of the text"),
        ("T1 drug 0 2 my\n", "must be one contiguous part of the text"),
        ("T1\tdrug 3 7\tcord\n", "must have offsets in characters and the exact text"),
    ):
        assert bound in read_refusal(write_brat(folder, "my card", marked), SPANNED)
    (folder / "a.txt").unlink()
    assert "with its text in a .txt file of the same name" in read_refusal(folder, SPANNED)
