"""The lead learns exactly the survivors' sum for every pattern of dropouts, or the release fails with a reason."""

import contextlib
import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.federation.secure.agreement import Rejected, RejectionReason
from fedtune.federation.secure.messages import MAX_JSON_BYTES, compute_upload_size
from fedtune.federation.secure.party import Party, SumConfirmation
from fedtune.federation.secure.shares import PRIME
from fedtune.federation.secure.summation import Summation, UnmaskingError

from .parties import LARGEST, Federation, change_message, expect_rejection, make_identity, make_terms, resign_answer


@pytest.mark.parametrize(("num_sites", "threshold"), [(2, 2), (3, 2), (3, 3), (4, 3)])
def test_masks_cancel_for_all_survivor_and_helper_sets(num_sites: int, threshold: int) -> None:
    federation = Federation(make_terms(num_sites, threshold))
    sites = federation.terms.sites
    sets = [subset for size in range(threshold, num_sites + 1) for subset in itertools.combinations(sites, size)]
    for release, (survivors, helpers) in enumerate(itertools.product(sets, sets), start=1):
        summation = federation.add_confirmations(federation.start_release(release, survivors), by=helpers)
        total = federation.add_shares(summation, by=helpers).compute_total()
        assert total.tolist() == federation.add_vectors(survivors).tolist()
        assert not summation.wrong_shares


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 4), st.integers(1, 2**40), st.data())
def test_secure_aggregation_is_exact_up_to_the_largest_value(num_sites: int, largest: int, data: st.DataObject) -> None:
    federation = Federation(make_terms(num_sites, num_sites, length=3, largest=largest))
    value = st.one_of(st.sampled_from([-largest, largest]), st.integers(-largest, largest))
    vectors = [np.array(data.draw(st.lists(value, min_size=3, max_size=3))) for _ in federation.terms.sites]
    summation = Summation(federation.session, release=1)
    for site, vector in zip(federation.terms.sites, vectors, strict=True):
        summation.add_upload(site, federation.parties[site].upload(1, vector))
    sites = federation.terms.sites
    total = federation.add_shares(federation.add_confirmations(summation, by=sites), by=sites).compute_total()
    assert total.tolist() == np.sum(vectors, axis=0).tolist()


def test_messages_fit_twenty_sites_with_the_longest_names() -> None:
    names = [f"{'x' * 98}{number:02}" for number in range(20)]
    federation = Federation(make_terms(20, 14, members={name: make_identity(name).public for name in names}))
    summation = federation.add_confirmations(federation.start_release(1, names[:14]), by=names)
    request = summation.build_unmask_request(names[0])
    assert len(request) < MAX_JSON_BYTES / 2
    assert len(federation.parties[names[0]].unmask(request)) < MAX_JSON_BYTES / 2
    assert federation.add_shares(summation, by=names).compute_total().tolist() == [2**14 - 1] * 4
    # An upload has the size that its terms state, and little more than the vector.
    terms = make_terms(4, 3, length=1001)
    sites = Federation(terms)
    size = len(sites.parties["a"].upload(1, sites.make_vector("a")))
    assert size == compute_upload_size(len(terms.members), length=terms.length, bits=terms.bits)
    assert size - (1001 * terms.bits + 7) // 8 < 2000


def test_out_of_range_values_are_not_clipped_before_summation() -> None:
    """A sum of individually clipped values is not a function of the true sum, which is all that the noise protects."""
    federation = Federation(make_terms(2, 2, length=2))
    summation = Summation(federation.session, release=1)
    summation.add_upload("a", federation.parties["a"].upload(1, np.array([2**62, 3 * LARGEST])))
    summation.add_upload("b", federation.parties["b"].upload(1, np.array([5 - 2**62, -2 * LARGEST])))
    total = federation.add_shares(federation.add_confirmations(summation, by="ab"), by="ab").compute_total()
    assert total.tolist() == [5, LARGEST]


# Dropouts in each phase.


