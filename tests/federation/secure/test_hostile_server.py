"""Attacks of a server on honest sites, each of which succeeds without the tested rule."""

import json
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.federation.secure.agreement import Rejected, RejectionReason
from fedtune.federation.secure.messages import Upload
from fedtune.federation.secure.summation import Summation

from ...privacy.builders import draw_json
from .knowledge import Knowledge, RecordedUpload, watch_seeds
from .parties import Federation, change_message, expect_rejection, make_identity, make_terms


class Adversary:
    """A federation whose server records all messages, with the true masks for the test."""

    def __init__(self, num_sites: int, threshold: int, *, colluders: Collection[str] = ()) -> None:
        self.federation = Federation(make_terms(num_sites, threshold))
        terms = self.federation.terms
        self.knowledge = Knowledge(threshold, frozenset(colluders), terms.sites, terms.bits)
        self.uploads: dict[tuple[int, str], bytes] = {}

    def upload(self, release: int, sites: Collection[str]) -> None:
        for site in sites:
            with watch_seeds() as seeds:
                data = self.federation.parties[site].upload(release, self.federation.make_vector(site))
            self.uploads[release, site] = data
            upload = Upload.from_bytes(data, self.federation.session)
            self.knowledge.sent.append(RecordedUpload(site, upload, self.federation.make_vector(site), seeds[0]))

    def confirm(self, release: int, survivors: Collection[str], by: Collection[str]) -> dict[str, str]:
        signatures = {}
        for site in by:
            try:
                answer = self.federation.parties[site].confirm(self.federation.request(release, survivors).to_bytes())
            except Rejected:
                continue
            signatures[site] = json.loads(answer)["signature"]
        return signatures

    def request(self, release: int, survivors: Collection[str], signatures: dict[str, str], site: str) -> bytes:
        """Build an unmask request with the shares that are sealed for the site."""
        summation = Summation(self.federation.session, release=release)
        for survivor in survivors:
            summation.add_upload(survivor, self.uploads[release, survivor])
        summation._confirmed = dict.fromkeys(self.federation.terms.sites, "")
        return change_message(summation.build_unmask_request(site), confirmations=signatures)

    def unmask(self, release: int, survivors: Collection[str], signatures: dict[str, str], by: Collection[str]) -> None:
        for site in by:
            request = self.request(release, survivors, signatures, site)
            self.knowledge.record_answer(self.federation.parties[site].unmask(request))

    def find_refusal(
        self, release: int, survivors: Collection[str], signatures: dict[str, str], site: str
    ) -> RejectionReason:
        with pytest.raises(Rejected) as error:
            self.federation.parties[site].unmask(self.request(release, survivors, signatures, site))
        return error.value.wrong


def test_late_upload_of_a_dropped_site_stays_masked() -> None:
    server = Adversary(4, 3)
    server.upload(1, "abcd")  # d's upload comes late
    signatures = server.confirm(1, "abc", by="abcd")
    server.unmask(1, "abc", signatures, by="abcd")
    assert server.knowledge.find_readable_sums() == [{0: 1, 1: 1, 2: 1}]
    d = server.knowledge.sent[3]
    known = server.knowledge.seeds()
    # All of d's masks except its own are now known; without its own mask, the vector would be readable.
    assert {other for other, seed in d.seeds.items() if seed in known} == {"a", "b", "c"}
    assert server.find_refusal(1, "abcd", signatures, "a") is RejectionReason.WRONG_SIGNATURE


def test_site_confirms_only_one_survivor_set_per_release() -> None:
    server = Adversary(4, 3)
    server.upload(1, "abcd")
    signatures = server.confirm(1, "abcd", by="abcd")
    server.unmask(1, "abcd", signatures, by="abcd")
    for site in "abcd":
        with expect_rejection(RejectionReason.SURVIVORS_CHANGED):
            server.federation.parties[site].confirm(server.federation.request(1, "abc").to_bytes())
    assert server.confirm(1, "abcd", by="abcd") == signatures  # a repeated request gives the same signatures
    assert server.knowledge.find_readable_sums() == [{0: 1, 1: 1, 2: 1, 3: 1}]


def test_conflicting_survivor_sets_never_reach_the_threshold() -> None:
    server = Adversary(4, 3)
    server.upload(1, "abcd")
    by_others = server.confirm(1, "abcd", by="bcd")
    assert server.find_refusal(1, "abcd", by_others, "a") is RejectionReason.NOT_PROMISED, (
        "a must help only with the set that it confirmed"
    )
    server = Adversary(4, 3)
    server.upload(1, "abcd")
    halves = server.confirm(1, "abcd", by="ab"), server.confirm(1, "abc", by="cd")
    assert [len(half) for half in halves] == [2, 2]
    assert server.find_refusal(1, "abcd", halves[0], "a") is RejectionReason.NOT_CONFIRMED
    assert server.find_refusal(1, "abcd", halves[0] | halves[1], "a") is RejectionReason.WRONG_SIGNATURE
    assert server.find_refusal(1, "abc", halves[1], "c") is RejectionReason.NOT_CONFIRMED
    assert server.knowledge.find_readable_sums() == []


