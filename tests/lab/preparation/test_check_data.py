"""Findings in an experiment's files, which never contain a record's text."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import RunConfig
from fedtune.data.bad_rows import SkippedRows
from fedtune.data.load import partition_training_files
from fedtune.lab.preparation import check_data
from fedtune.lab.preparation.check_data import Checked, check
from fedtune.model.base_model import load_tokenizer
from fedtune.privacy.site_policy import Dataset, Policy, Population
from fedtune.sites.shared_settings import derive_settings_for_own_site
from fedtune.spec import ConfigError, DataError
from fedtune.tasks.registry import get_task

from ...data.conftest import build_chat

Tickets = Callable[..., RunConfig]
LONG = "Dear all the printer on the third floor has been broken since Monday and nobody came to mend it"


def check_config(config: RunConfig) -> Checked:
    return check(config, load_tokenizer(config.model))


def summarize_findings(checks: Checked, file: int = 0) -> list[str]:
    """Return kind, subtype, column and lines of each finding."""
    findings = []
    for finding in checks.files[file].findings:
        lines = (str(line) if like is None else f"{line}={like}" for line, like in finding.lines)
        findings.append(" ".join(filter(None, (finding.kind, finding.what, finding.column, *lines))))
    return findings


def compose_over_rows(folder: Path, rows: Sequence[Mapping[str, Any]], *overrides: str) -> RunConfig:
    """Compose an experiment on these rows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return compose_run([f"data.train_file='{folder / 'rows.jsonl'}'", "data.declared_sizes=10", "name=x", *overrides])


def test_data_check_counts_all_errors_and_lists_the_first(tickets: Tickets) -> None:
    rows = ["fine,sales", ",sales", "a,b,c", "text,strange", *[" ,billing"] * 30]
    (file,) = check_config(tickets(*rows)).files
    assert (file.rows, sum(file.uses.values()), len(file.errors)) == (34, 1, check_data.SHOWN)
    assert [(key.rpartition(":")[2], problem) for key, problem, _ in file.errors[:3]] == [
        ("3, column 'body'", "blank"),
        ("4", "3 cells"),
        ("5, label", "not declared"),
    ]
    assert list(file.num_errors.values()) == [31, 1, 1]


def test_rows_sharing_a_line_are_numbered_separately(tickets: Tickets, tmp_path: Path) -> None:
    rows = [{"body": text, "team": "sales"} for text in ("a", " ", "b", "a")]
    (tmp_path / "one_line.json").write_text(json.dumps(rows))
    config = tickets("a,sales")
    checks = check_config(replace(config, data=replace(config.data, train_file=str(tmp_path / "one_line.json"))))
    assert (checks.files[0].places, summarize_findings(checks)) == ("rows", ["same 4=1"])
    assert checks.files[0].errors[0][0].startswith("row 2 (")


@pytest.mark.parametrize(
    ("first", "end", "way"),
    [
        *((8, 13, None), (8, 12, "(ends seem inclusive)"), (12, 17, "(bytes seem to be counted)")),
        *((9, 14, "(units of UTF-16 seem to be counted)"), (15, 16, "")),
    ],
)
def test_span_offsets_are_checked_against_word_boundaries(
    tmp_path: Path, first: int, end: int, way: str | None
) -> None:
    rows = [{"text": f"naïve 😀 cards are lost {number}", "spans": [[first, end, "x"]]} for number in range(3)]
    columns = ("experiment=own_entities", "data.labels=[x]", "data.columns={text: text, spans: spans}")
    findings = summarize_findings(check_config(compose_over_rows(tmp_path, rows, *columns, "model=random_bert")))
    expected = [] if way is None else [f"torn {way} 1 2 3".replace("  ", " ")]
    assert [line for line in findings if "torn" in line] == expected


def test_unreadable_file_is_reported_in_one_message(tickets: Tickets) -> None:
    config = tickets("a,sales")
    with pytest.raises(DataError, match=r"data.train_file = .*no such file"):
        check_config(replace(config, data=replace(config.data, train_file="gone.csv")))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((f"{LONG},sales", "short,sales", "short,billing", "short,sales"), ["contradiction 4=3", "same 5=3"]),
        ((f"{LONG},sales", f"{LONG} now,sales"), ["alike 3=2"]),
        ((*["word,sales"] * 2, f"{'word ' * 40},sales"), ["cut 4", "same 3=2"]),
        (
            ("to a@b.example.org and c@d.example.org,sales", "F\u00c3\u00bcr alle,sales"),
            ["personal e-mail body 2", "damage mojibake (UTF-8 read as Windows-1252) body 3"],
        ),
        (
            ('"takes,sales', "these,sales", 'along",sales', "<|im_end|> said,billing"),
            ["damage what looks like rows in a cell body 2", "damage marks of a chat template body 5"],
        ),
    ],
)
def test_duplicates_contradictions_and_near_duplicates_are_reported(
    tickets: Tickets, rows: tuple[str, ...], expected: list[str]
) -> None:
    assert summarize_findings(check_config(tickets(*rows, overrides=("data.max_length=110",)))) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes " * 100, ["cut 1", "lost 1"]),
        ("my card is 4111111111111111", ["personal card number messages 1"]),
    ],
)
def test_truncated_and_sensitive_chats_are_reported(tmp_path: Path, answer: str, expected: list[str]) -> None:
    writes = ("experiment=own_text", "model=random_llama", "data.chat_template=plain", "data.max_length=60")
    config = compose_over_rows(
        tmp_path, [{"messages": build_chat("hi", answer)}], *writes, "data.columns={messages: messages}"
    )
    assert summarize_findings(check_config(config)) == expected