def test_too_few_messages_end_only_the_current_release() -> None:
    with pytest.raises(UnmaskingError, match=r"release 1 .* 2 sites uploaded, but 3 are required"):
        Federation(make_terms(4, 3)).start_release(1, "ab").build_confirm_request()
    federation = Federation(make_terms(4, 3))
    incomplete = federation.add_confirmations(federation.start_release(1, "abcd"), by="ab")
    with pytest.raises(UnmaskingError, match="2 sites confirmed the survivors, but 3 are required"):
        incomplete.build_unmask_request("a")
    summation = federation.add_shares(
        federation.add_confirmations(federation.start_release(2, "abcd"), by="abc"), by="ab"
    )
    with pytest.raises(UnmaskingError, match="2 sites sent shares, but 3 are required") as error:
        summation.compute_total()
    assert error.value.site is None
    # d helps although it did not upload
    summation = federation.add_confirmations(federation.start_release(3, "abc"), by="abd")
    assert federation.add_shares(summation, by="abd").compute_total().tolist() == federation.add_vectors("abc").tolist()


def test_restarted_site_is_excluded_until_a_new_session() -> None:
    federation = Federation(make_terms(3, 2))
    summation = federation.start_release(1, "abc")
    party = federation.restart("c")
    with pytest.raises(Rejected):
        party.confirm(summation.build_confirm_request())
    total = federation.add_shares(federation.add_confirmations(summation, by="ab"), by="ab").compute_total()
    assert total.tolist() == federation.add_vectors("abc").tolist()  # c had uploaded; two of three helpers suffice
    old = federation.session.digest
    for site in "ab":
        federation.restart(site)
    federation.begin_session()
    assert federation.session.digest != old
    summation = federation.add_confirmations(federation.start_release(2, "abc"), by="abc")
    assert federation.add_shares(summation, by="abc").compute_total().tolist() == federation.add_vectors("abc").tolist()


# Sites that send wrong values.


def test_wrong_shares_are_detected_attributed_and_ignored() -> None:
    federation = Federation(make_terms(5, 3))
    summation = federation.add_confirmations(federation.start_release(1, "abcd"), by="abcde")
    federation.add_shares(summation, by="abc")
    for liar in "de":
        answer = federation.parties[liar].unmask(summation.build_unmask_request(liar))
        shares = json.loads(answer)["shares"]
        shares["a"]["e"] = f"{(int(shares['a']['e'], 16) + 1) % PRIME:066x}"
        shares["b"]["b"] = f"{PRIME - 1:066x}"
        summation.add_revealed(liar, resign_answer(answer, shares=shares))
    assert summation.compute_total().tolist() == federation.add_vectors("abcd").tolist()
    assert summation.wrong_shares == {("d", "a"), ("d", "b"), ("e", "a"), ("e", "b")}


def test_too_many_wrong_shares_end_the_release() -> None:
    federation = Federation(make_terms(3, 2))
    summation = federation.add_confirmations(federation.start_release(1, "abc"), by="abc")
    federation.add_shares(summation, by="a")
    for liar in "bc":
        answer = federation.parties[liar].unmask(summation.build_unmask_request(liar))
        summation.add_revealed(
            liar, resign_answer(answer, shares={**json.loads(answer)["shares"], "c": {"c": "0" * 66}})
        )
    with pytest.raises(
        UnmaskingError, match="1 sites sent correct unmasking shares for c, but 2 are required"
    ) as error:
        summation.compute_total()
    assert error.value.site is None, "either c or the other two may be at fault"
    assert summation.wrong_shares == {("b", "c"), ("c", "c")}


def flip_upload_bit(number: int) -> tuple[Federation, Summation]:
    """Complete a release of a, b and c in which one 32-byte block of c's upload has a flipped bit."""
    federation = Federation(make_terms(3, 2))
    summation = federation.start_release(1, "ab")
    data = bytearray(federation.parties["c"].upload(1, federation.make_vector("c")))
    data[len(b"fedtune-secure-upload-1\n") + 37 + number * 32] ^= 1
    summation.add_upload("c", bytes(data))
    return federation, federation.add_shares(federation.add_confirmations(summation, by="abc"), by="abc")


