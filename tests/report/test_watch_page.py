"""What the live page says of runs in every state, from folders that are made by hand and from real ones."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from fedtune.cli.working_folder import only_one
from fedtune.config import saved_config
from fedtune.federation.results import charged_epsilons
from fedtune.privacy import accountant
from fedtune.report import from_run
from fedtune.report import watch_page as watch
from fedtune.report.model import Report, Verdict
from fedtune.report.page.catalogue import LANGUAGES, catalogue
from fedtune.report.watch_page import PARTS, Left, Live, Phase, WatchPage

from .shown import lookup, parsed
from .watched import NORTH, ROUND_S, MadeRun, contents, seen, watched


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """A run whose third round is under way."""
    run = MadeRun.at(tmp_path_factory.mktemp("runs") / "run", *NORTH).begin()
    run.ask().finish_round().ask().finish_round({"west": "paused", "south": "a_reason_of_a_later_version"})
    return seen(run.ask().folder)


def latest(live: Live) -> dict[str, tuple[str, int | None]]:
    pairs = zip(live.report.sites, live.progress.sites, strict=True)
    return {site.site: (now.latest, now.round) for site, now in pairs}


def charges(live: Live) -> list[tuple[int, bool]]:
    return [(site.spent.rounds, site.spent.upper_bound) for site in live.report.sites]


def with_progress(live: Live, **changes: Any) -> Live:
    return replace(live, progress=replace(live.progress, **changes))


def text_of(live: Live, language: str = "en") -> str:
    page = WatchPage(language)
    whole = re.sub(r"<(style|script|svg|head)\b.*?</\1>", "", page.html(page.shown(live), nonce="n"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", whole)).split())


def test_a_run_that_is_being_prepared(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run")
    live = seen(run.folder)
    now = live.progress
    assert (now.phase, now.rounds_done, now.rounds_planned, now.left) == ("preparing", 0, 2, None)
    assert (live.report.epsilon, live.report.utility.rounds) == (0.0, ())
    assert set(latest(live).values()) == {("nothing", None)}
    assert seen(run.folder, running=False).progress.phase == "waiting"


def test_a_round_that_is_under_way_counts_as_charged(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    assert seen(run.folder).report.epsilon == 0.0
    run.ask()
    live, plan = seen(run.folder), run.config.plan()
    assert (live.progress.phase, live.progress.under_way, live.progress.rounds_done) == ("running", 1, 0)
    assert live.report.epsilon == charged_epsilons(plan, 1)[0]
    assert charges(live) == [(1, True)] * 3
    assert set(latest(live).values()) == {("asked", 1)}
    run.finish_round()
    before = seen(run.folder)
    assert (before.report.epsilon, before.progress.under_way) == (charged_epsilons(plan, 1)[0], None)
    assert charges(before) == [(1, False)] * 3
    assert set(latest(before).values()) == {("update", 1)}
    # Finished rounds keep their epsilon while the next is under way.
    after = seen(run.ask().folder)
    assert [site.steps for site in after.report.sites] == [site.steps for site in before.report.sites]
    assert after.report.epsilon > before.report.epsilon == after.report.sites[0].steps[-1].epsilon


def test_refused_failed_and_silent_sites(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    run.ask().finish_round({"south": "min_noise_multiplier", "west": "no_reply"})
    run.ask().finish_round({"south": "max_epsilon"})
    live, plan = seen(run.folder), run.config.plan()
    assert latest(live) == {"north": ("update", 2), "south": ("max_epsilon", 2), "west": ("update", 2)}
    assert [(site.updates, site.failures) for site in live.progress.sites] == [(2, 0), (0, 2), (1, 1)]
    assert charges(live) == [(2, False), (0, False), (1, False)]
    assert [(one.round, one.site, one.reason) for one in live.progress.failures] == [
        (2, "south", "max_epsilon"),
        (1, "south", "min_noise_multiplier"),
        (1, "west", "no_reply"),
    ]
    assert [site.spent.epsilon for site in live.report.sites][1] == 0.0
    assert live.report.epsilon == charged_epsilons(plan, 2)[0]


@pytest.mark.parametrize(("silent", "words"), [("west", "epsilon at most"), ("north", "epsilon at most")])
def test_a_site_that_fell_silent_is_an_upper_bound(tmp_path: Path, silent: str, words: str) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    for _ in range(2):
        run.ask().finish_round({silent: "no_reply"})
    live = seen(run.folder)
    assert sorted(charges(live)) == [(2, False), (2, False), (2, True)]
    assert words not in text_of(live), "another site has spent just as much, and signed for it"
    assert words in text_of(seen(run.ask().folder))


def test_a_receipt_that_nobody_signed_counts_for_nothing(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    for _ in range(3):
        run.ask().finish_round()
    forged = replace(run.receipt("north", 3), charged_rounds=1)
    run.state = replace(run.state, receipts={**run.state.receipts, "north": forged})
    live = seen(run.begin().folder)
    assert charges(live) == [(10, True), (3, False), (3, False)]
    assert live.report == from_run.build(run.folder)
    assert live.progress.verdict.reasons == ("receipts_not_believed",)


def test_what_real_sites_answer_within_a_round(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", "runtime.kind=deployment", *NORTH).begin()
    run.ask().answer("north", "update", seconds=10).answer("south", "update", seconds=12)
    run.finish_round({"west": "paused"}).ask()
    run.answer("south", "update", seconds=ROUND_S + 5).answer("west", "awaiting_approval", seconds=ROUND_S + 6)
    live = seen(run.folder)
    assert latest(live) == {"north": ("asked", 2), "south": ("update", 2), "west": ("awaiting_approval", 2)}
    assert "one machine could see everything" not in text_of(live)
    # The name under which the lead's process notes them; what cannot be read is left out.
    for text in ("", "[]", "{}", '{"north": 3}', '{"north": {"what": "update"}}', "\xff"):
        (run.folder / "answers.json").write_text(text, encoding="latin-1")
        assert set(latest(seen(run.folder)).values()) == {("asked", 2)}


def test_time_left_at_the_pace_of_the_run(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    assert seen(run.folder).progress.left is None, "no round has shown a pace"
    run.ask().finish_round()
    assert seen(run.ask().folder).progress.left is None, "the first has work that is done once"
    run.finish_round().ask()

    def left(seconds: float) -> tuple[int, str]:
        found = seen(run.folder, seconds=ROUND_S + seconds).progress.left
        return found.value, found.unit

    assert left(0) == (6, "minutes")  # eight rounds of 40 s, of which the clock says that none has begun
    assert left(ROUND_S + 39) == (5, "minutes")
    assert left(ROUND_S + 41) == left(4000) == (5, "minutes"), "seven are still to come when the third takes long"
    assert left(-100) == (6, "minutes"), "a clock that was put back"
    for _ in range(7):
        run.finish_round()
    assert seen(run.folder, seconds=9 * ROUND_S).progress.left == Left(value=int(ROUND_S), unit="seconds")
    run.finish_round()
    assert seen(run.folder).progress.left is None
    assert seen(run.folder, running=False).progress.left is None


@pytest.mark.parametrize(("overrides", "reasons"), [
    (("privacy=none", "privacy.noise_multiplier=null"), ("no_noise",)),
    (("runtime.seeded_noise=true",), ("seeded_noise",)),
    ((), ()),
])  # fmt: skip
def test_what_is_no_promise_is_said_from_the_start(
    tmp_path: Path, overrides: tuple[str, ...], reasons: tuple[str, ...]
) -> None:
    run = MadeRun.at(tmp_path / "run", *overrides)
    state = "no_guarantee" if reasons else "within"

    def said(live: Live) -> tuple[str, tuple[str, ...]]:
        return live.progress.verdict.state, reasons and live.progress.verdict.reasons

    assert said(seen(run.folder)) == (state, reasons)
    live = seen(run.begin().ask().finish_round().folder)
    assert said(live) == (state, reasons)
    assert (live.report.epsilon is None) == (live.report.target_epsilon is None) == (reasons == ("no_noise",))
    shown = text_of(live)
    assert ("No guarantee" in shown) == bool(reasons)
    if reasons == ("no_noise",):
        assert "Spent so far: epsilon unbounded" in shown
        assert "promises nothing" in shown
        assert shown.count("unbounded") >= 3


def test_more_than_the_target_is_said(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", "privacy.noise_multiplier=1.2", "privacy.epsilon=3.5").begin()
    for _ in range(2):
        run.ask().finish_round()
    assert seen(run.folder).progress.verdict.state == "within"
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("num_rounds: 2", "num_rounds: 1").replace("epsilon: 3.5", "epsilon: 2.6"))
    live = seen(MadeRun(run.folder, saved_config(run.folder), run.state).begin().folder)
    assert live.report.epsilon > live.report.target_epsilon
    assert "above_target" in live.report.verdict.reasons or live.progress.verdict.state == "no_guarantee"
    exceeded = with_progress(live, verdict=Verdict(state="exceeded", reasons=("above_target",)))
    assert "Exceeded: more than this run's budget" in text_of(exceeded)


def test_a_finished_run_has_its_own_report(run_folder: Path, of_run: Report) -> None:
    live = seen(run_folder, running=False)
    now = live.progress
    assert (now.phase, now.rounds_done, now.under_way, now.left) == ("finished", 2, None, None)
    assert live.report == of_run
    assert json.loads(json.dumps(live.to_json(), allow_nan=False))["progress"]["phase"] == "finished"


def test_a_run_that_was_interrupted_or_killed(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    run.ask().finish_round().ask()
    live = seen(run.folder, running=False)
    now = live.progress
    assert (now.phase, now.rounds_done, now.under_way, now.left) == ("stopped", 1, None, None)
    assert {what for what, _ in latest(live).values()} == {"asked"}
    assert charges(live) == [(2, True)] * 3, "it died in a round that may have been charged"
    while run.state.round < 10:
        run.finish_round()
    assert seen(run.folder, running=False).progress.phase == "stopped", "all rounds are done, and no result was written"


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run").begin()
    run.finish_round(metrics={"accuracy": 0.1, "loss": float("nan")})
    run.finish_round(metrics={"accuracy": 0.2, "loss": float("nan")})
    live = seen(run.folder)
    assert live.report.utility.rounds[0].scores == {"accuracy": 0.1, "loss": None}
    assert WatchPage("en").shown(live).parts["scores"].count("<svg") == 1


def test_files_are_read_again_only_where_one_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = watch.read_run_under_way
    monkeypatch.setattr(watch, "read_run_under_way", lambda *args, **rest: reads.append(1) or real(*args, **rest))
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    folder = watched(run.folder)
    for _ in range(3):
        folder.now()
    assert len(reads) == 1
    run.ask()
    assert folder.now().progress.under_way is None, "no process works on it"
    assert len(reads) == 2
    with only_one(run.folder):
        assert folder.now().progress.under_way == 1
    run.finish_round()
    assert folder.now().progress.rounds_done == 1


def test_a_damaged_folder_is_told_and_may_be_mended(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    run.ask().finish_round()
    folder = watched(run.folder)
    assert folder.now().progress.rounds_done == 1
    newest = run.folder / "checkpoints" / "round-0001.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:100])
    now = folder.now().progress
    assert now.phase == "unreadable"
    assert "is damaged" in now.problem
    assert now.rounds_done == 1, "what was last known stays"
    assert watched(run.folder).now().progress.phase == "unreadable", "who opens the page now learns it, too"
    newest.write_bytes(whole)
    assert folder.now().progress.problem is None


def test_a_folder_that_is_taken_away(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run")
    folder = watched(run.folder)
    run.folder.rename(tmp_path / "gone")
    assert folder.now().progress.phase == "unreadable"
    (tmp_path / "gone").rename(run.folder)
    assert folder.now().progress.phase == "waiting"


@pytest.mark.parametrize("failures", [1, 2])
def test_what_fails_is_tried_again_at_once_and_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A checkpoint may be followed by the next one while it is read."""
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    real, tries = watch.read_run_under_way, []

    def flaky(*args: object, **rest: object) -> object:
        tries.append(1)
        if len(tries) <= failures:
            raise FileNotFoundError("round-0000.safetensors")
        return real(*args, **rest)

    monkeypatch.setattr(watch, "read_run_under_way", flaky)
    folder = watched(run.folder)
    assert (folder.now().progress.problem is None) == (failures == 1)
    assert folder.now().progress.problem is None
    folder.now()
    assert len(tries) == failures + 1


