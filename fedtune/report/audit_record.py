"""An audit's findings in a run folder, `audit.json`, and what they mean for the verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedtune.report.model import Audit
from fedtune.report.site_model import SiteReport, Verdict
from fedtune.spec import RunError

FILE = "audit.json"
_SCHEMA_VERSION = 1
_ADAPTER = TypeAdapter(Audit)


def read_audit(folder: Path) -> Audit | None:
    """What an audit of the run found; None: none was made, or it was not finished.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_bytes())
        if fields.pop("schema_version") != _SCHEMA_VERSION:
            raise ValueError("schema_version")
        return _ADAPTER.validate_json(json.dumps(fields), strict=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ValidationError) as error:
        raise RunError(f"{path} is damaged: what the audit found is not known") from error


def judged(sites: Iterable[SiteReport], audit: Audit | None) -> tuple[SiteReport, ...]:
    """The sites, with no guarantee where the audit refutes the claim."""
    return tuple(_refuted(site) if audit is not None and refutes(audit, site.site) else site for site in sites)


def refutes(audit: Audit, site: str) -> bool:
    """Whether the audit showed more than is claimed, of this site or of all together."""
    passed = {bound.site for bound in audit.bounds if bound.lower_bound > bound.claimed_epsilon}
    return site in passed or None in passed or (audit.exceeded and not passed)


def _refuted(site: SiteReport) -> SiteReport:
    before = site.verdict.reasons if site.verdict.state == "no_guarantee" else ()
    return replace(site, verdict=Verdict(state="no_guarantee", reasons=(*before, "refuted_by_audit")), meaning=None)