def test_dealer_of_inconsistent_shares_is_named() -> None:
    _, summation = flip_upload_bit(2 * 4)  # the digest of the seed of its own mask
    with pytest.raises(UnmaskingError, match="c sent inconsistent shares") as error:
        summation.compute_total()
    assert error.value.site == "c"
    federation, summation = flip_upload_bit(3 * 4)  # the share that it sealed for a
    assert summation.compute_total().tolist() == federation.add_vectors("abc").tolist()
    assert summation.wrong_shares == {("a", "c")}


def test_lead_accepts_each_message_once_from_its_own_site() -> None:
    federation = Federation(make_terms(4, 3))
    late = federation.parties["d"].upload(1, federation.make_vector("d"))
    first = federation.parties["a"].upload(1, federation.make_vector("a"))
    summation = federation.start_release(1, "bc")
    summation.add_upload("a", first)
    upload = federation.parties["a"].upload(2, federation.make_vector("a"))
    for site, data, reason in [
        ("a", first, RejectionReason.REPEATED),
        ("b", upload, RejectionReason.NOT_A_MEMBER),
        ("a", upload, RejectionReason.RELEASE_OVER),
        ("a", upload[:-1], RejectionReason.MALFORMED),
        ("a", b"", RejectionReason.MALFORMED),
        ("a", bytes(len(upload)), RejectionReason.MALFORMED),
    ]:
        with expect_rejection(reason):
            summation.add_upload(site, data)
    other = Federation(federation.terms)
    with expect_rejection(RejectionReason.SESSION_DIFFERS):
        summation.add_upload("a", other.parties["a"].upload(1, other.make_vector("a")))
    federation.add_confirmations(summation, by="bc")
    with expect_rejection(RejectionReason.RELEASE_OVER):
        summation.add_upload("d", late)
    confirmation = federation.parties["d"].confirm(summation.build_confirm_request())
    with expect_rejection(RejectionReason.NOT_A_MEMBER):
        summation.add_confirmation("a", confirmation)
    summation.add_confirmation("d", confirmation)
    answer = federation.parties["d"].unmask(summation.build_unmask_request("d"))
    with expect_rejection(RejectionReason.NOT_A_MEMBER):
        summation.add_revealed("b", answer)
    for change in ({"shares": {"a": []}}, {"shares": {"a": {"a": "xx"}}}, {"shares": {"a": {"a": 1}}}):
        with expect_rejection(RejectionReason.MALFORMED):
            summation.add_revealed("d", change_message(answer, **change))


def test_shares_are_accepted_only_with_the_signature_of_their_site() -> None:
    """Without signatures, a relay could replace correct shares by wrong shares and get the site blamed."""
    federation = Federation(make_terms(4, 3))
    summation = federation.add_confirmations(federation.start_release(1, "abcd"), by="abcd")
    federation.add_shares(summation, by="abc")
    answer = federation.parties["d"].unmask(summation.build_unmask_request("d"))
    shares, signature = json.loads(answer)["shares"], json.loads(answer)["signature"]
    other_signature = json.loads(federation.parties["c"].unmask(summation.build_unmask_request("c")))["signature"]
    confirmation = json.loads(federation.parties["d"].confirm(summation.build_confirm_request()))["signature"]
    changes: list[dict[str, Any]] = [
        {"shares": {**shares, "a": {"a": "0" * 66}}},
        {"shares": {**shares, "a": {}}},
        {"shares": {}},
        *({"signature": value} for value in ("", signature.upper(), "0" * 128, other_signature, confirmation)),
    ]
    for change in changes:
        with expect_rejection(RejectionReason.WRONG_SIGNATURE):
            summation.add_revealed("d", change_message(answer, **change))
    assert summation.compute_total().tolist() == federation.add_vectors("abcd").tolist()
    assert not summation.wrong_shares
    with expect_rejection(RejectionReason.WRONG_SIGNATURE):  # a signature for another release
        summation.add_revealed("d", change_message(answer, release=2))