def test_nothing_is_written_into_the_folder(tmp_path: Path) -> None:
    run = MadeRun.at(tmp_path / "run", *NORTH).begin()
    run.ask().finish_round({"west": "no_reply"}).ask()
    before = contents(run.folder)
    folder = watched(run.folder)
    for _ in range(3):
        folder.now()
    assert contents(run.folder) == before


def test_a_long_run_needs_few_computations_and_its_page_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MadeRun.at(tmp_path / "run", "federation.num_sites=20", "federation.num_rounds=300").begin()
    for _ in range(250):
        run.finish_round({"site-3": "paused"})
    computed, real = [], accountant.composed_pld
    monkeypatch.setattr(accountant, "composed_pld", lambda *args, **rest: computed.append(1) or real(*args, **rest))
    folder = watched(run.folder)
    live = folder.now()
    assert len(live.report.sites[0].steps) == 250
    assert 0 < len(computed) <= 80
    computed.clear()
    assert folder.now() is live
    assert computed == []
    shown = text_of(live)
    assert shown.count("40 of 250 rows are shown, the newest.") == 4
    assert "The first 6 of 20 sites." in shown


# What is drawn.


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_phase_and_time_left_has_words(now: Live, language: str) -> None:
    words = catalogue(language)
    for phase in get_args(Phase):
        assert words.code("phase", phase).unescape() in text_of(with_progress(now, phase=phase), language)
    for unit in ("seconds", "minutes", "hours"):
        said = words.text(f"watch.left_{unit}", value=20).unescape()
        left = Left(value=20, unit=unit)
        assert said in text_of(with_progress(now, left=left), language).replace("20 ", "20 ")
        assert said not in text_of(now, language)


