from typing import Any

import pytest

from fedtune.federation.spec import FederationSpec
from fedtune.spec import ConfigError


def test_names_and_who_takes_part() -> None:
    assert FederationSpec(num_sites=2).names == FederationSpec(num_sites=2).active == ("site-1", "site-2")
    named = FederationSpec(num_sites=3, site_names=("a", "b", "c"), participants=("c", "a"))
    assert named.names == ("a", "b", "c")
    assert named.active == ("a", "c"), "in the order of the names, which the sum of updates keeps"


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("min_sites", {"num_sites": 3, "participants": ("site-1",), "min_sites": 2}),
        ("enough_sites", {"min_sites": 2, "enough_sites": 1}),
        ("strategy", {"num_sites": 3, "aggregation": "secure", "strategy": "fedavgm"}),
    ],
)
def test_settings_that_do_not_go_together(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        FederationSpec(**({"num_sites": 2} | changes))
    assert error.value.key == key


def test_a_secure_sum_needs_no_update_dtype() -> None:
    for dtype in ("bfloat16", "float32"):
        spec = FederationSpec(num_sites=3, aggregation="secure", update_dtype=dtype)  # type: ignore[arg-type]
        assert spec.together is not None
    assert FederationSpec(num_sites=3, aggregation="secure").update_dtype == "bfloat16"
