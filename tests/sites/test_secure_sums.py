"""A site's part in secure sums, by its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedtune.federation.secure.at_site import Parties
from fedtune.federation.secure.party import Promise
from fedtune.privacy.site_files import SiteFiles
from fedtune.privacy.site_policy import Policy
from fedtune.sites.secure_sums import sums_of


def test_sites_whose_ledgers_share_a_folder_keep_each_their_own_promises(
    site_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    for site in ("east", "west"):
        policy = replace(site_policy(site), ledger=f"{site}.db", site_key=f"{site}.pem")
        files = SiteFiles(
            policy=policy, ledger=tmp_path / policy.ledger, site_key=tmp_path / policy.site_key, anchor=None
        )
        promise = Promise(session="ab" * 32, release=1, survivors=("east", "west"), confirmed=site == "east")
        sums_of(files, Parties(), members={}).keep(promise)
    kept = {path.name: path.read_text().count('"confirmed": true') for path in tmp_path.glob("*promises.jsonl")}
    assert kept == {"east.db.promises.jsonl": 1, "west.db.promises.jsonl": 0}
