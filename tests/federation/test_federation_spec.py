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
        *(("num_rounds", {"num_rounds": 0}), ("num_sites", {"num_sites": 0}), ("min_sites", {"min_sites": 0})),
        ("min_sites", {"min_sites": 3}),
        ("min_sites", {"num_sites": 3, "participants": ("site-1",), "min_sites": 2}),
        *(("spare_rounds", {"spare_rounds": -1}), ("site_names", {"site_names": ("a",)})),
        *(("site_names", {"site_names": ("a", "a")}), ("site_names", {"site_names": ("a", "../b")})),
        *(("site_names", {"site_names": ("a", "")}), ("site_names", {"site_names": ("a", "é")})),
        *(("site_names", {"site_names": ("a", "_b")}), ("site_names", {"site_names": ("a", "lead_key.pem")})),
        *(("if_over_budget", {"if_over_budget": "ignore"}), ("participants", {"participants": ("site-9",)})),
        *(("enough_sites", {"min_sites": 2, "enough_sites": 1}), ("enough_sites", {"enough_sites": 3})),
        *(("grace_s", {"grace_s": -1.0}), ("stop_after", {"stop_after": 0}), ("keep_round", {"keep_round": "first"})),
        ("update_dtype", {"update_dtype": "float16"}),
        ("strategy", {"num_sites": 3, "aggregation": "secure", "strategy": "fedavgm"}),
        *(("strategy", {"strategy": "fedprox"}), ("server_learning_rate", {"server_learning_rate": 0.0})),
        *(("server_momentum", {"server_momentum": 1.0}), ("server_beta_2", {"server_beta_2": -0.1})),
        *(("server_tau", {"server_tau": 0.0}), ("round_timeout_s", {"round_timeout_s": float("inf")})),
    ],
)
def test_bounds(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        FederationSpec(**({"num_sites": 2} | changes))
    assert error.value.key == key


def test_a_secure_sum_needs_no_update_dtype() -> None:
    for dtype in ("bfloat16", "float32"):
        spec = FederationSpec(num_sites=3, aggregation="secure", update_dtype=dtype)  # type: ignore[arg-type]
        assert spec.together is not None
    assert FederationSpec(num_sites=3, aggregation="secure").update_dtype == "bfloat16"
