"""`fedtune provision list`: who is in a federation, and when what expires."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.cli.plain_words import counted
from fedtune.deploy.kits import provisioning
from fedtune.deploy.kits.certificates import Certificate, fingerprint_of, key_fingerprint
from fedtune.deploy.kits.members import Member
from fedtune.deploy.kits.provisioning import Overview

SOON_DAYS = 30
"""Fewer days than these are left: a warning."""


def list_sites(options: argparse.Namespace) -> None:
    """Show a federation."""
    made, now = provisioning.overview(Path(options.federation)), datetime.now(UTC)
    if options.json:
        sys.stdout.write(json.dumps(_to_json(made, now), indent=2) + "\n")
        return
    console = Console()
    console.print(Text(f"Federation {made.federation}, server {made.server}", style="bold"), soft_wrap=True)
    console.print(_sites(made, now), _certificates(made, now), sep="\n")
    for warning in _warnings(made, now):
        console.print(Text(warning, style="bold yellow"), soft_wrap=True)


def _sites(made: Overview, now: datetime) -> Table:
    table = Table(title=counted(len(made.members), "site"), title_justify="left")
    for heading in ("site", "state", "certificate until", "data sets (declared size)"):
        table.add_column(heading, overflow="fold")
    for member in made.members:
        certificate = Certificate.of(member.certificate)
        datasets = "\n".join(f"{name} ({size:,})" for name, size in member.datasets.items())
        state = f"revoked {member.revoked[:10]}" if member.revoked else "takes part"
        table.add_row(member.site, state, _until(certificate, now), Text(datasets))
    return table


def _certificates(made: Overview, now: datetime) -> Table:
    table = Table(title="The federation's own certificates", title_justify="left")
    for heading in ("of", "until"):
        table.add_column(heading)
    for name, certificate in _own(made).items():
        table.add_row(name, _until(certificate, now))
    return table


def _own(made: Overview) -> dict[str, Certificate]:
    return {"authority": made.authority, "server": made.server_certificate, "lead": made.lead_certificate}


def _until(certificate: Certificate, now: datetime) -> str:
    return f"{certificate.not_after:%Y-%m-%d} ({_left(certificate, now)})"


def _left(certificate: Certificate, now: datetime) -> str:
    return "expired" if now > certificate.not_after else f"{counted(certificate.days_left(now), 'day')} left"


def _warnings(made: Overview, now: datetime) -> list[str]:
    """Whose certificate is about to expire, or has, and the command that renews it."""
    found = [
        (f"site {one.site}", Certificate.of(one.certificate), f"renew-site {one.site}")
        for one in made.members
        if not one.revoked
    ]
    found.append(("the server", made.server_certificate, "renew-server"))
    found.append(("the lead", made.lead_certificate, "renew-lead"))
    warnings = [
        f"The certificate of {name}: {_left(certificate, now)}. Renew it: fedtune provision {command}"
        for name, certificate, command in found
        if certificate.days_left(now) < SOON_DAYS
    ]
    if made.authority.days_left(now) < SOON_DAYS:
        warnings.append(f"The authority: {_left(made.authority, now)}. The federation has to be provisioned anew.")
    return warnings


def _to_json(made: Overview, now: datetime) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "federation": made.federation,
        "server": made.server,
        "lead": made.lead_key,
        "certificates": {name: _certificate_json(certificate, now) for name, certificate in _own(made).items()},
        "sites": [_member_json(member, now) for member in made.members],
        "warnings": _warnings(made, now),
    }


def _member_json(member: Member, now: datetime) -> dict[str, Any]:
    return {
        "site": member.site,
        "revoked": member.revoked,
        "certificate": _certificate_json(Certificate.of(member.certificate), now),
        "connection_key_sha256": fingerprint_of(member.node_key),
        "site_key": member.site_key,
        "site_key_sha256": key_fingerprint(member.site_key),
        "datasets": [{"id": name, "declared_size": size} for name, size in member.datasets.items()],
    }


def _certificate_json(certificate: Certificate, now: datetime) -> dict[str, Any]:
    return {
        "not_before": certificate.not_before.isoformat(),
        "not_after": certificate.not_after.isoformat(),
        "days_left": certificate.days_left(now),
        "public_key_sha256": certificate.fingerprint,
    }
