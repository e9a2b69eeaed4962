"""The README.md of each kit: what its files are, which are secret, and what to type, in order."""

from __future__ import annotations

from fedtune.deploy.certificates import Certificate, spoken
from fedtune.deploy.kit_file import KitFile

_SITE = """\
# Kit of site {site} in the federation {federation}

With this kit, site {site} takes part in the federation {federation}, through its server {server}.
The site only ever calls that server; nothing calls the site, and no port has to be opened.

| file | what it is |
|---|---|
| kit.toml | where the server is, who leads, which base models may be named |
| ca.pem | the federation's authority: by it the site knows the server |
| site.pem | this site's certificate, for the connection key that the site made; valid until {ends} |
| connection_key.pem | **secret**; was made at the site by `fedtune site init`, and is not in the zip |

Nothing in the zip is secret. What is secret never leaves the site: `connection_key.pem`, and the site key and the
ledger that `site.toml` names.

## Before the first start

1. Unzip the kit into the folder that `fedtune site init` made, the one with `connection_key.pem` in it:

       unzip {site}-kit.zip -d DIR

2. Compare by telephone with the lead, each reading from their own screen. This site's connection key:

       {fingerprint}

   The federation's authority:

       {authority}

   The lead's public key:

       {lead}

3. Let this lead ask: put the key into `site.toml`, and read what the policy then means:

       [allow]
       leads = ["{lead_key}"]

       fedtune site check-policy site.toml

4. See whether everything is in place:

       fedtune site doctor --kit DIR --site site.toml

5. Start, and leave it running:

       fedtune site start --kit DIR --site site.toml

## Renewal

The certificate expires on {ends}. Before that, ask the lead for a renewal (`fedtune provision renew-site {site}`); the
key stays, so nothing has to be made here. Unzip the new kit into DIR over the old one, and start the site again.

If `connection_key.pem` was lost, or others may have read it, tell the lead at once: the lead revokes it. Then make a
new key and a new request:

    fedtune site init --site site.toml --out new-kit

Send `new-kit/join_request.json` to the lead (`fedtune provision renew-site {site} join_request.json`), put
`new-kit/connection_key.pem` in place of the old one in DIR, and unzip the new kit into DIR.
"""

_SERVER = """\
# Kit of the server of the federation {federation}

The server passes messages between the lead and the sites. It holds no lead key, no model and no record. Sites and lead
reach it at {server}.

| file | what it is |
|---|---|
| kit.toml | the address, and the lead's public key, without whose signature nothing is passed on |
| ca.pem | the federation's authority: by it the server knows who may connect |
| server.pem | the server's certificate, for {hosts}; valid until {ends} |
| server_key.pem | **secret**: its key, readable by its owner alone |
| roster.json | the sites, with revoked ones; it is read again while the server runs |

## Start

    fedtune server start --kit DIR

DIR is this folder, wherever it was copied to; copy it so that `server_key.pem` stays readable by its owner alone
(`chmod 600 server_key.pem`). Only port {port} has to be reachable.

## When the federation changes

After each `fedtune provision add-site`, `renew-site` or `revoke-site`, copy the new `roster.json` over this one. There
is no need to start the server again. **A revoked site is shut out only once the new roster is here.**

## Renewal

The certificate expires on {ends}. Before that, run `fedtune provision renew-server`, copy the new `kit.toml`,
`server.pem` and `README.md` here, and start the server again. The key stays, and the sites notice nothing.
"""

_LEAD = """\
# Kit of the lead of the federation {federation}

| file | what it is |
|---|---|
| kit.toml | where the server is, the lead's public key, and the base models that runs may name |
| ca.pem | the federation's authority: by it the lead knows the server |
| lead.pem | the lead's certificate; valid until {ends} |
| connection_key.pem | **secret**: the certificate's key |
| lead_key.pem | **secret**: signs every request; whoever has it can ask the sites in the lead's name. Keep a backup |
| roster.json | the sites, with their data sets and declared sizes, and the keys that receipts are checked with |

The lead's public key, which each site puts into its `site.toml` as `allow.leads`:

    {lead_key}

The same, and the authority's fingerprint, to be read out by telephone:

    lead       {lead}
    authority  {authority}

## Start a run

    fedtune run --kit DIR experiment=... sites=[a,b]

DIR is this folder. After each `fedtune provision add-site`, `renew-site` or `revoke-site`, the new `roster.json` has to
be here.

## Renewal

The certificate expires on {ends}. Before that, run `fedtune provision renew-lead`, and copy the new `kit.toml`,
`lead.pem` and `README.md` here if this is a copy. Both keys stay, so no site has to change anything.
"""


def site_readme(kit: KitFile, *, certificate: Certificate, authority: Certificate) -> str:
    """For a site."""
    return _SITE.format(
        site=kit.site,
        fingerprint=spoken(certificate.fingerprint),
        **_common(kit, certificate=certificate, authority=authority),
    )


def server_readme(kit: KitFile, *, certificate: Certificate, authority: Certificate, hosts: tuple[str, ...]) -> str:
    """For the server, whose certificate is for `hosts`."""
    return _SERVER.format(
        hosts=", ".join(hosts),
        port=kit.server.rpartition(":")[2],
        **_common(kit, certificate=certificate, authority=authority),
    )


def lead_readme(kit: KitFile, *, certificate: Certificate, authority: Certificate) -> str:
    """For the lead."""
    return _LEAD.format(**_common(kit, certificate=certificate, authority=authority))


def _common(kit: KitFile, *, certificate: Certificate, authority: Certificate) -> dict[str, str]:
    return {
        "federation": kit.federation,
        "server": kit.server,
        "lead_key": kit.lead,
        "lead": spoken(kit.lead),
        "authority": spoken(authority.fingerprint),
        "ends": f"{certificate.not_after:%Y-%m-%d}",
    }