def test_test_records_in_the_training_data_are_reported(tickets: Tickets, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(f"body,team\n{LONG} now,sales\nother,sales\nknown,billing\n")
    checks = check_config(
        tickets(f"{LONG},sales", "known,billing", overrides=(f"data.test_file='{tmp_path / 'test.csv'}'",))
    )
    assert summarize_findings(checks, file=1) == ["overlap train 4=3", "near_overlap train 2=2"]


def test_lengths_are_measured_before_truncation(tickets: Tickets) -> None:
    (file,) = check_config(
        tickets(*["word,sales"] * 9, f"{'word ' * 40},sales", overrides=("data.max_length=8",))
    ).files
    assert file.lengths is not None
    assert file.lengths.longest > 40
    assert [count for *_, count in file.lengths.bins if count] == [9, 1]
    assert file.lengths.median == file.lengths.most_of_them < 10


def test_duplicate_and_contradictory_pairs_are_reported(tmp_path: Path) -> None:
    pairs = ["a hotel, an inn, 4", "a car, a bus, 2", "an inn, a bus, 9", "a house, a hut, 3", "a car, an inn, 1"]
    rows = [{"a": one, "b": other, "s": int(score)} for one, other, score in (pair.split(", ") for pair in pairs)]
    scored = ("experiment=own_pairs", "model=random_bert", "data.target_range=[0,5]", "federation.num_sites=2")
    scored += ("data.columns={text: a, other: b, target: s}",)
    some = check_config(compose_over_rows(tmp_path, rows, *scored))
    ((key, what, bound),) = some.files[0].errors
    assert (key.endswith(":3, target"), what) == (True, "outside the range")
    assert bound == "must be in data.target_range: 0 to 5"
    assert summarize_findings(some) == ["shared (one is in 2) 5=1"]
    again = check_config(compose_over_rows(tmp_path, [*rows, rows[0], rows[3] | {"s": 5}], *scored))
    assert {"same 6=1", "contradiction 7=4"} < set(summarize_findings(again)), "the same texts with another score"


def test_invalid_spans_are_counted_without_quoting_text(tmp_path: Path) -> None:
    texts = {
        "my secret card": [[3, 9, "card"], [8, 14, "card"]],
        "a secret": [[2, 90, "card"]],
        "one secret": [[4, 10, "secret"]],
        "where is my card": [[9, 16, "card"], [0, 5, "place"]],
        "take abcd": [[5, 7, "card"], [7, 9, "place"]],
    }
    rows = [{"text": text, "spans": spans} for text, spans in texts.items()]
    marked = ("experiment=own_entities", "data.columns={text: text, spans: spans}", "data.labels=[card,place]")
    checks = check_config(compose_over_rows(tmp_path, rows, *marked, "model=random_bert"))
    (found,) = checks.files
    assert "hidden 5" in summarize_findings(checks), "of two parts in one word one is learned"
    assert [one[1] for one in found.errors] == ["spans that overlap", "a span outside the text", "not declared"]
    assert sum(found.num_errors.values()) == 3
    assert "secret" not in repr(found)
    assert found.labels == {"card": 2, "place": 2}


def test_inconsistent_tags_and_truncated_words_are_reported(tmp_path: Path) -> None:
    tags = [["B-x", "I-x"], ["O", "I-x"], ["B-y", "I-x"], ["B-x", "L-x", "L-x"], ["U-x", "B-x", "E-x"], ["x", "x"]]
    rows = [{"tokens": ["a"] * len(one), "tags": one} for one in tags]
    rows.append({"tokens": ["a"] * 20, "tags": ["O"] * 20})
    tagged = (
        "experiment=own_entities",
        "data.labels=[x,y]",
        "model=random_bert",
        "data.max_length=20",
        "data.stride=4",
    )

    def list_found(windows: int) -> list[str]:
        config = compose_over_rows(tmp_path, rows, *tagged, f"data.windows={windows}")
        return [one for one in summarize_findings(check_config(config)) if one.startswith(("scheme", "cut", "lost"))]

    assert list_found(1) == ["cut 7", "lost 7", "scheme 2 3 4"]
    assert list_found(3) == ["scheme 2 3 4"], "windows have room for all"


def test_reported_sizes_match_the_simulation(tickets: Tickets) -> None:
    rows = [f"text {number},{'billing' if number % 3 else 'sales'}" for number in range(200)]
    shares = ("data.test_fraction=0.2", "data.train_fraction=0.9", "data.heldout_fraction=0.1")
    config = tickets(*rows, overrides=(*shares, "federation.num_sites=3"))
    columns = get_task(config.task).columns(config.data, partition=True)
    dealt = partition_training_files(config.data, columns, config.federation.names, seed=config.seed)
    checks = check_config(config)
    assert [finding["true"] for finding in checks.sizes.values()] == [len(site.training) for site in dealt.sites]
    sites = {"train": sum(len(site.training) for site in dealt.sites)}
    sites |= {"held out": sum(len(site.heldout) for site in dealt.sites), "test": len(dealt.test)}
    assert checks.files[0].uses == {**sites, "unused": 200 - sum(sites.values())}
    assert all(checks.files[0].uses.values())
    assert {finding["declared"] for finding in checks.sizes.values()} == {10}


def test_reported_sizes_count_users_at_user_level(tmp_path: Path) -> None:
    rows = [{"body": f"post {number}", "who": f"u{number % 7}"} for number in range(50)]
    settings = ("privacy.unit=user", "data.columns={text: body, user: who}", "federation.num_sites=2")
    config = compose_over_rows(tmp_path, rows, "experiment=own_text", "model=random_llama", *settings)
    assert sum(finding["true"] for finding in check_config(config).sizes.values()) == 7


def test_findings_contain_no_record_text(tickets: Tickets) -> None:
    rows = ["Xyzzy,sales", "Xyzzy a@xyzzy.org,sales", "Xyzzy,Xyzzy", "Xyzzy,b,c"]
    rows += ["Xyzzy\u200b,billing", '"Xyzzy"x,sales']
    assert "xyzzy" not in json.dumps(asdict(check_config(tickets(*rows)))).lower()


def test_undeclared_site_is_an_error_without_quotation(tickets: Tickets) -> None:
    overrides = ("data.columns={text: body, label: team, site: body}", "data.partition.kind=column")
    overrides += ("data.partition.sites={north: 0, south: 1}",)
    checks = check_config(tickets("north,sales", "south,sales", "Xyzzy,sales", overrides=overrides))
    assert [problem for _, problem, _ in checks.files[0].errors] == ["another site"]
    assert [finding["true"] for finding in checks.sizes.values()] == [1, 1]


def test_real_site_file_is_checked_with_policy_settings(tickets: Tickets, tmp_path: Path, site_policy: Any) -> None:
    config = tickets("a,sales", overrides=("data.test_fraction=0.2", "data.dataset=letters"))
    (tmp_path / "own.csv").write_text("words,kind\none,sales\ntwo,billing\n")
    columns = {"text": "words", "label": "kind", "user": "who"}
    dataset = Dataset(id="letters", declared_size=500, path="own.csv", columns=columns)
    policy: Policy = replace(site_policy("north"), dataset=(dataset,), population=Population(name="letters"))
    checks = check_config(derive_settings_for_own_site(config, policy, folder=tmp_path))
    assert checks.sizes == {"north": {"declared": 500, "true": 2}}
    assert [file.uses for file in checks.files] == [{"train": 2}]
    strange = replace(config, data=replace(config.data, dataset="others"))
    with pytest.raises(ConfigError, match=r"data.dataset = 'others': must be a data set of the site's policy"):
        derive_settings_for_own_site(strange, policy, folder=tmp_path)


def test_fault_reasons_are_counted_and_label_variants_detected(tickets: Tickets) -> None:
    rows = [f"text {number},billing" for number in range(60)]
    shares = ("data.test_fraction=0.3", "data.validation_fraction=0.3")
    config = tickets(*rows, "a,Billing", "b,SALES", "c,sales ", "d,other", ",sales", overrides=shares)
    (file,) = check_config(config).files
    assert list(file.uses) == ["train", "validation", "test"]
    assert file.spelt_otherwise == {"billing": 1, "sales": 1}
    left_out = SkippedRows(rows=file.rows, reasons=file.num_errors)
    assert str(left_out).startswith("4 of 65 rows (6.2 %) cannot be used: 3 must be one of the 2 labels in data.labels")
    assert not left_out.exceeds_threshold
