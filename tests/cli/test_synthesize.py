"""`fedtune synthesize` and `fedtune synthesize select`: records by code or votes, cards, and refusals."""

import gzip
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from fedtune.api import public as api
from fedtune.api.compose import compose_run
from fedtune.codec import MAX_BYTES
from fedtune.data.load import partition_training_files
from fedtune.data.partition import PartitionSpec
from fedtune.lab.studies.synthetic import (
    WRITING,
    allot_rows,
    compute_vote_shares,
    load_synthetic,
    measure_classifier_accuracy,
    render_voting_experiment,
    select_by_votes,
    synthesize,
)
from fedtune.model.adapter import Adapter
from fedtune.model.adapter_files import compute_adapter_digest
from fedtune.privacy.accountant import format_epsilon
from fedtune.privacy.selection import Selection, compute_search_cost
from fedtune.runs.environment import build_start_lineage
from fedtune.runs.lineage import sum_start_losses
from fedtune.runs.renewal import add_start_adapter
from fedtune.runs.saved_model import SavedModel
from fedtune.sites import run_records
from fedtune.sites.virtual_site import select_partition_settings
from fedtune.spec import ConfigError

from ..conftest import REPOSITORY, edit_json, run_command, simulate
from . import snapshots

KINDS = [{"column": "label", "by": "kinds"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model (`writer`), and a run of votes on two of its codes (`shares`).

    The codes' column has the name of a role that these runs do not use.
    """
    into = tmp_path_factory.mktemp("runs")
    with gzip.open(REPOSITORY / "simulations/data/e2e_nlg/train.jsonl.gz", "rt") as lines:
        unique = [f'{{"messages": "a {color} one", "ref": "once"}}\n' for color in ("gray", "pink")]
        renamed = [line.replace('{"mr":', '{"messages":') for line in [*lines, *unique]]
    (into / "tables.jsonl").write_text("".join(renamed))
    own_data = (f"data.train_file={into}/tables.jsonl", "data.validation_file=null", "data.test_file=null")
    short = ("data.max_length=64", "federation.num_rounds=1", "training.learning_rate=0.2")
    model = ("model=random_llama", "data=e2e_nlg", "task=causal_lm", "data.declared_sizes=40")
    simulate(*model, *short, *own_data, "data.columns={prompt: messages, completion: ref}", into=into, name="writer")
    codes = [f'{{"messages": "a {one} one"}}\n' for one in ("red", "blue", "blue")]
    (into / "codes.jsonl").write_text("".join(codes))
    votes = ("experiment=votes", "model=random_bert", "data.columns={text: messages}", own_data[0])
    simulate(*votes, "data.labels=[a blue one, a red one]", into=into, name="shares")
    vote(into / "shares", 3.0, 1.0)
    return into


def vote(run: Path, *weights: float) -> None:
    head, weight = run / "adapter" / "head.safetensors", {"weight": np.array([weights], dtype=np.float32)}
    save_file(load_file(head) | weight, head)
    edit_json(run / "adapter" / "fedtune.json", trained_sha256=Adapter({"head.weight": weight["weight"]}).digest())
    edit_json(run / "run.json", adapter_digest=compute_adapter_digest(run / "adapter"))


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the tiny model's invalid bytes by texts; of five, one is truncated and one is broken."""

    def draw_texts(
        self: SavedModel, prompts: Any, spec: Any, *, first: int, against: Any, begun: Any
    ) -> Iterator[tuple[int, str | None]]:
        assert all(len(prompt) for prompt in prompts)
        codes = {prompt.tobytes() for prompt in prompts}
        assert len(against) == (len(prompts) if spec.guidance and (first or len(codes) > 1) else 0)
        assert not any(np.array_equal(*pair) for pair in zip(prompts, against, strict=False)), "one of another code"
        for index in range(len(prompts)):
            number = first + index
            defects = {3: None, 4: "\N{REPLACEMENT CHARACTER}"}
            start = self.tokenizer.decode(begun[index]) if begun else ""
            yield index, defects.get(number % 5, f"{start}seed {spec.seed} number {number}")

    monkeypatch.setattr(SavedModel, "sample_texts", draw_texts)


def write_records(runs: Path, to: Path, *options: str, codes: bool = True) -> list[dict[str, str]]:
    prompts = ("--prompts", str(runs / "codes.jsonl")) if codes else ()
    assert run_command("synthesize", str(runs / "writer"), "--to", str(to), *prompts, *options).printed
    return [json.loads(line) for line in to.read_text().splitlines()]


def test_synthesized_texts_follow_prompt_shares_and_have_a_card(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partitioned = []
    monkeypatch.setattr(
        run_records,
        "partition_training_files",
        lambda *arguments, **options: partitioned.append(arguments) or partition_training_files(*arguments, **options),
    )
    to = tmp_path / "texts.jsonl"
    public = tmp_path / "public.jsonl"
    public.write_text('{"messages": "a green one", "ref": "said of it"}\n' * 2)
    rows = write_records(runs, to, "--rows", "9", "--beside", str(public))
    assert len(partitioned) == 1, "the run's own records are read once"
    assert Counter(row["messages"] for row in rows) == {"a red one": 3, "a blue one": 6}
    assert len({row["ref"] for row in rows}) == 9
    card = json.loads((tmp_path / "texts.jsonl.card.json").read_text())
    run = api.load(runs / "writer")
    assert card["runs"][0]["epsilon"] == run.privacy.epsilon == card["together"]["epsilon"]
    assert card["made"]["left_out"] == {"not ended": 2, "broken": 2}
    assert card["made"]["rows"] == card["figures"]["these records"]["texts"] == 9
    text, beside = (tmp_path / "texts.jsonl.card.md").read_text(), card["figures"]["public.jsonl"]["texts"]
    assert beside == 2
    assert "no more about a record or person than the promises below allow.**" in text
    assert f"| texts | 9 | {beside} |" in text
    assert "learned from these records gives 0.0 % of public.jsonl their prompt. The prompt" in text, (
        "no synthetic record has this prompt"
    )
    copy = shutil.copy(to, tmp_path / "copy.jsonl")  # without its card
    more = ("--to", str(tmp_path / "more.jsonl"), "--rows", "2", "--beside", str(copy))
    message = run_command("synthesize", str(runs / "writer"), "--prompts", str(runs / "codes.jsonl"), *more).failed()
    assert "must contain public records" in message
    assert "writer generated some of them. Put their card next to the file" in message


@pytest.mark.nightly
def test_votes_set_shares_and_select_candidates(runs: Path, tmp_path: Path) -> None:
    voting, to, best = tmp_path / "vote.yaml", tmp_path / "texts.jsonl", tmp_path / "best.jsonl"
    voted = ("--votes", str(runs / "shares"))
    rows = write_records(
        runs, to, "--rows", "4", "--voting-experiment", str(voting), "--seed", "7", *voted, codes=False
    )
    assert Counter(row["messages"] for row in rows) == {"a blue one": 3, "a red one": 1}
    assert yaml.safe_load(voting.read_text())["head"]["label_texts"] == [row["ref"] for row in rows]
    folder = simulate(f"experiment={voting}", "model=random_bert", into=tmp_path, name="liked")
    vote(folder, 0.1, 0.4, -0.2, 0.3)
    choose = ("synthesize", "select", str(runs / "writer"), "--votes", str(folder), "--candidates")
    public = tmp_path / "public.jsonl"
    public.write_text('{"messages": "a green one", "ref": "said of it"}\n')
    output = run_command(*choose, str(to), "--rows", "2", "--to", str(best), "--beside", str(public), "--json").printed
    assert [json.loads(line) for line in best.read_text().splitlines()] == [rows[1], rows[3]]
    text = (tmp_path / "best.jsonl.card.md").read_text()
    assert "from 4 candidates" in text
    assert "which are epsilon" in text
    spent = api.load(runs / "shares").privacy
    loss = f"epsilon {format_epsilon(spent.epsilon)} at delta 0.00001 for each record"
    assert f"- shares (votes), by the candidates' card: {loss}" in text, "rounded up"
    assert "their shares are the noisy votes of shares |" in text
    card = json.loads((tmp_path / "best.jsonl.card.json").read_text())
    losses = [api.load(run).privacy for run in (runs / "writer", folder, runs / "shares")]
    total = {"epsilon": sum(run.epsilon or 0.0 for run in losses), "delta": sum(run.delta for run in losses)}
    assert card["together"] == pytest.approx(total)
    assert json.loads(output) == card
    made = {key: card["made"][key] for key in ("seed", "shares", "candidates", "rows", "missing")}
    assert made == {"seed": 7, "shares": "voted", "candidates": 4, "rows": 2, "missing": 0}
    assert card["figures"]["public.jsonl"]["texts"] == 1
    vote(shutil.copytree(folder, tmp_path / "anew" / "liked"), 0.4, 0.1, -0.2, 0.3)  # of the same settings
    for voted_run, times in ((folder, 1), (tmp_path / "anew" / "liked", 2)):
        run = tmp_path / f"{times}.jsonl"
        selection = ("--candidates", str(best), "--votes", str(voted_run), "--rows", "1", "--to", str(run), "--json")
        later_card = json.loads(run_command("synthesize", "select", str(runs / "writer"), *selection).printed)
        assert [run["run"] for run in later_card["runs"]] == ["writer", *["liked"] * times, "shares"]
        extra = (times - 1) * (api.load(folder).privacy.epsilon or 0.0)
        assert later_card["together"]["epsilon"] == pytest.approx(card["together"]["epsilon"] + extra)
    refused = (*choose, str(to), "--to", str(tmp_path / "no.jsonl"))
    for options, output in (
        (("--rows", "5"), "--rows = 5: must be at most 4, the number of candidates of the voting experiment"),
        (("--rows", "0"), "--rows = 0: must be a finite number of at least 1"),
        (("--rows", "2", "--to", str(best)), "already exists: choose a new file"),
        (
            ("--rows", "2", "--votes", str(runs / "shares")),
            "lacks 4 of the texts: use the run of their voting experiment",
        ),
        (("--rows", "2", "--beside", str(runs / "tables.jsonl")), "it shares 103 texts with data.train_file"),
        (("--rows", "2", "--candidates", str(public)), "must be an unchanged output of fedtune synthesize"),
    ):
        assert output in run_command(*refused, *options).failed()
        assert not (tmp_path / "no.jsonl").exists()
    asked = ("synthesize", str(runs / "writer"), "--votes", str(folder), "--to", str(tmp_path / "no.jsonl"))
    assert "must contain public records: " in run_command(*asked).failed(), "the card would not name their run"
    to.write_text(to.read_text().replace("seed 7", "private text"))
    message = run_command(*refused, "--rows", "2").failed()
    assert "must be an unchanged output of fedtune synthesize with this RUN, with its card next to it" in message
    assert "private text" not in message


@pytest.mark.nightly
def test_synthesis_card_adds_the_epsilon_of_variations_and_votes(runs: Path, tmp_path: Path) -> None:
    charged, options, rounds = [api.load(runs / "writer")], ("--prompts", str(runs / "codes.jsonl")), []
    for number in range(2):
        to, best, voting = (tmp_path / f"{number}-{name}" for name in ("texts.jsonl", "best.jsonl", "vote.yaml"))
        rounds.append(write_records(runs, to, "--rows", "4", "--voting-experiment", str(voting), *options, codes=False))
        liked = simulate(f"experiment={voting}", "model=random_bert", into=tmp_path, name=f"liked-{number}")
        vote(liked, 0.4, 0.1, -0.2, 0.3)
        charged.append(api.load(liked))
        choose = ("synthesize", "select", str(runs / "writer"), "--candidates", str(to), "--votes", str(liked))
        assert "card" in run_command(*choose, "--rows", "2", "--to", str(best)).printed
        options = ("--variations-of", str(best))
    (red, *_, blue), second = rounds
    assert [row["messages"] for row in second] == ["a red one"] * 2 + ["a blue one"] * 2
    for row, parent, number in zip(second, (red, red, blue, blue), (0, 1, 2, 5), strict=True):
        prefix = row["ref"].removesuffix(f"seed 0 number {number}")
        assert parent["ref"].startswith(prefix)
        assert len(parent["ref"]) // 4 <= len(prefix) < 3 / 4 * len(parent["ref"]), "each token is one letter"
    assert len({row["ref"].index("seed", 1) for row in second}) > 2, "each text keeps a different share"
    card = json.loads((tmp_path / "1-best.jsonl.card.json").read_text())
    made = [card["made"][key] for key in ("shares", "prompts_file", "candidates", "chosen_by")]
    assert made == ["varied", "0-best.jsonl", 4, "liked-1"]
    assert [one["run"] for one in card["runs"]] == ["writer", "liked-1", "liked-0"]
    assert card["together"]["epsilon"] == pytest.approx(sum(run.privacy.epsilon or 0.0 for run in charged))
    text = (tmp_path / "1-texts.jsonl.card.md").read_text()
    assert f"0-best.jsonl, SHA-256 {card['made']['prompts_sha256']}; each text begins with a quarter to" in text
    assert "- liked-0 (votes), by the varied records' card: epsilon 0.927 at delta" in text
    assert "% of them, each fifth of them by what the rest taught, their prompt. The prompt that is most" in text
    again = synthesize(charged[0], variations_of=[red], rows=1, spec=WRITING)  # one code has no contrast
    assert (again.wanted, again.rows) == ({("a red one",): 1}, (second[0],))
    refused = ("synthesize", str(runs / "writer"), *options, "--to", str(tmp_path / "no.jsonl"))
    for more in (("--prompts", str(runs / "codes.jsonl")), ("--votes", str(runs / "shares"))):
        assert "conflicts with prompts and votes" in run_command(*refused, *more).failed()


def test_relabeling_with_a_classifier_adds_its_epsilon(runs: Path, tmp_path: Path) -> None:
    to, best = tmp_path / "texts.jsonl", tmp_path / "labeled.jsonl"
    rows = write_records(runs, to, "--rows", "6")
    old = tmp_path / "texts.jsonl.card.json"  # empty fields may be omitted
    old.write_text("".join(line for line in old.read_text().splitlines(True) if not line.endswith(" null,\n")))
    folder = simulate(into=tmp_path, name="kinds")
    choose = ("synthesize", "select", str(runs / "writer"), "--candidates", str(to), "--labels")
    card = json.loads(run_command(*choose, str(folder), "--to", str(best), "--json").printed)
    classifier, labeled = api.load(folder), [json.loads(line) for line in best.read_text().splitlines()]
    answers: Any = classifier.predict([row["ref"] for row in rows])
    assert labeled == [{**row, "label": answer[0]["label"]} for row, answer in zip(rows, answers, strict=True)]
    losses = [api.load(one).privacy.epsilon or 0.0 for one in (runs / "writer", folder)]
    assert card["together"]["epsilon"] == pytest.approx(sum(losses))
    assert (card["made"]["labels"], card["made"]["prompts"], card["made"]["missing"]) == (KINDS, 2, 0)
    assert "in column label, by what the classifier kinds says" in (tmp_path / "labeled.jsonl.card.md").read_text()
    for options, message in (
        ((), "--votes = null: is missing: give --votes to select records, or --labels"),
        (("--votes", str(runs / "shares")), "--rows = null: is required with --votes"),
        (("--labels", str(folder), "--rows", "2"), "--rows = 2: is required with --votes, and not allowed without it"),
        (("--labels", str(runs / "shares")), "must be a run of single-label text classification"),
        (
            ("--labels", str(make_adapter_private(folder, tmp_path / "own"))),
            "is private to 'site-1' and has no guarantee",
        ),
    ):
        outcome = run_command(*choose[:-1], "--to", str(tmp_path / "no.jsonl"), *options)
        assert (outcome.code, (tmp_path / "no.jsonl").exists()) == (2, False), options
        assert message in outcome.err


@pytest.mark.nightly
def test_each_relabeling_adds_a_column(runs: Path, tmp_path: Path) -> None:
    write_records(runs, tmp_path / "0.jsonl", "--rows", "6")
    with gzip.open(REPOSITORY / "simulations/data/banking77/train.jsonl.gz", "rt") as lines:
        (tmp_path / "sorts.jsonl").write_text("".join(line.replace('"label":', '"sort":') for line in lines))
    sort = (f"data.train_file={tmp_path}/sorts.jsonl", "data.columns={text: text, label: sort}")
    simulate(into=tmp_path, name="kinds")
    simulate(*sort, "data.validation_file=null", "data.test_file=null", into=tmp_path, name="sorts")
    for number, name in enumerate(("kinds", "sorts", "sorts")):
        places = ("--candidates", str(tmp_path / f"{number}.jsonl"), "--to", str(tmp_path / f"{number + 1}.jsonl"))
        options = (*places, "--labels", str(tmp_path / name), "--json")
        card = json.loads(run_command("synthesize", "select", str(runs / "writer"), *options).out)
    assert card["made"]["labels"] == [*KINDS, {"column": "sort", "by": "sorts"}]
    rows = [json.loads(line) for line in (tmp_path / "3.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["messages", "ref", "label", "sort"]] * 6
    assert (tmp_path / "3.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()


def test_edited_synthesis_card_is_refused(runs: Path, tmp_path: Path) -> None:
    to, card = tmp_path / "texts.jsonl", tmp_path / "texts.jsonl.card.json"
    write_records(runs, to, "--rows", "4", "--votes", str(runs / "shares"), codes=False)
    original = json.loads(card.read_text())
    writer, shares = original["runs"]
    selection = ("--candidates", str(to), "--votes", str(runs / "shares"), "--rows", "2")
    choose = ("synthesize", "select", str(runs / "writer"), *selection)

    def select_and_fail() -> str:
        message: str = run_command(*choose, "--to", str(tmp_path / "no.jsonl")).failed()
        assert "must be an unchanged output of fedtune synthesize with this RUN, with its card next to it" in message
        return message

    for changes, said in (
        ({"runs": [writer]}, "must be the sum of the runs' privacy losses"),
        ({"runs": [writer, shares | {"epsilon": 0.1}]}, "must be the sum of the runs' privacy losses"),
        ({"runs": [writer, shares | {"epsilon": -1.0}], "together": {"epsilon": 0.0, "delta": 2e-5}}, "at least 0"),
        ({"runs": [writer, shares | {"epsilon": "0.1"}]}, "must be a number"),
        ({"runs": [writer, {"run": "shares"}]}, "is required"),
        ({"runs": []}, "must be the sum of the runs' privacy losses"),
        (
            {"made": original["made"] | {"labels": [{"column": "ref"}]}},
            'must each have exactly the keys "column" and "by"',
        ),
        ({"made": original["made"] | {"missing": -5, "left_out": {"missing": 0}}}, "made.missing = -5: must be"),
        ({"made": None}, "must be a table"),
        ({"runs": [writer | {"run": "twin"}, shares]}, "with its card next to it (texts.jsonl.card.json)"),
    ):
        card.write_text(json.dumps(original | changes))
        assert said in select_and_fail()
    card.write_text("[" * 100_000)
    assert "must be JSON" in select_and_fail()
    with card.open("wb") as file:  # a sparse file
        file.truncate(MAX_BYTES + 1)
    assert "of at most 64 MiB" in select_and_fail()
    card.unlink()
    os.mkfifo(card)
    select_and_fail()


def test_run_selected_by_a_search_inherits_the_search_cost(runs: Path, tmp_path: Path) -> None:
    picked, to = shutil.copytree(runs / "writer", tmp_path / "picked"), tmp_path / "texts.jsonl"
    alone, config = api.load(picked).privacy, api.load(picked).config
    started = replace(config, model=replace(config.model, adapter=str(picked)))
    cost = compute_search_cost([config.plan()] * 3)
    fields: Any = {"search": "s", "method": "grid", "primary_metric": "loss", "score": 0.5}
    selection = Selection.from_cost(cost, [config.plan()] * 3, **fields)
    (picked / "selection.json").write_text(json.dumps(asdict(selection)))
    assert cost.epsilon > (alone.epsilon or 0.0)
    options = ("--prompts", str(runs / "codes.jsonl"), "--rows", "2", "--to", str(to))
    assert run_command("synthesize", str(picked), *options).printed
    card = json.loads((tmp_path / "texts.jsonl.card.json").read_text())
    assert card["runs"][0]["epsilon"] == card["together"]["epsilon"] == cost.epsilon
    text = (tmp_path / "texts.jsonl.card.md").read_text()
    assert f"It is a trial of a search, whose trials come to epsilon {format_epsilon(cost.epsilon)} at delta" in text
    assert f"which are epsilon {format_epsilon(cost.epsilon)} at delta" in text
    # Runs that start from its adapter inherit the cost, directly or through another run.
    first = build_start_lineage(started) or {}
    assert (first["epsilon"], first["delta"]) == (cost.epsilon, cost.delta)
    after = json.loads((picked / "run.json").read_text())["provenance"]
    edit_json(picked / "run.json", provenance=after | {"start_adapter": first})
    (picked / "selection.json").write_text(json.dumps(asdict(replace(selection, epsilon=99.0, delta=2e-5))))
    total = pytest.approx((99.0 + cost.epsilon, 2e-5 + cost.delta))
    assert sum_start_losses(build_start_lineage(started) or {}) == total


def test_adapter_not_named_in_run_json_is_refused(runs: Path, tmp_path: Path) -> None:
    other = shutil.copytree(runs / "shares", tmp_path / "other")
    config, result = api.load(other).config, json.loads((other / "run.json").read_text())
    votes = ("synthesize", str(runs / "writer"), "--votes", str(other), "--to", str(tmp_path / "no.jsonl"))
    for changed, message in (
        (result | {"adapter_digest": "0" * 64}, "its adapter does not match adapter_digest"),
        (result | {"adapter_digest": None}, "its adapter does not match adapter_digest"),
        ({"schema_version": 3}, "its adapter does not match adapter_digest"),
        (None, "has no run.json with its adapter's digest"),
    ):
        (other / "run.json").write_text(json.dumps(changed)) if changed else (other / "run.json").unlink()
        assert message in run_command(*votes).failed()
        with pytest.raises(ConfigError, match=rf"^model\.adapter = .*{re.escape(message)}"):
            add_start_adapter(replace(config, model=replace(config.model, adapter=str(other))))
    copy = shutil.copytree(other, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))  # like a site's copy
    assert "has no checkpoint" in run_command(*votes, "--votes", str(copy)).failed()
    assert run_command("simulate", f"resume={other}").code == 0, "as the messages suggest"
    assert api.load(other).adapter
    vote(other, 3.0, 1.0)
    assert compute_vote_shares(api.load(other)) == {"a blue one": 0.75, "a red one": 0.25}
    head = other / "adapter" / "head.safetensors"
    save_file({"weight": np.array([[1.0, 3.0]], dtype=np.float32)}, head)
    with pytest.raises(ConfigError, match="does not match adapter_digest"):
        compute_vote_shares(api.load(other))


@pytest.mark.parametrize("words", [("generate",), ("select", "--candidates", "any", "--rows", "2")])
def test_votes_with_another_privacy_unit_are_refused(
    words: tuple[str, ...], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = api.load

    def load_by_user(folder: Path) -> api.Run:
        run = load(folder)
        data = replace(run.config.data, columns={**run.config.data.columns, "user": "who"})
        return replace(run, config=replace(run.config, data=data, privacy=replace(run.config.privacy, unit="user")))

    monkeypatch.setattr(api, "load", load_by_user)  # only --votes calls it by this name
    options = ("--votes", str(runs / "shares"), "--to", str(tmp_path / "no.jsonl"))
    message = run_command("synthesize", words[0], str(runs / "writer"), *words[1:], *options).failed()
    assert "must have privacy.unit=record, like RUN" in message


def test_texts_breaking_the_pattern_are_redrawn_or_missing(runs: Path, tmp_path: Path) -> None:
    to = tmp_path / "texts.jsonl"
    rows = write_records(runs, to, "--rows", "12", "--pattern", ".* number 1?2")
    card = json.loads((tmp_path / "texts.jsonl.card.json").read_text())["made"]
    assert [row["ref"] for row in rows] == ["seed 0 number 2", "seed 0 number 12"]
    assert card["missing"] == 10
    assert card["left_out"]["pattern"] > 20
    none = ("--rows", "2", "--pattern", "nothing is so", "--to", str(tmp_path / "none.jsonl"))
    message = run_command("synthesize", str(runs / "writer"), "--prompts", str(runs / "codes.jsonl"), *none).failed()
    assert "produced no record in the required format: 6 pattern" in message
    assert not list(tmp_path.glob("*none*"))


@snapshots.parametrize_mistakes("mistakes-synthesize")
def test_invalid_synthesize_command_fails_before_generation(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    monkeypatch.setattr(SavedModel, "sample_texts", lambda *args, **kwargs: pytest.fail("texts were generated"))
    monkeypatch.chdir(tmp_path)
    for name in ("codes.jsonl", "tables.jsonl", "writer", "shares"):
        Path(name).symlink_to(runs / name)
    Path("link").symlink_to(tmp_path)
    Path("brat").mkdir()
    Path("brat", "one.ann").touch()
    Path("empty.jsonl").touch()
    Path("owing.jsonl").write_text('{"messages": "a green one", "ref": "said of it"}\n')
    Path("owing.jsonl.card.json").touch()
    Path("once.jsonl").write_text("".join(f'{{"messages": "a {one} one"}}\n' for one in ("gray", "pink", "green")))
    with Path("tables.jsonl").open() as lines, Path("part.jsonl").open("w") as part:  # of which the run uses some
        part.writelines(islice(lines, 100))
    own = list(map(json.loads, Path("part.jsonl").read_text().splitlines()))
    for name, role, value in (("recoded.jsonl", "messages", "another code"), ("voted.jsonl", "ref", "another text")):
        Path(name).write_text("".join(f"{json.dumps(row | {role: value})}\n" for row in own))
    before = set(tmp_path.iterdir())
    message = run_command("synthesize", "writer", "--to", "texts.jsonl", *shlex.split(typed)).failed()
    snapshots.check_message("mistakes-synthesize", typed, message)
    assert set(tmp_path.iterdir()) == before


def make_adapter_private(run: Path, to: Path) -> Path:
    """Turn the run's adapter into a personalized adapter without run.json."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("run.json", "checkpoints"))
    edit_json(to / "adapter" / "fedtune.json", private_to="site-1")
    return to


def test_personalized_or_incomplete_adapter_cannot_synthesize(runs: Path, tmp_path: Path) -> None:
    options = ("--to", str(tmp_path / "texts.jsonl"), "--prompts", str(runs / "tables.jsonl"))
    personalized = make_adapter_private(runs / "writer", tmp_path / "own")
    assert "is private to" in run_command("synthesize", str(personalized), *options).failed()
    config = shutil.copytree(runs / "writer", tmp_path / "lost") / "config.yaml"
    config.write_text(config.read_text().replace("tables.jsonl", "gone.jsonl"))
    message = run_command("synthesize", str(config.parent), *options).failed()
    assert message.startswith(f"data.train_file = '{runs}/gone.jsonl': no such file")


def test_allot_rows_returns_integers_and_merges_equal_texts(runs: Path, tmp_path: Path) -> None:
    assert allot_rows({("a",): 1.0, ("b",): 1.0, ("c",): 1.0}, 8) == {("a",): 3, ("b",): 3, ("c",): 2}
    assert sum(allot_rows({(str(n),): 0.3 * n for n in range(1, 40)}, 1000).values()) == 1000
    run = api.load(shutil.copytree(runs / "shares", tmp_path / "shares"))
    head = replace(run.config.head, label_texts=("same", "same"))
    assert compute_vote_shares(replace(run, config=replace(run.config, head=head))) == {"same": 1.0}
    vote(tmp_path / "shares", -1.0, 0.0)
    with pytest.raises(ValueError, match="has no candidate with a positive noisy number of votes"):
        compute_vote_shares(api.load(tmp_path / "shares"))


def test_voting_experiment_keeps_the_unit_and_excludes_unusable_texts(runs: Path, tmp_path: Path) -> None:
    run, file = api.load(runs / "writer"), tmp_path / "vote.yaml"
    partition = PartitionSpec(kind="column", sites={"north": 0, "south": 1})
    held_back: dict[str, Any] = {"test_fraction": 0.1, "test_rows": 5, "validation_fraction": 0.2}
    held_back |= {"heldout_fraction": 0.3, "train_fraction": 0.5}
    columns = {**run.config.data.columns, "user": "who", "site": "where"}
    by_user = replace(run.config.data, columns=columns, partition=partition, **held_back)
    config = replace(run.config, data=by_user, privacy=replace(run.config.privacy, unit="user"), seed=7)
    rows = [{"messages": "a", "ref": text} for text in ("a blue one", "???", "a red one")]
    file.write_text(render_voting_experiment([*rows, {"messages": "a", "ref": "next\x85 ${line}"}], "ref", config))
    voting = compose_run([f"experiment={file}", "model=random_bert"])
    assert voting.head.label_texts == ("a blue one", "a red one", "next\x85 ${line}")
    own, voters = select_partition_settings(config), select_partition_settings(voting)
    assert voters.pop("data.columns") == {"text": "ref", "user": "who", "site": "where"} != own.pop("data.columns")
    assert voters == own, "each user votes at the site that trained on its records"
    assert {key: getattr(voting.data, key) for key in held_back} == held_back
    selected = select_by_votes(load_synthetic(rows, ("messages", "ref")), "ref", api.load(runs / "shares"), keep=2).rows
    assert selected == (rows[0], rows[2])


RED = [("a", "Red ball."), ("a", "red car"), ("a", "red sun")]
BLUE = [("b", "blue ball"), ("b", "Blue, sky")]


def test_measured_accuracy_matches_multinomial_naive_bayes() -> None:
    """Six words in all: P(word | code) = (k + 1) / (n + 6) for k occurrences among the code's n words."""
    public = [
        ("a", "red sky"),  # a: 3/5 4/12 1/12 = 0.017, b: 2/5 1/10 2/10 = 0.008
        ("b", "blue car"),  # a: 3/5 1/12 2/12 = 0.008, b: 2/5 3/10 1/10 = 0.012
        ("b", "sky car car"),  # a: 3/5 1/12 2/12 2/12 = 0.0014, b: 2/5 2/10 1/10 1/10 = 0.0008: wrong
        ("c", "green ? hill"),  # a code that occurs once is not learned, and neither are its words
    ]
    learned = [*BLUE, ("c", "green hill"), *RED]
    assert measure_classifier_accuracy(learned, public) == {"right": 2 / 4, "commonest": 1 / 4}
    # Leave-one-out. Only "blue ball" is wrong: a: 3/4 1/12 2/12 = 0.010, b: 1/4 2/8 1/8 = 0.008.
    assert measure_classifier_accuracy(learned) == {"right": 4 / 5, "commonest": 3 / 5}
    assert measure_classifier_accuracy([*RED, ("b", "blue ball"), ("c", "green hill")]) is None
    assert measure_classifier_accuracy([("a", "!"), ("b", "?")] * 2) == {"right": 0, "commonest": 1 / 2}, "no words"
