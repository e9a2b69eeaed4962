"""Runs with secure aggregation, whose lead learns only the sum of the sites' noisy gradient sums."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtune.federation.rounds as lead_rounds
import fedtune.federation.secure.shares as shamir
import fedtune.federation.secure_rounds as secure_rounds
import fedtune.sites.work as site_work
from fedtune.federation.protocol import UNMASK
from fedtune.federation.secure.agreement import Rejected, RejectionReason
from fedtune.federation.secure.at_site import Parties, SiteAggregator
from fedtune.federation.secure.messages import Upload
from fedtune.federation.secure.packing import unpack_residues
from fedtune.federation.secure.party import Party
from fedtune.flower import flower_records
from fedtune.model.adapter import Adapter
from fedtune.privacy.ledger.chain import to_canonical_json
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import DEFAULT_MAX_ADAPTER_VALUE
from fedtune.training.secure_server_step import take_secure_server_step

from ..conftest import check_planned_bytes, fail_where, list_tiny_overrides, read_result, run_command, simulate

SECURE = ("federation.aggregation=secure", "training.local_steps=1", "federation.num_rounds=3")
FOUR = ("federation.num_sites=4", "federation.threshold=3")
THREE = ("federation.num_sites=3", "runtime.seeded_noise=true")


def list_charged_steps(result: Any) -> list[int]:
    """List the steps charged at each site."""
    return [spent["steps"] for _, spent in sorted(result["privacy"]["sites"].items())]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Adapter, np.ndarray, Adapter]]:
    """The adapter before, the total, and the adapter after each of the lead's steps."""
    steps_taken: list[tuple[Adapter, np.ndarray, Adapter]] = []

    def note_step(adapter: Adapter, total: np.ndarray, state: Any, **kwargs: Any) -> Any:
        after = take_secure_server_step(adapter, total, state, **kwargs)
        steps_taken.append((adapter, total, after[0]))
        return after

    monkeypatch.setattr(secure_rounds, "take_secure_server_step", note_step)
    return steps_taken


