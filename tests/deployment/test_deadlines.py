"""Rounds that end without everybody: late and absent sites, how many a round needs, and what each has room for."""

import signal
import time
from collections.abc import Callable

import pytest

from fedtune.privacy.policy_file import write_policy
from fedtune.privacy.site_files import SiteFiles

from ..processes import wait_for
from .books import check_books
from .federation import NAMES, Federation, settings

pytestmark = pytest.mark.nightly

DEADLINE_S = 10.0
"""Several times what a round takes once models are loaded, also on a slow machine."""
TWO_OF_THREE = (f"federation.round_timeout_s={DEADLINE_S}", "federation.min_sites=2")
SOON = "federation.grace_s=1"
"""Who is away is not waited for where enough have answered: only who is at work, or too few, take a whole deadline."""


@pytest.fixture(scope="module")
def some(make_federation: Callable[..., Federation]) -> Federation:
    """A federation whose sites can be held up in a round; west is yet to be started."""
    made = make_federation()
    made.start("north", "south", held=True)
    return made


@pytest.fixture
def federation(some: Federation) -> Federation:
    """The same with all of its sites, whatever became of them in an earlier test."""
    down = [site for site in some.sites.values() if site.up is None or site.up.code is not None]
    for site in down:
        site.start(held=True, wait=False)
    for site in down:
        site.wait_until_up()
    return some


def test_a_round_goes_on_with_enough_sites_and_ends_at_its_deadline_with_fewer(some: Federation) -> None:
    federation = some
    leaves, absent = federation.sites["south"], federation.sites["west"]
    assert absent.up is None
    lead = leaves.held_in("few", *settings(*TWO_OF_THREE, SOON))
    # It ends with the round that it is in, while the lead is slow to fetch its answer, and gets it all the same.
    lead.signal(signal.SIGSTOP)
    leaves.up.ask_to_end()
    leaves.hold(False)
    wait_for(lambda: leaves.answered("update", "few"), seconds=60, what="south to answer")
    time.sleep(1.0)
    lead.signal(signal.SIGCONT)
    assert leaves.up.end(seconds=60) == 0
    assert lead.end() == 1
    words = "round 2: 1 of 3 sites sent an update, and federation.min_sites = 2 are needed"
    said = " ".join(lead.text.split())
    assert f"{words} (south: no_reply, west: no_reply)" in said
    assert "Continue with: fedtune run resume" in said
    assert "Traceback" not in said
    result = federation.result("few")
    (first,) = result["rounds"]
    assert (first["sites"], first["failed_sites"]) == (["north", "south"], {"west": "no_reply"})
    assert not absent.events("few")
    # The last receipts are from before the round that failed: what was charged since is bounded, never left out.
    for name, about in result["privacy"]["sites"].items():
        assert about["upper_bound"]
        assert about["rounds"] >= len(federation.sites[name].events("few", "reserve"))


def test_a_late_update_is_not_counted(federation: Federation) -> None:
    late, others = federation.sites["west"], (federation.sites["north"], federation.sites["south"])
    lead = late.held_in("late", *settings(*TWO_OF_THREE))
    late.up.signal(signal.SIGSTOP)
    for site in others:
        site.wait_for("late", "reserve", round=2, lead=lead)
    assert not late.events("late", "commit")
    late.hold(False)
    late.up.signal(signal.SIGCONT)
    assert lead.end() == 0, lead.text
    first, second = federation.result("late")["rounds"]
    assert (first["sites"], first["failed_sites"]) == (["north", "south"], {"west": "no_reply"})
    assert DEADLINE_S <= first["seconds"] < 2 * DEADLINE_S
    assert (second["sites"], second["failed_sites"]) == (list(NAMES), {})
    # It was charged for both, and its first update is in no average.
    check_books(federation, "late", uncounted={"west": [1]})


def test_a_run_is_fitted_to_what_every_site_has_room_for_before_anybody_pays(federation: Federation) -> None:
    site = federation.sites["south"]
    policy = SiteFiles.of(site.site_toml).policy
    site.edit(limits={"max_rounds": 1})
    asked = settings("federation.num_rounds=3", "federation.min_sites=3")
    try:
        fitted = federation.finish("fitted", *asked, "federation.if_over_budget=fewer_rounds")
    finally:
        write_policy(policy, site.site_toml)
    assert "The sites' budgets have room for 1 rounds" in " ".join(fitted.text.split())
    (only,) = federation.result("fitted")["rounds"]
    assert only["sites"] == list(NAMES)
    check_books(federation, "fitted")