def test_what_a_site_did_is_said_in_plain_words(now: Live) -> None:
    for answer, round, words in (
        ("nothing", None, "north nothing asked yet \N{EN DASH}"),
        ("asked", 3, "north asked, no answer yet 3"),
        ("update", 2, "north update 2"),
        ("no_reply", 2, "north no reply 2"),
        ("min_noise_multiplier", 2, "north too little noise 2"),
        ("of_a_later_version", 2, "north of_a_later_version 2"),
    ):
        first = replace(now.progress.sites[0], latest=answer, round=round)
        assert words in text_of(with_progress(now, sites=(first, *now.progress.sites[1:])))
    assert "one machine could see everything" in text_of(now)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_figure_has_its_place_in_the_state(now: Live, language: str) -> None:
    page = WatchPage(language)
    shown = page.shown(now)
    root = parsed(page.html(shown, nonce="n").replace("<!doctype html>", ""))
    figures, state = root.all("data"), json.loads(shown.state)["state"]
    assert len(figures) > 40
    for figure in figures:
        at, kind = figure.attributes["data-at"], figure.attributes["data-as"]
        assert figure.text == catalogue(language).figure(lookup(state, at), kind)
    for counted in root.all(**{"class": "rows"}):  # how many sites a column stands for
        counted.children.clear()
    text = "".join(root.all("main")[0].texts(without=("data", "svg", "style", "script", "code")))
    assert not re.findall(r".*\d.*", text.replace("macro F1", "")), "a number that is no figure of the state"


