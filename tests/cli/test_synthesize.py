"""`fedtune synthesize` and `fedtune choose`: records by code or votes, their card, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from fedtune.api import door
from fedtune.api.compose import compose_run
from fedtune.data.load import deal
from fedtune.report.synthetic_card import together
from fedtune.runs.saved_model import SavedModel
from fedtune.sites import run_records
from fedtune.studies.synthetic import allotted, as_written, ballot, chosen, weights_of

TABLES = "simulations/data/e2e_nlg/train.jsonl.gz"


@pytest.fixture(scope="module")
def runs(simulate: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model (`writer`), and a run of votes on two of its codes (`shares`)."""
    into = tmp_path_factory.mktemp("runs")
    short = ("data.max_length=64", "federation.num_rounds=1", "training.learning_rate=0.2")
    model = ("model=random_llama", "data=e2e_nlg", "task=causal_lm", "data.declared_sizes=40")
    simulate(*model, *short, into=into, name="writer")
    (into / "codes.jsonl").write_text('{"mr": "a red one"}\n{"mr": "a blue one"}\n{"mr": "a blue one"}\n')
    votes = ("experiment=votes", "model=random_bert", "data.columns={text: mr}", f"data.train_file={TABLES}")
    simulate(*votes, "data.labels=[a blue one, a red one]", into=into, name="shares")
    head = into / "shares" / "adapter" / "head.safetensors"
    save_file(load_file(head) | {"weight": np.array([[3.0, 1.0]], dtype=np.float32)}, head)
    return into


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model writes broken bytes, so texts are given: of five, one does not end and one is broken."""

    def drawn(
        self: SavedModel, prompts: Any, spec: Any, *, first: int, against: Any
    ) -> Iterator[tuple[int, str | None]]:
        assert all(len(prompt) for prompt in prompts)
        codes = {prompt.tobytes() for prompt in prompts}
        assert len(against) == (len(prompts) if spec.guidance and (first or len(codes) > 1) else 0)
        assert not any(np.array_equal(*pair) for pair in zip(prompts, against, strict=False)), "one of another code"
        for place in range(len(prompts)):
            number = first + place
            kind = {3: None, 4: "\N{REPLACEMENT CHARACTER}"}
            yield place, kind.get(number % 5, f"seed {spec.seed} number {number}")

    monkeypatch.setattr(SavedModel, "drawn", drawn)


def written(command: Any, runs: Path, to: Path, *options: str, codes: bool = True) -> list[dict[str, str]]:
    named = ("--codes", str(runs / "codes.jsonl")) if codes else ()
    assert command("synthesize", str(runs / "writer"), "--to", str(to), *named, *options).printed
    return [json.loads(line) for line in to.read_text().splitlines()]


def test_one_code_alone_has_none_to_be_set_apart_from(runs: Path, command: Any, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"mr": "a red one"}\n')
    named = ("--codes", str(tmp_path / "one.jsonl"), "--rows", "3")
    assert len(written(command, runs, tmp_path / "texts.jsonl", *named, codes=False)) == 3


def test_codes_have_their_declared_shares_and_a_card(runs: Path, command: Any, tmp_path: Path) -> None:
    to = tmp_path / "texts.jsonl"
    public = tmp_path / "public.jsonl"
    public.write_text('{"mr": "a green one", "ref": "said of it"}\n' * 2)
    rows = written(command, runs, to, "--rows", "9", "--beside", str(public))
    assert Counter(row["mr"] for row in rows) == {"a red one": 3, "a blue one": 6}
    assert len({row["ref"] for row in rows}) == 9
    card = json.loads((tmp_path / "texts.jsonl.card.json").read_text())
    run = door.load(runs / "writer")
    assert card["runs"][0]["epsilon"] == run.privacy.epsilon == card["together"]["epsilon"]
    assert card["made"]["left_out"] == {"not ended": 2, "broken": 2}
    assert card["made"]["rows"] == card["figures"]["these records"]["texts"] == 9
    text, beside = (tmp_path / "texts.jsonl.card.md").read_text(), card["figures"]["public.jsonl"]["texts"]
    assert beside == 2
    assert "no more about a unit than the promises below allow.**" in text
    assert f"| texts | 9 | {beside} |" in text


def test_votes_are_shares(runs: Path, command: Any, tmp_path: Path) -> None:
    to = tmp_path / "texts.jsonl"
    rows = written(command, runs, to, "--rows", "8", "--votes", str(runs / "shares"), codes=False)
    assert Counter(row["mr"] for row in rows) == {"a blue one": 6, "a red one": 2}
    card = json.loads((tmp_path / "texts.jsonl.card.json").read_text())
    both = [door.load(runs / name).privacy for name in ("writer", "shares")]
    assert card["together"]["epsilon"] == pytest.approx(sum(one.epsilon or 0.0 for one in both))
    assert card["together"]["delta"] == pytest.approx(sum(one.delta for one in both))
    assert "which are epsilon" in (tmp_path / "texts.jsonl.card.md").read_text()


def test_candidates_are_chosen_by_their_votes(runs: Path, command: Any, simulate: Any, tmp_path: Path) -> None:
    ballot, to, best = tmp_path / "ballot.yaml", tmp_path / "texts.jsonl", tmp_path / "best.jsonl"
    voted = ("--votes", str(runs / "shares"))
    rows = written(command, runs, to, "--rows", "4", "--ballot", str(ballot), "--seed", "7", *voted, codes=False)
    settings = yaml.safe_load(ballot.read_text())
    assert settings["head"]["label_texts"] == [row["ref"] for row in rows]
    folder = simulate(f"experiment={ballot}", "model=random_bert", into=tmp_path, name="liked")
    head = folder / "adapter" / "head.safetensors"
    save_file(load_file(head) | {"weight": np.array([[0.1, 0.4, -0.2, 0.3]], dtype=np.float32)}, head)
    choose = ("choose", str(runs / "writer"), "--votes", str(folder), "--candidates")
    public = tmp_path / "public.jsonl"
    public.write_text('{"mr": "a green one", "ref": "said of it"}\n')
    said = command(*choose, str(to), "--rows", "2", "--to", str(best), "--beside", str(public), "--json").printed
    assert [json.loads(line) for line in best.read_text().splitlines()] == [rows[1], rows[3]]
    text = (tmp_path / "best.jsonl.card.md").read_text()
    assert "from 4 candidates" in text
    assert "- shares (votes), by the candidates' card: epsilon" in text
    assert "their shares are the noisy votes of shares |" in text
    card = json.loads((tmp_path / "best.jsonl.card.json").read_text())
    behind = (runs / "writer", folder, runs / "shares")
    assert card["together"]["epsilon"] == pytest.approx(sum(door.load(one).privacy.epsilon or 0.0 for one in behind))
    assert json.loads(said) == card
    made = {key: card["made"][key] for key in ("seed", "shares", "candidates", "rows", "missing")}
    assert made == {"seed": 7, "shares": "voted", "candidates": 4, "rows": 2, "missing": 0}
    assert card["figures"]["public.jsonl"]["texts"] == 1
    again = command(*choose, str(best), "--rows", "1", "--to", str(tmp_path / "one.jsonl"))
    assert "card" in again.out, again.err
    behind_it = json.loads((tmp_path / "one.jsonl.card.json").read_text())
    assert [one["run"] for one in behind_it["runs"]] == ["writer", "liked", "liked", "shares"]
    twice = door.load(folder).privacy.epsilon or 0.0
    assert behind_it["together"]["epsilon"] == pytest.approx(card["together"]["epsilon"] + twice)
    refused = (*choose, str(to), "--to", str(tmp_path / "no"))
    for options, said in (
        (("--rows", "5"), "--rows = 5: must be at most the 4 candidates on a ballot"),
        (("--rows", "0"), "--rows = 0: must be a finite number of at least 1"),
        (("--rows", "2", "--to", str(best)), "must be a new file"),
        (("--rows", "2", "--votes", str(runs / "shares")), "must have all texts as candidates; 4 are none"),
        (("--rows", "2", "--beside", TABLES), "one of it and data.train_file has all texts of the other"),
        (("--rows", "2", "--candidates", str(public)), "must be as fedtune synthesize or choose wrote it"),
    ):
        assert said in command(*refused, *options).failed()
        assert not (tmp_path / "no").exists()
    to.write_text(to.read_text().replace("seed 7", "private text"))
    message = command(*refused, "--rows", "2").failed()
    assert "must be as fedtune synthesize or choose wrote it with this RUN, with its card beside it" in message
    assert "private text" not in message


def test_a_classifier_labels_records_and_its_epsilon_adds_up(
    runs: Path, command: Any, simulate: Any, tmp_path: Path
) -> None:
    to, best = tmp_path / "texts.jsonl", tmp_path / "labelled.jsonl"
    rows = written(command, runs, to, "--rows", "6")
    old = tmp_path / "texts.jsonl.card.json"  # which need not name what is empty in it
    old.write_text("".join(line for line in old.read_text().splitlines(True) if not line.endswith(" null,\n")))
    folder = simulate(into=tmp_path, name="kinds")
    choose = ("choose", str(runs / "writer"), "--candidates", str(to), "--labels")
    card = json.loads(command(*choose, str(folder), "--to", str(best), "--json").printed)
    classifier, found = door.load(folder), [json.loads(line) for line in best.read_text().splitlines()]
    answers: Any = classifier.predict([row["ref"] for row in rows])
    assert found == [{**row, "label": answer[0]["label"]} for row, answer in zip(rows, answers, strict=True)]
    both = [door.load(one).privacy.epsilon or 0.0 for one in (runs / "writer", folder)]
    assert card["together"]["epsilon"] == pytest.approx(sum(both))
    assert (card["made"]["labelled_by"], card["made"]["codes"], card["made"]["missing"]) == ("kinds", 2, 0)
    assert "in column label, by what the classifier kinds says" in (tmp_path / "labelled.jsonl.card.md").read_text()
    for options, said in (
        ((), "--votes = null: must be given, or --labels"),
        (("--votes", str(runs / "shares")), "--rows = null: must be given with --votes"),
        (("--labels", str(folder), "--rows", "2"), "--rows = 2: must be given with --votes, and only there"),
        (("--labels", str(runs / "shares")), "must be a run whose records have a text and"),
    ):
        outcome = command(*choose[:-1], "--to", str(tmp_path / "no"), *options)
        assert (outcome.code, (tmp_path / "no").exists()) == (2, False), options
        assert said in outcome.err
    known = {"label_column": "label", "labelled_by": "kinds"}
    assert command(*choose[:3], str(best), "--labels", str(folder), "--to", str(tmp_path / "again")).printed
    assert known.items() <= json.loads((tmp_path / "again.card.json").read_text())["made"].items()
    assert (tmp_path / "again").read_text() == best.read_text()


@pytest.mark.parametrize("words", [("synthesize",), ("choose", "--candidates", "any", "--rows", "2")])
def test_votes_of_another_unit_are_refused(
    words: tuple[str, ...], runs: Path, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = door.load

    def of_users(folder: Path) -> door.Run:
        run = load(folder)
        data = replace(run.config.data, columns={**run.config.data.columns, "user": "who"})
        return replace(run, config=replace(run.config, data=data, privacy=replace(run.config.privacy, unit="user")))

    monkeypatch.setattr(door, "load", of_users)  # which only --votes calls by this name
    named = ("--votes", str(runs / "shares"), "--to", str(tmp_path / "no"))
    message = command(words[0], str(runs / "writer"), *words[1:], *named).failed()
    assert "must be of privacy.unit=record, as RUN is" in message


def test_the_runs_own_records_are_read_once(
    runs: Path, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt = []
    monkeypatch.setattr(run_records, "deal", lambda *given, **named: dealt.append(given) or deal(*given, **named))
    (tmp_path / "public.jsonl").write_text('{"mr": "a green one", "ref": "said of it"}\n')
    written(command, runs, tmp_path / "texts.jsonl", "--rows", "3", "--beside", str(tmp_path / "public.jsonl"))
    assert len(dealt) == 1


def test_what_breaks_the_format_is_drawn_again_and_then_missing(runs: Path, command: Any, tmp_path: Path) -> None:
    to = tmp_path / "texts.jsonl"
    rows = written(command, runs, to, "--rows", "12", "--pattern", ".* number 1?2")
    card = json.loads((tmp_path / "texts.jsonl.card.json").read_text())["made"]
    assert [row["ref"] for row in rows] == ["seed 0 number 2", "seed 0 number 12"]
    assert card["missing"] == 10
    assert card["left_out"]["pattern"] > 20
    none = ("--rows", "2", "--pattern", "nothing is so", "--to", str(tmp_path / "none"))
    message = command("synthesize", str(runs / "writer"), "--codes", str(runs / "codes.jsonl"), *none).failed()
    assert "gave none that keeps the format: 6 pattern" in message
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--codes = null: must be given"),
        (("--codes", "CODES", "--beside", TABLES), "one of it and data.train_file has all texts of the other"),
        (("--codes", "CODES", "--ballot", "TO"), "must be a new file"),
        (("--codes", TABLES), "must be a public list: all prompts of data.train_file stand in it"),
        (("--codes", "CODES", "--votes", "WRITER"), "must be a run of task votes, not of causal_lm"),
        (("--codes", "CODES", "--rows", "10000000000"), "--rows = 10000000000: must be at most 100000"),
        (("--codes", "CODES", "--rows", "0"), "--rows = 0: must be a finite number of at least 1"),
        (("--codes", "CODES", "--pattern", "("), "must be a regular expression"),
    ],
)
def test_what_is_refused(runs: Path, command: Any, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    places = {"CODES": str(runs / "codes.jsonl"), "WRITER": str(runs / "writer"), "TO": str(tmp_path / "texts.jsonl")}
    to = tmp_path / "texts.jsonl"
    given = (places.get(option, option) for option in options)
    assert said in command("synthesize", str(runs / "writer"), "--to", str(to), *given).failed()
    assert not to.exists()


def test_an_adapter_private_to_a_site_writes_nothing(runs: Path, command: Any, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(runs / "writer", own)
    settings = own / "adapter" / "fedtune.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"private_to": "site-1"}))
    options = ("--codes", str(runs / "codes.jsonl"), "--to", str(tmp_path / "texts.jsonl"))
    assert "is private to" in command("synthesize", str(own), *options).failed()


def test_shares_are_whole_numbers_that_add_up() -> None:
    assert allotted({("a",): 1.0, ("b",): 1.0, ("c",): 1.0}, 8) == {("a",): 3, ("b",): 3, ("c",): 2}
    assert sum(allotted({(str(n),): 0.3 * n for n in range(1, 40)}, 1000).values()) == 1000


def test_votes_that_noise_left_none_of_give_no_shares(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "shares", tmp_path / "shares")
    head = tmp_path / "shares" / "adapter" / "head.safetensors"
    save_file(load_file(head) | {"weight": np.array([[-1.0, 0.0]], dtype=np.float32)}, head)
    with pytest.raises(ValueError, match="noise left none above 0"):
        weights_of(door.load(tmp_path / "shares"))


def test_candidates_of_one_text_have_the_votes_of_both(runs: Path) -> None:
    run = door.load(runs / "shares")
    head = replace(run.config.head, label_texts=("same", "same"))
    assert weights_of(replace(run, config=replace(run.config, head=head))) == {"same": 1.0}


def test_a_ballot_has_the_unit_and_what_it_cannot_hold_is_not_chosen(runs: Path, tmp_path: Path) -> None:
    run, file = door.load(runs / "writer"), tmp_path / "ballot.yaml"
    by_user = replace(run.config.data, columns={**run.config.data.columns, "user": "who"})
    config = replace(run.config, data=by_user, privacy=replace(run.config.privacy, unit="user"))
    rows = [{"mr": "a", "ref": text} for text in ("a blue one", "say ${name}", "a red one")]
    file.write_text(ballot(rows, "ref", config))
    voting = compose_run([f"experiment={file}", "model=random_bert"])
    assert voting.head.label_texts == ("a blue one", "a red one")
    assert (voting.privacy.unit, voting.data.columns["user"]) == ("user", "who")
    assert chosen(as_written(rows, ("mr", "ref")), "ref", door.load(runs / "shares"), keep=2).rows == (rows[0], rows[2])


@pytest.mark.parametrize(
    ("start", "epsilon"),
    [
        (None, 3.0),
        ({"epsilon": 2.0, "delta": 0.1, "unit": "record", "public": False}, 5.0),
        ({"epsilon": None, "delta": None, "unit": None, "public": True}, 3.0),
        ({"epsilon": None, "delta": None, "unit": None, "public": False}, None),
        ({"epsilon": 2.0, "delta": 0.1, "unit": "user", "public": False}, None),
    ],
)
def test_what_a_run_began_in_adds_up_with_it(start: Any, epsilon: float | None) -> None:
    runs = [{"epsilon": 1.0, "delta": 0.1, "unit": "record", "start": start}]
    runs.append({"epsilon": 2.0, "delta": 0.1, "unit": "record", "start": None})
    assert together(runs)[0] == epsilon