def test_skipping_confirmation_would_let_a_server_unmask_two_sites() -> None:
    """Motivates the confirmations: no set has enough helpers here, but their combined shares unmask a sum of a and b.

    At least three sets exclude c, d or e each, so three sites reveal its masks with a and with b.
    """
    sets = dict(zip("abcde", ("abc", "abc", "abd", "abd", "abe"), strict=True))
    server = Adversary(5, 3)
    server.upload(1, "abcde")
    genuine = {site: server.confirm(1, survivors, by=site) for site, survivors in sets.items()}
    for site, survivors in sets.items():
        signatures = server.confirm(1, survivors, by="abcde")
        assert len(signatures) < 3
        assert server.find_refusal(1, survivors, genuine[site], site) is RejectionReason.NOT_CONFIRMED
    assert server.knowledge.find_readable_sums() == []
    for site, survivors in sets.items():  # as if enough other sites had confirmed each one's set
        request = server.federation.request(1, survivors)
        forged = {
            other: make_identity(other).sign("secure aggregation survivors", request.to_bytes()) for other in "abcde"
        }
        server.unmask(1, survivors, forged, by=site)
    assert server.knowledge.find_readable_sums() == [{0: 1, 1: 1}]


@pytest.mark.parametrize("threshold", [2, 3])
def test_unmasking_requires_threshold_many_valid_confirmations(threshold: int) -> None:
    server = Adversary(3, threshold)
    server.upload(1, "abc")
    signatures = server.confirm(1, "abc", by="abc")
    sufficient = dict(list(signatures.items())[:threshold])
    too_few = dict(list(signatures.items())[: threshold - 1])
    assert server.find_refusal(1, "abc", too_few, "a") is RejectionReason.NOT_CONFIRMED
    assert server.find_refusal(1, "abc", {**too_few, "z": signatures["a"]}, "a") is RejectionReason.NOT_A_MEMBER
    assert server.find_refusal(1, "abc", {**too_few, "c": signatures["a"]}, "a") is RejectionReason.WRONG_SIGNATURE
    assert server.find_refusal(1, "abc", {**too_few, "c": ""}, "a") is RejectionReason.WRONG_SIGNATURE
    server.unmask(1, "abc", sufficient, by="a")


def test_confirmations_are_not_valid_for_another_release_or_session() -> None:
    server = Adversary(3, 2)
    server.upload(1, "abc")
    old = server.confirm(1, "abc", by="abc")
    server.upload(2, "abc")
    server.confirm(2, "abc", by="a")
    assert server.find_refusal(2, "abc", old, "a") is RejectionReason.WRONG_SIGNATURE
    assert server.find_refusal(1, "abc", old, "a") is RejectionReason.NOT_PROMISED  # release 1 is over
    with expect_rejection(RejectionReason.RELEASE_OVER):
        server.federation.parties["a"].confirm(server.federation.request(1, "abc").to_bytes())
    for site in "abc":
        server.federation.restart(site)
    server.federation.begin_session()
    with expect_rejection(RejectionReason.SESSION_DIFFERS):
        server.federation.parties["a"].confirm(
            change_message(
                server.federation.request(1, "abc").to_bytes(), session=server.knowledge.sent[0].upload.session
            )
        )
    server.upload(1, "abc")
    server.confirm(1, "abc", by="abc")
    assert server.find_refusal(1, "abc", old, "a") is RejectionReason.WRONG_SIGNATURE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *(({"survivors": list(sites)}, RejectionReason.TOO_FEW_SURVIVORS) for sites in ("ab", "a", "")),
        *(
            ({"survivors": list(other)}, RejectionReason.MALFORMED)
            for other in ("aab", "bac", ("a", "b", 3), ("a", "b", ["c"]))
        ),
        *(({"survivors": other}, RejectionReason.MALFORMED) for other in ("abc", None)),
        ({"survivors": ["a", "b", "z"]}, RejectionReason.NOT_A_MEMBER),
        *(({"release": other}, RejectionReason.MALFORMED) for other in (0, -1, 1 << 31, True, 1.0, "1", None)),
    ],
)
def test_invalid_survivor_sets_are_rejected(change: dict[str, Any], reason: RejectionReason) -> None:
    federation = Federation(make_terms(4, 3))
    with expect_rejection(reason):
        federation.parties["a"].confirm(change_message(federation.request(1, "abc").to_bytes(), **change))


def test_site_reveals_only_one_kind_of_share_per_survivor() -> None:
    server = Adversary(5, 3)
    server.upload(1, "abcde")
    signatures = server.confirm(1, "abcd", by="abcde")
    request = server.request(1, "abcd", signatures, "a")
    answer = server.federation.parties["a"].unmask(request)
    revealed = {dealer: set(shares) for dealer, shares in json.loads(answer)["shares"].items()}
    # For each survivor: the seed of its own mask and of its mask with the dropped site, and no other pair's seed.
    assert revealed == {"a": {"a", "e"}, "b": {"b", "e"}, "c": {"c", "e"}, "d": {"d", "e"}}
    # Nor instead of a survivor's share: what e sealed for a, presented as if d had sealed it.
    sealed_by_e = json.loads(server.request(1, "abcde", signatures, "a"))["sealed"]["e"]
    swapped = change_message(request, sealed={**json.loads(request)["sealed"], "d": sealed_by_e})
    assert json.loads(server.federation.parties["a"].unmask(swapped))["shares"]["d"] == {}


