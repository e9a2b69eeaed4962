"""A site's part in secure sums, by its files: whom it trusts, who it is, and where it writes its promises."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from fedtune.federation.secure.agreement import require_terms
from fedtune.federation.secure.at_site import Parties, SumsAtSite, kept_in
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.site_files import SiteFiles

PROMISES = ".promises.jsonl"  # follows the ledger's whole name, since ledgers of several sites may share a folder


def sums_of(files: SiteFiles, parties: Parties, *, members: Mapping[str, str]) -> SumsAtSite:
    """A site's part in the steps of a secure sum.

    Args:
        files: of the site; its promises are written beside the ledger.
        parties: of the site's process.
        members: site -> public key of the other sites that it may sum with.
    """
    trust, identity = files.policy.trust, SigningKey.load_or_make(files.site_key)
    return SumsAtSite(
        site=files.policy.site,
        identity=identity,
        parties=parties,
        demand=partial(
            require_terms,
            least_sites=trust.least_sites,
            least_threshold=trust.least_threshold,
            colluders=trust.colluders,
        ),
        roster={**members, files.policy.site: identity.public},
        keep=kept_in(files.ledger.with_name(files.ledger.name + PROMISES)),
    )
