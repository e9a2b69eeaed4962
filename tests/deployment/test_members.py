"""Membership changes in a running federation: renewed certificates, new and revoked sites, copied rosters."""

import socket
import time
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from fedtune.federation.run_folder import RunFolder
from fedtune.ops.kits import provisioning
from fedtune.ops.kits.certificates import Certificate
from fedtune.ops.kits.kit_file import Kit

from ..processes import RUN_S, wait_for
from .federation import Federation, list_settings
from .networks import Network

pytestmark = pytest.mark.nightly

LONG_AGO = datetime.now(UTC).replace(microsecond=0) - timedelta(days=3)
LEFT_S = 30.0
"""Remaining validity, in seconds, of the certificates that the test renews."""


@pytest.fixture(scope="module")
def members(make_federation: Callable[..., Federation]) -> Federation:
    federation = make_federation(names=("north", "south"), network=Network(), created=LONG_AGO)
    federation.start_server()
    for site in federation.sites.values():
        site.start()
    return federation


def read_site_kit(federation: Federation, name: str) -> Kit:
    return Kit.read(federation.sites[name].kit, kind="site")


def read_server_certificate(federation: Federation) -> Certificate:
    context = read_site_kit(federation, "north").tls().create_client_context()
    with (
        socket.create_connection(("127.0.0.1", federation.network.port), timeout=30) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1") as encrypted,
    ):
        certificate = encrypted.getpeercert(True)
    assert certificate is not None
    return Certificate.from_x509(x509.load_der_x509_certificate(certificate))


def test_certificates_are_renewed_during_a_run(members: Federation) -> None:
    """No process is restarted, and the next round is answered after the old certificates have expired."""
    north, server = members.sites["north"], members.server
    assert server is not None
    pids = (north.up.pid, server.pid)
    expiry = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=LEFT_S)
    expiries = [expiry, expiry + timedelta(days=364)]
    for count, end, days in ((1, expiries[0], 1), (2, expiries[1], 365)):
        start = end - timedelta(days=days)
        with zipfile.ZipFile(provisioning.renew_site(members.home, "north", days=days, now=start).archive) as archive:
            archive.extractall(north.kit)
        provisioning.renew_own_certificate(members.home, "server", days=days, now=start)
        for process in (north.up, server):
            process.wait_for_text("the certificate was replaced", count=count)
            assert process.lines("the certificate was replaced")[-1]["certificate_until"] == end.isoformat()
        assert read_server_certificate(members).not_after == end
    assert datetime.now(UTC) < expiry, "the certificates expired before the renewal"

    time.sleep(max(0.0, (expiry - datetime.now(UTC)).total_seconds() + 1))
    lead = members.lead("past-the-end", *list_settings("federation.num_rounds=4"))
    folder = RunFolder(members.run_folder("past-the-end"))
    wait_for(folder.asked.exists, seconds=RUN_S, what="the first round", needs=lead)
    provisioning.renew_own_certificate(members.home, "lead", days=None, now=datetime.now(UTC))
    assert lead.end(seconds=RUN_S) == 0, lead.text
    assert [len(entry["sites"]) for entry in members.result("past-the-end")["rounds"]] == [2, 2, 2, 2]
    assert "the certificate was replaced" in folder.log.read_text(), "the lead must replace it during its run"
    assert (north.up.pid, server.pid) == pids
    assert north.up.code is None
    assert "no contact" not in north.up.text