def test_names_are_escaped(now: Live) -> None:
    page = WatchPage("en")
    sites = (replace(now.report.sites[0], site="<i>"), *now.report.sites[1:])
    odd = with_progress(
        replace(now, report=replace(now.report, name="<b>&", sites=sites)), problem="<script>x</script>"
    )
    whole = page.html(page.shown(odd), nonce="n")
    for bad in ("<b>", "<i>", "<script>x"):
        assert bad not in whole
    assert "&lt;script&gt;x" in whole


def test_a_page_is_drawn_again_only_where_something_changed(now: Live) -> None:
    page = WatchPage("en")
    first = page.shown(now)
    assert page.shown(now) is first
    later = page.shown(with_progress(now, left=Left(value=1, unit="hours")))
    assert {part for part in PARTS if later.parts[part] != first.parts[part]} == {"progress"}
    assert later.tag != first.tag
    whole = page.html(later, nonce="n")
    root = parsed(whole.replace("<!doctype html>", ""))
    found = [one.attributes["data-part"] for one in root.walk() if "data-part" in one.attributes]
    assert sorted(found) == sorted(PARTS)
    assert len(set(re.findall(r'\bid="([^"]+)"', whole))) == len(re.findall(r'\bid="([^"]+)"', whole))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_planned_path_leads_to_the_plans_epsilon_with_todays_point_on_it(language: str, now: Live) -> None:
    path, rounds = now.progress.path, now.progress.rounds_planned
    assert [point.round for point in path] == list(range(1, rounds + 1))
    assert path[-1].epsilon == now.report.sites[0].spent.planned_epsilon
    assert path[0].epsilon > path[-1].epsilon / rounds, "the first round costs more than its share"
    spent = now.report.sites[0].steps
    assert all(step.epsilon <= path[step.round - 1].epsilon <= 1.01 * step.epsilon for step in spent)
    texts, page = catalogue(language).texts, WatchPage(language)
    drawing = page.shown(now).parts["epsilon"]
    labels = re.findall(r">([^<]+)</text>", drawing)
    assert {texts["chart"]["planned"], texts["chart"]["now"]} <= set(labels)
    assert html.unescape(texts["watch"]["steep"]) in html.unescape(drawing)


def test_before_the_first_round_the_path_is_there_already(tmp_path: Path) -> None:
    live = seen(MadeRun.at(tmp_path / "run", *NORTH).folder)
    drawing = WatchPage("en").shown(live).parts["epsilon"]
    assert drawing.count("<svg") == 1
    assert ">now<" not in drawing
    plain = seen(MadeRun.at(tmp_path / "plain", "privacy=none", "privacy.noise_multiplier=null").folder)
    assert plain.progress.path == ()
    assert "<svg" not in WatchPage("en").shown(plain).parts["epsilon"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_failures_come_first(language: str, now: Live) -> None:
    page, texts = WatchPage(language), catalogue(language).texts
    whole = page.html(page.shown(now), nonce="n")
    assert whole.index('data-part="failures"') < whole.index('data-part="phase"')
    part = html.unescape(re.sub(r"<[^>]+>", "", page.shown(now).parts["failures"]))
    assert texts["refusal"]["paused"] in part
    healthy = with_progress(now, failures=())
    assert page.shown(healthy).parts["failures"] == ""
    assert texts["watch"]["no_failures"] in page.shown(healthy).parts["sites"]
