"""Who is not let in: strangers, the expired, the second of two; each is told clearly, and nothing crashes over it."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.ops.kits.certificates import Authority, certificate_pem, read_connection_key
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.wire.fleet import Unauthorised, Unreachable, hello
from fedtune.ops.wire.identity import Tls

from .federation import Command, Federation, dealt
from .networks import Loopback
from .processes import FEDTUNE, Process
from .site_folder import SiteFolder

pytestmark = pytest.mark.nightly

LONG_AGO = datetime.now(UTC) - timedelta(days=3)
RECORDS = 20


@dataclass
class Door:
    """A federation on loopback, and everybody who wants in, all begun at once.

    Attributes:
        home: the one site that may.
        foreigner: of another federation.
        unknown: with a certificate of the right authority, and on no roster.
        second: another process for the ledger of `home`.
        expired_site, expired_server: with a certificate of their own that has ended.
    """

    federation: Federation
    home: SiteFolder
    foreigner: SiteFolder
    unknown: SiteFolder
    second: Process
    expired_site: Process
    expired_server: Process


@pytest.fixture(scope="module")
def door(make_federation: Callable[..., Federation]) -> Door:
    network = Loopback([])
    federation = make_federation(names=("north",), network=network, made=LONG_AGO)
    other = make_federation(names=("guest",), network=network)
    home = federation.sites["north"]
    copy = federation.folder / "copy of banks"
    shutil.copytree(federation.home, copy)
    unknown = federation.join("unknown", dealt(("north",))["north"][:RECORDS], home=copy)
    expired = federation.folder / "expired"
    shutil.copytree(home.folder, expired)
    let_expire(expired / "kit", federation=federation, kind="site")
    shutil.copytree(federation.home / "server", expired / "server")
    let_expire(expired / "server", federation=federation, kind="server")
    for site in (home, other.sites["guest"], unknown):
        site.start(wait=False)
    federation.start_server()
    home.wait_until_up()
    site_start = [*FEDTUNE, "site", "start", "--kit", str(expired / "kit"), "--site", str(expired / "site.toml")]
    server_start = [*FEDTUNE, "server", "start", "--kit", str(expired / "server"), "--host", "127.0.0.1"]
    return Door(
        federation=federation,
        home=home,
        foreigner=other.sites["guest"],
        unknown=unknown,
        second=federation.run("second", "north", [*FEDTUNE, "site", "start", *home.own]),
        expired_site=federation.run("expired-site", "north", site_start),
        expired_server=federation.run("expired-server", "server", server_start),
    )


def let_expire(kit: Path, *, federation: Federation, kind: str) -> None:
    """Give a kit a certificate that ended yesterday or the day before."""
    authority = Authority.load(federation.home / "authority")
    if kind == "server":
        public = read_connection_key(kit / "server_key.pem").public_key()
        made = authority.issue_server(public, hosts=["127.0.0.1"], days=1, now=LONG_AGO)
    else:
        public = read_connection_key(kit / "connection_key.pem").public_key()
        made = authority.issue_client(public, kind=kind, name="north", days=1, now=LONG_AGO)
    (kit / f"{kind}.pem").write_bytes(certificate_pem(made))


def site_tls(kit: Path) -> Tls:
    return Kit.read(kit, kind="site").tls()


def told(process: Process) -> str:
    """The one line that a person is told by a process that ends with exit code 2."""
    assert process.end() == 2, process.text
    lines = [line for line in process.text.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, process.text
    assert "Traceback" not in process.text
    return lines[0]


def test_a_site_of_another_federation_stays_up_and_says_what_is_wrong(door: Door) -> None:
    up = door.foreigner.up
    words = "no contact: no connection to the server (its certificate is not accepted here: "
    up.wait_for_text(words, count=2)
    assert up.code is None
    assert "Traceback" not in up.text
    up.signal(signal.SIGTERM)
    assert up.end(seconds=60) == 0


def test_a_key_that_is_on_no_roster_is_refused(door: Door) -> None:
    up = door.unknown.up
    up.wait_for_text("no contact: the server refused this site: unknown; trying again in 30 s")
    assert up.code is None
    with pytest.raises(Unauthorised, match="the server refused this site: unknown"):
        hello(door.federation.network.address + f":{door.federation.network.port}", site_tls(door.unknown.kit))


def test_the_site_that_belongs_here_is_known(door: Door) -> None:
    """What the refusals above would look like if they were not refusals."""
    server = f"127.0.0.1:{door.federation.network.port}"
    assert hello(server, site_tls(door.home.kit)) == "north"
    assert "the server refused this site" not in door.home.up.text


def test_a_second_process_for_a_ledger_is_turned_away(door: Door) -> None:
    line = told(door.second)
    assert "ledger" in line
    assert f"is being served by process {door.home.up.pid} already" in line
    assert door.home.up.code is None


def test_an_own_certificate_that_expired_is_said_at_the_start(door: Door) -> None:
    ended = f"{LONG_AGO + timedelta(days=1):%Y-%m-%d}"
    for process, renewal in ((door.expired_site, "renew-site"), (door.expired_server, "renew-server")):
        line = told(process)
        assert ended in line
        assert "expired" in line
        assert renewal in line


def test_the_server_takes_no_expired_certificate(door: Door) -> None:
    server = f"127.0.0.1:{door.federation.network.port}"
    with pytest.raises(Unreachable, match=r"hung up right after the handshake; .* does not accept this site's cert"):
        hello(server, site_tls(door.federation.folder / "expired" / "kit"))


def test_a_site_takes_no_server_whose_certificate_expired(door: Door) -> None:
    folder = door.federation.folder / "expired" / "server"
    with listener(Kit.read(folder, kind="server")) as (address, talked):
        with pytest.raises(Unreachable, match="its certificate is not accepted here: certificate has expired"):
            hello(address, site_tls(door.home.kit))
        assert not talked
    with (
        listener(Kit.read(door.federation.home / "server", kind="server")) as (address, talked),
        pytest.raises(Unreachable, match="is no server of fedtune's"),
    ):
        hello(address, site_tls(door.home.kit))
    assert talked


@contextmanager
def listener(kit: Kit) -> Iterator[tuple[str, list[bytes]]]:
    """Somebody who serves with a server's certificate, and what was said to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit.certificate, kit.key)
    talked: list[bytes] = []
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(30)

        def serve() -> None:
            with suppress(OSError), listening.accept()[0] as plain:
                plain.settimeout(30)
                with context.wrap_socket(plain, server_side=True) as encrypted:
                    talked.append(encrypted.recv(4096))
                    encrypted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}", talked
        thread.join(timeout=60)


def test_the_command_of_a_test_is_the_real_one(command: Command) -> None:
    """Provisioning in this process stands for the command line's only if its exit codes do, too."""
    assert command("provision", "add-site", "nowhere.json", "--federation", "nowhere").code == 2