def test_lead_receives_the_exact_sum_and_no_share(
    steps: Any, sent_bytes: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[dict[str, np.ndarray]] = []  # each site's contributions, in order
    real_share, real_upload = site_work.compute_round_share, Upload.from_bytes

    def share(*arguments: Any, **kwargs: Any) -> Any:
        shares.append(real_share(*arguments, **kwargs))
        return shares[-1]

    def upload(data: bytes, session: Any) -> Upload:
        masked, length, bits = real_upload(data, session), session.terms.length, session.terms.bits
        assert unpack_residues(masked.vector, length, bits).max() < 2**bits
        assert (length, len(masked.vector)) == (sum(value.size for value in shares[0].values()), -(-length * bits // 8))
        assert 12 <= bits < 24
        return masked

    monkeypatch.setattr(site_work, "compute_round_share", share)
    monkeypatch.setattr(Upload, "from_bytes", upload)
    check_planned_bytes(simulate(*SECURE, *THREE, into=tmp_path))
    assert len(steps) == 3
    for number, (adapter, total, after) in enumerate(steps):
        of_round = shares[3 * number : 3 * number + 3]
        exact = sum(np.concatenate([share[name].ravel() for name in adapter.tensors]) for share in of_round)
        np.testing.assert_array_equal(total, exact)
        assert after.digest() != adapter.digest()
    sent = b"".join(sent_bytes)
    assert b'"tensors": "masked"' in sent
    assert b'"tensors": [' not in sent, "no update may be sent unmasked"
    for share_ in shares:
        values = np.concatenate([value.ravel() for value in share_.values()])
        for kind in ("<i4", "<i8", "<f4"):
            assert values[:64].astype(kind).tobytes() not in sent


def test_secure_run_continues_without_one_site_and_ends_without_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {"bank-2"}

    def fails(model: Any, adapter: Any, units: Any, work: Any, **_: Any) -> bool:
        return work.site in failing and work.round > 1

    fail_where(monkeypatch, site_work, "compute_round_share", fails, OSError("canary-17"))
    four_banks = ("federation.num_sites=4", "federation.site_names=[bank-1,bank-2,bank-3,bank-4]")
    rounds = read_result(simulate(*SECURE, *four_banks, into=tmp_path))["rounds"]
    assert [entry["sites"] for entry in rounds][1:] == [["bank-1", "bank-3", "bank-4"]] * 2
    assert all(entry["failed_sites"] == {"bank-2": "site_error"} for entry in rounds[1:])
    failing.add("bank-4")
    outcome = run_command("simulate", *list_tiny_overrides(*SECURE, *four_banks, into=tmp_path, name="two"))
    assert outcome.code == 1
    assert "2 of 4 sites sent an update, but federation.threshold = 3 are required" in outcome.out + outcome.err
    assert "canary-17" not in outcome.out + outcome.err


def test_failed_first_session_names_the_missing_site_and_needs_all(tmp_path: Path, monkeypatch: Any) -> None:
    fail_where(monkeypatch, SiteAggregator, "announce", lambda self, *_: self.site.endswith("2"))
    outcome = run_command("simulate", *list_tiny_overrides(*SECURE, *FOUR, into=tmp_path, name="one"))
    assert outcome.code == 1
    assert "the first needs all 4 sites (site-2: " in outcome.out + outcome.err


def test_spare_round_replaces_a_lost_aggregate(tmp_path: Path, steps: Any, monkeypatch: Any) -> None:
    fail_where(monkeypatch, Party, "unmask", lambda party, _: party._release == 2)
    more = ("federation.spare_rounds=2", "federation.num_rounds=2", "training.schedule=linear")
    folder = simulate(*SECURE, *THREE, *more, into=tmp_path)
    result = read_result(folder)
    assert [len(entry["sites"]) for entry in result["rounds"]] == [3, 0, 3], "the second spare round must stay unused"
    assert set(result["rounds"][1]["failed_sites"].values()) == {"not_summed"}
    assert [after.digest() != before.digest() for before, _, after in steps] == [True, True]
    assert steps[0][2].digest() == steps[1][0].digest(), "the adapter must not change"
    assert list_charged_steps(result) == [3, 3, 3]
    assert run_command("report", "verify", str(folder / "report.json")).code == 0


@pytest.fixture
def restart_site(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Restart site-2 once, after the request of the second session or round, so that it loses its keys."""
    joins: list[str] = []
    real = SiteAggregator.join

    def join(self: SiteAggregator, proposal: str, session: str, announcements: Any) -> bytes:
        if self.site == "site-2":
            joins.append(session)
            if len(joins) == 3:  # the calls are to join, before round 1, and before round 2
                self.parties.of_proposal.clear()
        return real(self, proposal, session, announcements)

    monkeypatch.setattr(SiteAggregator, "join", join)
    return joins


@pytest.mark.by_day("3")
@pytest.mark.parametrize("sites", [3, 4])
def test_restarted_site_costs_no_secure_round(sites: int, restart_site: list[str], tmp_path: Path) -> None:
    """Covers runs that need all sites: the restart is detected before a round is requested."""
    result = read_result(simulate(*SECURE, f"federation.num_sites={sites}", "federation.threshold=3", into=tmp_path))
    assert len(set(restart_site)) == 2, "there must be two sessions"
    assert [entry["failed_sites"] for entry in result["rounds"]] == [{}, {}, {}]
    assert list_charged_steps(result) == [3] * sites


def make_site_absent(monkeypatch: pytest.MonkeyPatch, name: str, site: str, number: int = 1, error: Any = None) -> None:
    """Make a site fail a protocol step from its n-th request on."""
    requests = Counter[str]()

    def is_away(aggregator: SiteAggregator, *_: Any) -> bool:
        requests[aggregator.site] += 1
        return aggregator.site == site and requests[site] >= number

    fail_where(monkeypatch, SiteAggregator, name, is_away, error)


@pytest.mark.nightly
@pytest.mark.by_day("it does not return")
@pytest.mark.parametrize("away", ["site-4", "site-2"], ids=["another site is away", "it does not return"])
def test_run_continues_without_a_site_that_lost_its_keys(
    away: str, restart_site: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No new session begins, and the other sites return to the current session."""
    make_site_absent(monkeypatch, "announce", away, 2)
    result = read_result(simulate(*SECURE, *FOUR, into=tmp_path))
    assert [entry["sites"] for entry in result["rounds"]][1:] == [["site-1", "site-3", "site-4"]] * 2
    assert list_charged_steps(result) == [3, 1, 3, 3]


@pytest.mark.nightly
def test_site_that_never_joins_does_not_disrupt_the_session(tmp_path: Path, monkeypatch: Any) -> None:
    """The site loses its keys at every join request and announces new keys."""
    make_site_absent(monkeypatch, "join", "site-2", 3, Rejected(RejectionReason.SESSION_DIFFERS))
    more = (*FOUR, "federation.num_rounds=5")
    rounds = read_result(simulate(*SECURE, *more, into=tmp_path))["rounds"]
    assert [len(entry["sites"]) for entry in rounds] == [4, 3, 3, 3, 3]


@pytest.fixture
def make_site_2_deal_wrong_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    real_split, real_upload, tampers = shamir.split_secret, Party.upload, [False]

    def split(secret: int, *, threshold: int, num_shares: int) -> list[int]:
        shares = real_split(secret, threshold=threshold, num_shares=num_shares)
        return [shares[0], *((value + 1) % shamir.PRIME for value in shares[1:])] if tampers[0] else shares

    def upload(self: Party, release: int, vector: Any) -> bytes:
        tampers[0] = self._site == "site-2"
        return real_upload(self, release, vector)

    monkeypatch.setattr(shamir, "split_secret", split)
    monkeypatch.setattr(Party, "upload", upload)


@pytest.mark.usefixtures("make_site_2_deal_wrong_shares")
def test_site_dealing_wrong_shares_is_excluded(tmp_path: Path) -> None:
    folder = simulate(*SECURE, *FOUR, into=tmp_path)
    result = read_result(folder)
    assert [entry["sites"] for entry in result["rounds"]] == [[], *[["site-1", "site-3", "site-4"]] * 2]
    lost, *later = [entry["failed_sites"] for entry in result["rounds"]]
    assert lost == {f"site-{number}": "not_summed" for number in (1, 2, 3, 4)}
    assert later == [{"site-2": "left_out"}] * 2
    assert (
        "no longer asked, because its shares in secure aggregation were wrong" in (folder / "report.html").read_text()
    )
    assert result["privacy"]["sites"]["site-2"]["steps"] == 1, "it must receive no further request"


@pytest.mark.nightly
@pytest.mark.usefixtures("make_site_2_deal_wrong_shares", "keep_site_memory")
def test_site_dealing_wrong_shares_stays_excluded_after_lead_restart(
    kill_lead_in_round_two: Any, tmp_path: Path
) -> None:
    kill_lead_in_round_two(*FOUR, "federation.num_rounds=4")
    outcome = run_command("simulate", f"resume={tmp_path / 'run'}")
    result = read_result(tmp_path / "run")
    assert [entry["sites"] for entry in result["rounds"]] == [[], [], *[["site-1", "site-3", "site-4"]] * 2]
    assert [entry["failed_sites"]["site-2"] for entry in result["rounds"]] == ["not_summed", *["left_out"] * 3]
    assert (outcome.printed + outcome.err).count("site-2: left_out") == 2, "of the rounds that this lead started"
    assert result["privacy"]["sites"]["site-2"]["steps"] == 1, "it must receive no further request"


def test_shares_changed_by_the_server_blame_no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares are signed by their site, so changed shares count as no answer; with another missing answer there is no
    sum.
    """
    real, releases = secure_rounds.SecureAggregator._request_step, [0]

    def relay_changed(self: Any, step: str, session: str, parts: Any) -> Any:
        answers, missing = real(self, step, session, parts)
        releases[0] += step == UNMASK
        if step == UNMASK and releases[0] == 1:
            fields = json.loads(answers["site-2"])
            fields["shares"] = {dealer: dict.fromkeys(shares, "0" * 66) for dealer, shares in fields["shares"].items()}
            answers = {**answers, "site-2": to_canonical_json(fields)}
            del answers["site-4"]
        return answers, missing

    monkeypatch.setattr(secure_rounds.SecureAggregator, "_request_step", relay_changed)
    folder = simulate(*SECURE, *FOUR, into=tmp_path)
    assert [len(entry["sites"]) for entry in read_result(folder)["rounds"]] == [0, 4, 4]
    known = json.loads((folder / "checkpoints" / "session.json").read_bytes())
    assert (known["left_out"], known["accused"]) == ([], [])


def test_site_with_an_invalid_key_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SiteAggregator.announce

    def announce(self: SiteAggregator, *args: Any) -> bytes:
        fields = json.loads(real(self, *args))
        return to_canonical_json(fields | {"signature": "0" * 128} if self.site == "site-2" else fields)

    monkeypatch.setattr(SiteAggregator, "announce", announce)
    done = run_command("simulate", *list_tiny_overrides(*SECURE, *THREE, into=tmp_path))
    assert "(site-2: its key was rejected (wrong_signature))" in done.failed(1)


def test_two_rounds_without_a_sum_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_where(monkeypatch, Party, "unmask", lambda party, _: party._site != "site-1")
    outcome = run_command("simulate", *list_tiny_overrides(*SECURE, *THREE, "federation.num_rounds=9", into=tmp_path))
    assert (
        "the sum of secure aggregation release 2 cannot be computed: 1 sites sent shares, but 2 are required"
        in outcome.failed(1)
    )
    assert "as in round 1, and each round is charged; resume from the checkpoint of round 1" in outcome.message


def test_run_without_any_sum_releases_the_reserved_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_where(monkeypatch, Party, "unmask", lambda *_: True)
    outcome = run_command("simulate", *list_tiny_overrides(*SECURE, *FOUR, "federation.num_rounds=1", into=tmp_path))
    assert outcome.code == 1
    assert "produced an update; nothing was trained" in outcome.err
    for ledger in tmp_path.glob("run/sites/*/ledger.db"):
        assert verify(ledger).events[-1].detail["what"] == "run_ended", "its budget must be released"


@pytest.mark.nightly
def test_repeated_false_accusations_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second round has no sum; the lead cannot tell which of the two sites is at fault."""
    real = Party._open_shares

    def list_false_shares(self: Party, survivor: str, request: Any, pairs: Any) -> dict[str, str]:
        refuses = (self._site, survivor, self._release % 2) == ("site-1", "site-2", 0)
        return {} if refuses else real(self, survivor, request, pairs)

    monkeypatch.setattr(Party, "_open_shares", list_false_shares)
    all_needed = ("federation.num_sites=3", "federation.threshold=3", "federation.num_rounds=20")
    done = run_command("simulate", *list_tiny_overrides(*SECURE, *all_needed, into=tmp_path))
    assert done.code == 1
    lost = range(2, 2 * secure_rounds.MAX_LOST_ROUNDS, 2)
    assert f"the sum of secure aggregation release {lost.stop} cannot be computed" in done.message
    assert f"as in round {', '.join(map(str, lost))}, and each round is charged" in done.message
    assert "wrong shares between site-1 and site-2; the checkpoint of" in done.message
    for site in ("site-1", "site-2", "site-3"):
        spent = json.loads(run_command("ledger", "spent", str(tmp_path / f"run/sites/{site}/ledger.db"), "--json").out)
        assert [run["rounds"] for run in spent["runs"]] == [lost.stop]


def test_sum_of_fewer_than_min_sites_is_not_unmasked(tmp_path: Path, monkeypatch: Any) -> None:
    """One site signs an invalid upload, so that the lead counts its reply first."""
    real = Party.upload
    monkeypatch.setattr(Party, "upload", lambda self, *a: real(self, *a)[: -1 if self._site == "site-2" else None])
    settings = (*FOUR, "federation.min_sites=4")
    outcome = run_command("simulate", *list_tiny_overrides(*SECURE, *settings, into=tmp_path))
    assert (
        "the sum of secure aggregation release 2 cannot be computed: 3 sites uploaded, but 4 are required; "
        "no usable upload from site-2" in outcome.failed(1)
    )


def test_unreadable_answer_excludes_only_its_sender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = flower_records.from_step

    def split_answer(answer: Any) -> Any:
        content = real(answer)
        if isinstance(answer, bytes) and b'"survivors"' in answer and b'"site":"site-2"' in answer.replace(b": ", b":"):
            content.config_records[flower_records.PARTS]["001"] = answer
        return content

    monkeypatch.setattr(flower_records, "from_step", split_answer)
    folder = simulate(*SECURE, *FOUR, into=tmp_path)
    assert [len(entry["sites"]) for entry in read_result(folder)["rounds"]] == [4, 4, 4]


@pytest.mark.nightly
def test_secure_lead_adapter_stays_within_the_site_bound(tmp_path: Path, steps: Any) -> None:
    settings = ("training=sgd", "training.learning_rate=20000", "training.head_learning_rate=20000")
    simulate(*SECURE, *THREE, *settings, into=tmp_path)
    largest = max(float(np.abs(value).max()) for _, _, after in steps for value in after.tensors.values())
    assert 1 < largest <= DEFAULT_MAX_ADAPTER_VALUE


def test_finished_secure_run_ends_without_all_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        fail_where(patched, lead_rounds, "_announce_end", lambda *_, **__: True, KeyboardInterrupt())
        assert run_command("simulate", *list_tiny_overrides(*SECURE, *THREE, into=tmp_path)).code == 1
    make_site_absent(monkeypatch, "announce", "site-3")
    assert run_command("simulate", f"resume={tmp_path / 'run'}").code == 0


@pytest.fixture
def kill_lead_in_round_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a run that is killed after the second round's uploads."""

    def begin(*settings: str) -> None:
        with monkeypatch.context() as patched:
            fail_where(
                patched,
                secure_rounds.SecureAggregator,
                "compute_total",
                lambda _, round, __: round == 2,
                KeyboardInterrupt(),
            )
            assert run_command("simulate", *list_tiny_overrides(*SECURE, *settings, into=tmp_path)).code == 1

    return begin


@pytest.fixture
def keep_site_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, Parties]:
    """Keep the memory of the sites' processes across a restart of the lead, as on separate machines."""
    remembered: dict[str, Parties] = {}
    real = site_work.make_sums_at_site

    def remember_parties(files: SiteFiles, parties: Parties, **kwargs: Any) -> SiteAggregator:
        return real(files, remembered.setdefault(files.policy.site, parties), **kwargs)

    monkeypatch.setattr(site_work, "make_sums_at_site", remember_parties)
    return remembered


def test_restarted_lead_continues_its_session_without_all_sites(
    kill_lead_in_round_two: Any, keep_site_memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_lead_in_round_two(*FOUR, "federation.num_rounds=4")
    sessions = {session for known in keep_site_memory.values() for run in known.of_proposal.values() for session in run}
    make_site_absent(monkeypatch, "join", "site-4")
    make_site_absent(monkeypatch, "announce", "site-4")
    assert run_command("simulate", f"resume={tmp_path / 'run'}").code == 0
    result = read_result(tmp_path / "run")
    assert [len(entry["sites"]) for entry in result["rounds"]] == [4, 0, 3, 3]
    assert {session for known in keep_site_memory.values() for session in known.joined.values()} == sessions, (
        "the first lead's session must continue"
    )
    assert list_charged_steps(result) == [4, 4, 4, 2]


@pytest.mark.nightly
@pytest.mark.by_day("None", "forgotten")
@pytest.mark.parametrize("stored", [b'{"name": 1, "announced": [1, 2, 3]}', b"[" * 100_000, None, "forgotten"])
def test_restarted_lead_without_a_valid_session_starts_a_new_session(
    stored: Any, kill_lead_in_round_two: Any, tmp_path: Path, request: Any
) -> None:
    """The stored session has other members, or its sites have lost it."""
    if stored != "forgotten":
        request.getfixturevalue("keep_site_memory")
    kill_lead_in_round_two(*THREE)
    session = tmp_path / "run" / "checkpoints" / "session.json"
    if stored != "forgotten":
        session.write_bytes(session.read_bytes().replace(b"site-1", b"site-9") if stored is None else stored)
    assert run_command("simulate", f"resume={tmp_path / 'run'}").code == 0
    result = read_result(tmp_path / "run")
    assert [len(entry["sites"]) for entry in result["rounds"]] == [3, 0, 3]
    assert set(result["rounds"][1]["failed_sites"].values()) == {"not_summed"}
    assert result["rounds"][1]["bytes_up"] == 0, "without a session no site may be charged"
    assert result["privacy"]["sites"]["site-1"]["steps"] == 3
