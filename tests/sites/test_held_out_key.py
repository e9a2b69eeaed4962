"""Which of its records a real site holds out follows from a key of its own, and from nothing that a lead knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtune.data.partition import split_heldout
from fedtune.model import Adapter
from fedtune.privacy.keys import SigningKey
from fedtune.sites.shared_model import SharedModel
from fedtune.sites.shared_settings import for_sites


def held_out(site: Any, first: Adapter) -> list[str]:
    """The texts that the site keeps from training, after a round."""
    site.update(adapter=first)
    return [record.fields["text"] for record in site.real._warm[1].records.heldout]


def test_sites_with_the_same_records_and_settings_hold_out_others(station: Callable[..., Any]) -> None:
    """Each by the secret of its key file."""
    north, south = (station(name, data={"heldout_fraction": 0.5}) for name in ("north", "south"))
    first = SharedModel(for_sites(north.config)).initial_adapter
    kept = {}
    for site in (north, south):
        kept[site.name] = held_out(site, first)
        everyone = [*site.real._warm[1].records.training, *site.real._warm[1].records.heldout]
        key = SigningKey.load(site.folder / "site_key.pem").secret("held-out split")
        by_key = split_heldout(everyone, fraction=0.5, key=key)[1]
        assert sorted(kept[site.name]) == sorted(record.fields["text"] for record in by_key)
    assert kept["north"] != kept["south"]