def test_shares_of_an_earlier_release_are_not_revealed_later() -> None:
    """The server requests a dropped site's seeds of release 1 after the site has survived release 2."""
    server = Adversary(4, 3)
    server.upload(1, "abcd")
    server.unmask(1, "abc", server.confirm(1, "abc", by="abcd"), by="abc")
    server.upload(2, "abcd")
    signatures = server.confirm(2, "abcd", by="abcd")
    for site in "abcd":
        earlier = server.request(1, "abcd", signatures, site)
        request = change_message(server.request(2, "abcd", signatures, site), sealed=json.loads(earlier)["sealed"])
        answer = server.federation.parties[site].unmask(request)
        assert all(share == {} for share in json.loads(answer)["shares"].values())
    assert server.knowledge.find_readable_sums() == [{0: 1, 1: 1, 2: 1}]


def test_site_uploads_once_per_release_and_retries_as_a_new_release() -> None:
    server = Adversary(4, 3)
    server.upload(2, "abcd")
    for release in (2, 1, 0, -1, 1 << 31, 1 << 40):
        with expect_rejection(RejectionReason.RELEASE_OVER):
            server.federation.parties["a"].upload(release, server.federation.make_vector("a"))
    server.upload(3, "abcd")
    first, retry = server.knowledge.sent[0], server.knowledge.sent[4]
    assert not set(first.seeds.values()) & set(retry.seeds.values())
    # A site that confirmed a release's set without an upload must not upload to it afterwards.
    server.confirm(4, "abc", by="d")
    with expect_rejection(RejectionReason.RELEASE_OVER):
        server.federation.parties["d"].upload(4, server.federation.make_vector("d"))


# Arbitrary bytes from the network.


def list_messages(federation: Federation) -> dict[str, bytes]:
    summation = federation.add_confirmations(federation.start_release(1, "ab"), by="ab")
    return {
        "join": federation.parties["b"].announce(),
        "confirm": summation.build_confirm_request(),
        "unmask": summation.build_unmask_request("a"),
        "add_upload": federation.parties["c"].upload(1, federation.make_vector("c")),
        "add_confirmation": federation.parties["b"].confirm(summation.build_confirm_request()),
        "add_revealed": federation.parties["b"].unmask(summation.build_unmask_request("b")),
    }


def deliver_message(federation: Federation, step: str, data: bytes) -> None:
    summation = federation.start_release(2, "ab")
    federation.add_confirmations(summation, by="a")
    if step == "join":
        federation.restart("a").join([data])
    elif step in ("confirm", "unmask"):
        getattr(federation.parties["a"], step)(data)
    else:
        getattr(summation, step)("b", data)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["join", "confirm", "unmask", "add_upload", "add_confirmation", "add_revealed"]), st.data())
def test_arbitrary_messages_are_accepted_or_rejected_with_a_known_reason(step: str, data: st.DataObject) -> None:
    federation = Federation(make_terms(3, 2))
    genuine = list_messages(federation)[step]
    kind = data.draw(st.sampled_from(["bytes", "cut", "flipped", "field", "large"]))
    if kind == "bytes":
        message = data.draw(st.binary(max_size=200))
    elif kind == "cut":
        message = genuine[: data.draw(st.integers(0, len(genuine) - 1))]
    elif kind == "flipped":
        index = data.draw(st.integers(0, len(genuine) - 1))
        message = genuine[:index] + bytes([genuine[index] ^ data.draw(st.integers(1, 255))]) + genuine[index + 1 :]
    elif kind == "field" and step != "add_upload":
        fields = json.loads(genuine)
        name = data.draw(st.sampled_from(sorted(fields)))
        fields[name] = data.draw(draw_json())
        message = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    else:
        message = genuine + b" " * (1 << 20)
    rejection = None
    try:
        deliver_message(federation, step, message)
    except Rejected as error:
        rejection = error
    assert rejection is None or str(rejection) == f"secure aggregation: {RejectionReason(rejection.wrong)}"
    assert rejection is not None or kind not in ("cut", "large")


@pytest.mark.parametrize("step", ["join", "confirm", "unmask", "add_confirmation", "add_revealed"])
@pytest.mark.parametrize("data", [b"[" * 100_000, b"1" * 5000, b"\xff\xfe{}", b'{"a":1,"a":1}', b"NaN", b"null", b""])
def test_undecodable_messages_are_rejected_as_malformed(step: str, data: bytes) -> None:
    with expect_rejection(RejectionReason.MALFORMED):
        deliver_message(Federation(make_terms(3, 2)), step, data)
