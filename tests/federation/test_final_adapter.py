"""The end of a run: its lead says it, the ledger notes which adapter came of it, and the site keeps that or not."""

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.federation.protocol import EndOfRun
from fedtune.federation.site_round import end_run
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Reason

from ..builders import with_methods
from ..privacy.builders import lead_key, reason_of, stranger_key


@pytest.fixture
def final(adapter: Adapter) -> Adapter:
    return Adapter({name: value * 3 for name, value in adapter.tensors.items()})


def ends(site: Any) -> list[dict[str, Any]]:
    return [dict(event.detail) for event in site.events() if event.detail.get("what") == "run_ended"]


def test_the_final_adapter_is_kept_and_its_digest_is_in_the_ledger(site: Any, final: Adapter) -> None:
    site.ask()
    receipt = site.end(adapter=final, digest=final.digest())
    assert site.kept == [("r", final.digest())]
    assert ends(site) == [{"what": "run_ended", "adapter_sha256": final.digest()}]
    assert (receipt.run, receipt.charged_rounds) == ("r", 1)
    assert receipt.is_signed()
    assert receipt.site_key == site.key.public
    assert receipt.sequence == len(site.events()), "it covers the note of the end"


@pytest.mark.parametrize("declines", [True, False], ids=["declined", "none came"])
def test_without_an_adapter_the_end_is_noted_all_the_same(station: Any, final: Adapter, declines: bool) -> None:
    site = station(final_adapter="decline") if declines else station()
    site.ask()
    digest = final.digest() if declines else ""
    assert site.end(adapter=final if declines else None, digest=digest).charged_rounds == 1
    assert ends(site) == [{"what": "run_ended", "adapter_sha256": digest}]
    assert site.kept == []


def test_another_adapter_than_was_signed_for_is_neither_kept_nor_noted(site: Any, final: Adapter) -> None:
    site.ask()
    before = site.events()
    for digest in (site.template.digest(), "", "00" * 32):
        assert reason_of(site.end, adapter=final, digest=digest) is Reason.ADAPTER_DIFFERS
    assert site.kept == []
    assert site.events() == before, "the run goes on"
    assert site.ledger().history.runs["r"].expires is not None


def test_a_second_notice_changes_nothing_and_exchanges_no_adapter(site: Any, final: Adapter) -> None:
    # The lead may not have heard the first answer.  Of another adapter the ledger would not know.
    site.ask()
    first = site.end(adapter=final, digest=final.digest())
    before = site.events()
    assert site.end(adapter=final, digest=final.digest()) == first
    other = Adapter({name: value + 1 for name, value in final.tensors.items()})
    site.end(adapter=other, digest=other.digest())
    assert site.events() == before
    assert set(site.kept) == {("r", final.digest())}


def test_another_lead_ends_nothing_and_gives_no_adapter(station: Any, final: Adapter) -> None:
    site = station(allow={"leads": (lead_key.public, stranger_key.public)})
    site.ask()
    without = replace(site.policy, allow=replace(site.policy.allow, leads=(stranger_key.public,)))
    for key, policy in ((stranger_key, site.policy), (lead_key, without)):
        site.policy = policy
        assert reason_of(site.end, key=key, adapter=final, digest=final.digest()) is Reason.LEADS
    forged = EndOfRun(run="r", lead=lead_key.public).signed(stranger_key)
    assert reason_of(end_run, site.open(), forged, final) is Reason.WRONG_SIGNATURE
    assert site.kept == ends(site) == []


def test_an_adapter_that_cannot_be_stored_is_asked_for_again(site: Any, final: Adapter) -> None:
    full = Mock(side_effect=OSError("no space left on device"))
    site.ask()
    notice = EndOfRun(run="r", lead=site.lead.public, adapter_digest=final.digest()).signed(site.lead)
    with pytest.raises(OSError, match="no space left"):
        end_run(with_methods(site.open(), keep=full), notice, final)
    assert site.ledger().history.runs["r"].expires is None, "what was set aside is free all the same"
    end_run(site.open(), notice, final)
    assert site.kept == [("r", final.digest())]
