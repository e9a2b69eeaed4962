"""The stopping rule of a lead: k of n, grace period and idle sites; and contradictory federation settings."""

import json
from unittest.mock import Mock

import pytest

from fedtune.federation.replies import StoppingRule
from fedtune.federation.spec import FederationSpec
from fedtune.spec import ConfigError

from ..cli import snapshots

# A round of four sites, one line per check of the lead: seconds elapsed, good updates, sites at work, other sites, and
# whether the round is over.
SCENARIOS: dict[str, list[tuple[float, int, int, int, bool]]] = {
    "every site at work is waited for": [(1000, 3, 1, 0, False)] * 10,
    "enough updates are waited for": [(1000, 1, 0, 3, False)] * 10,
    "one absent site costs the grace period": [(0, 3, 0, 1, False), (59.9, 3, 0, 1, False), (0.2, 3, 0, 1, True)],
    "a site that comes back and works starts it anew": [
        *((0, 2, 0, 2, False), (50, 2, 1, 1, False), (50, 2, 0, 2, False), (61, 2, 0, 2, True)),
    ],
    "three have refused": [(0, 1, 0, 0, True)],
    "one may still come": [(0, 1, 0, 1, False)],
    "everybody's answer is heard": [(0, 0, 1, 0, False)],
    "three are enough": [(0, 2, 2, 0, False), (1000, 3, 1, 0, False), (60, 3, 1, 0, True)],
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_stopping_rule_ends_the_wait_as_specified(scenario: str) -> None:
    clock, enough_sites = Mock(return_value=100.0), 3 if scenario == "three are enough" else None
    rule = StoppingRule(
        FederationSpec(num_sites=4, min_sites=2, straggler_grace_s=60.0, enough_sites=enough_sites), clock=clock
    )
    for number, (seconds, good, at_work, others, over) in enumerate(SCENARIOS[scenario]):
        clock.return_value += seconds
        assert rule.is_over(good=good, at_work=at_work, others=others) is over, number


def test_participants_keep_the_order_of_site_names() -> None:
    assert FederationSpec(num_sites=2).names == FederationSpec(num_sites=2).active == ("site-1", "site-2")
    spec = FederationSpec(num_sites=3, site_names=("a", "b", "c"), participants=("c", "a"))
    assert spec.names == ("a", "b", "c")
    assert spec.active == ("a", "c"), "the order of names determines the sum of updates"


@snapshots.parametrize_mistakes("mistakes-closing")
def test_contradictory_federation_settings_are_refused(typed: str) -> None:
    with pytest.raises(ConfigError) as error:
        FederationSpec(**{"num_sites": 2} | json.loads(typed))
    snapshots.check_message("mistakes-closing", typed, str(error.value))


def test_secure_aggregation_works_without_an_update_dtype() -> None:
    for dtype in ("bfloat16", "float32"):
        spec = FederationSpec(num_sites=3, aggregation="secure", update_dtype=dtype)  # type: ignore[arg-type]
        assert spec.together is not None
    assert FederationSpec(num_sites=3, aggregation="secure").update_dtype == "bfloat16"


def test_error_about_too_few_sites_points_to_the_log_of_a_failed_site() -> None:
    federation = FederationSpec(num_sites=2, min_sites=2)
    text = federation.explain_too_few(1, "sent an update", others={"site-2": "site_error"})
    assert text.endswith("(site-2: site_error; for site_error, read the site's log)")
    assert federation.explain_too_few(1, "sent an update", others={"site-2": "paused"}).endswith("(site-2: paused)")