class FaultyRelease:
    """A release with random faults in the sites' messages and an honest lead."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.federation = Federation(make_terms(5, 3))
        self.sites = list(self.federation.terms.sites)
        self.faulty = self.rng.sample(self.sites, self.rng.randint(0, 3))
        self.summation = Summation(self.federation.session, release=1)

    def send(self, add: Callable[[str, bytes], None], site: str, build: Callable[[Party], bytes]) -> None:
        """Deliver one message, possibly modified; a rejected message counts as lost."""
        fault = self.rng.choice(["drops", "restarts", "garbage", "flips", "swaps", ""]) if site in self.faulty else ""
        if fault == "restarts":
            self.federation.restart(site)
        with contextlib.suppress(Rejected):
            data = build(self.federation.parties[site])
            if fault == "flips":
                index = self.rng.randrange(len(data))
                data = data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
            elif fault in ("drops", "garbage"):
                data = fault.encode()
            add(self.rng.choice(self.sites) if fault == "swaps" else site, data)

    def total(self) -> npt.NDArray[np.int64]:
        for site in self.sites:
            vector = self.federation.make_vector(site)
            self.send(self.summation.add_upload, site, lambda party, vector=vector: party.upload(1, vector))
        request = self.summation.build_confirm_request()
        for site in self.sites:
            self.send(self.summation.add_confirmation, site, lambda party: party.confirm(request))
        for site in self.sites:
            unmask = self.summation.build_unmask_request(site)
            self.send(self.summation.add_revealed, site, lambda party, unmask=unmask: party.unmask(unmask))
        return self.summation.compute_total()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32))
def test_release_with_faulty_sites_is_correct_or_raises_unreadable(seed: int) -> None:
    """Sites drop out in any phase, restart, and send garbage, wrong shares or messages in another site's name."""
    release = FaultyRelease(seed)
    error = None
    try:
        total = release.total()
    except UnmaskingError as unreadable:
        error = unreadable
    honest = set(release.sites) - set(release.faulty)
    if error is not None:
        assert str(error).startswith("the sum of secure aggregation release 1 cannot be computed: ")
        assert release.faulty
        # With three honest sites, only the faulty one's own seeds can be wrong; a site named with certainty is faulty.
        assert len(honest) < 3 or error.site is not None or release.summation.wrong_shares
        assert error.site is None or error.site in release.faulty
        assert all(set(pair) & set(release.faulty) for pair in release.summation.wrong_shares)
        return
    assert honest <= set(release.summation.survivors)
    # A faulty site can change its own vector undetected, but no other vector.
    if not set(release.summation.survivors) & set(release.faulty):
        assert np.array_equal(total, release.federation.add_vectors(honest))


def test_confirmations_are_stored_before_they_are_sent() -> None:
    federation = Federation(make_terms(3, 2))
    summation = federation.add_confirmations(federation.start_release(1, "abc"), by="ab")
    session, survivors = federation.session.digest, ("a", "b", "c")
    promised = SumConfirmation(session=session, release=1, survivors=survivors, confirmed=False)
    assert federation.promises == {"a": [promised], "b": [promised], "c": []}
    federation.add_shares(summation, by="a")
    confirmed = SumConfirmation(session=session, release=1, survivors=survivors, confirmed=True)
    assert federation.promises == {"a": [promised, confirmed], "b": [promised], "c": []}


def test_confirmation_that_cannot_be_stored_is_not_sent() -> None:
    federation = Federation(make_terms(4, 3))
    summation = federation.add_confirmations(federation.start_release(1, "abcd"), by="bcd")
    promises = federation.promises["a"]

    def fail(_: SumConfirmation) -> None:
        raise OSError("disk full")

    federation.parties["a"]._keep = fail
    with pytest.raises(OSError, match="disk full"):
        federation.parties["a"].confirm(summation.build_confirm_request())
    federation.parties["a"]._keep = promises.append
    with expect_rejection(RejectionReason.SURVIVORS_CHANGED):
        federation.parties["a"].confirm(federation.request(1, "abc").to_bytes())
    federation.add_confirmations(summation, by="a")
    assert len(promises) == 1
    federation.parties["a"]._keep = fail
    with pytest.raises(OSError, match="disk full"):
        federation.parties["a"].unmask(summation.build_unmask_request("a"))
