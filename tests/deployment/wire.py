"""A run with a proxy before one site, which fails, refuses and is paused in it, and with a foreign bundle."""

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune.data import Record
from fedtune.ops.kits.certificates import Authority, certificate_pem, make_key, private_pem
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.wire.identity import Tls
from fedtune.ops.wire.waiting import WAIT
from fedtune.privacy.policy_file import read_policy, write_policy

from ..flower.loopback import free_port
from .federation import Federation, dealt, settings, write_records
from .outbound import Call, read_calls
from .processes import RUN_S, Process, wait_for
from .site_folder import SiteFolder

HERE = Path(__file__).parent
SITES = ("north", "south")
COUNT = 137
"""The true number of north's records; it appears nowhere else."""
PLANTED = "zebra-quartz-4711 owes the hospital money"
EXCEPTION = f"could not read {PLANTED!r} out of a cell"
RUN = "wire"


@dataclass
class Wire:
    """A federation after the run, and what north sent meanwhile.

    Attributes:
        calls: Flower's.
        waits: fedtune's own, in which the site waits for a question.
        mark: file that a foreign bundle would have written.
        listening: ports on which the server and south listened while they ran; north's proxy is in its network.
    """

    federation: Federation
    north: SiteFolder
    calls: list[Call]
    waits: list[Call]
    mark: Path
    listening: dict[str, list[int]]


def record(federation: Federation, mark: Path) -> Wire:
    north, south = (federation.sites[name] for name in SITES)
    few = [*dealt(SITES)["north"][: COUNT - 1], Record({"text": PLANTED, "label": "age_limit"})]
    write_records(north.folder / "questions.csv", few)
    recorded = federation.folder / "recorded.jsonl"
    _start_proxy(federation, north, recorded)
    federation.start(held=True)
    _run(federation, mark)
    listening = {
        name: listening_ports(process.pid, whole_network=federation.network.isolated)
        for name, process in (("server", federation.server), ("south", south.up))
    }
    for site in (north, south):
        site.up.ask_to_end()
        assert site.up.end(seconds=60) == 0
    calls = read_calls(recorded)
    waits = [call for call in calls if call.path.startswith(f"{WAIT}?")]
    return Wire(federation, north, [call for call in calls if call not in waits], waits, mark, listening)


def listening_ports(pid: int, *, whole_network: bool) -> list[int]:
    """TCP ports on which the process `pid` listens, or anybody in its network, from /proc."""
    inodes = _inodes(pid)
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and (whole_network or words[9] in inodes):
                found.append(int(words[1].rpartition(":")[2], 16))
    return found


def _inodes(pid: int) -> set[str]:
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    return inodes


def _run(federation: Federation, mark: Path) -> None:
    """North sends an update, fails, refuses, pauses and meets a broken file, while south answers all four rounds."""
    north, south = (federation.sites[name] for name in SITES)
    policy = read_policy(north.site_toml)
    south.hold(True)
    lead = federation.lead(
        RUN,
        *settings("federation.num_rounds=4", "federation.min_sites=1"),
        program=[sys.executable, str(HERE / "foreign_bundle.py"), str(mark)],
    )

    def answered(what: str) -> None:
        wait_for(lambda: north.answered(what, RUN), seconds=RUN_S, what=f"north's {what}", needs=lead)

    answered("update")
    (north.folder / "fail").write_text(EXCEPTION)
    _next_round(south, 1, lead=lead)
    answered("site_error")
    (north.folder / "fail").unlink()
    north.edit(limits={"max_local_steps": 1})
    _next_round(south, 2, lead=lead)
    answered("max_local_steps")
    write_policy(policy, north.site_toml)
    # In the header: a record that cannot be read is left out, and ends nothing.
    questions = north.folder / "questions.csv"
    questions.write_bytes(PLANTED.encode() + b"\xff," + questions.read_bytes())
    federation.do("site", "pause", "--kit", str(north.kit))
    _next_round(south, 3, lead=lead)
    answered("paused")
    south.hold(False)
    federation.do("site", "resume", "--kit", str(north.kit))
    assert lead.end() == 0, lead.text


def _next_round(site: SiteFolder, round: int, *, lead: Process) -> None:
    """Let a site that is held up finish its round, and hold it up again in the next."""
    site.wait_for(RUN, "reserve", round=round, lead=lead)
    site.hold(False)
    site.wait_for(RUN, "commit", round=round, lead=lead)
    site.hold(True)


def _start_proxy(federation: Federation, site: SiteFolder, recorded: Path) -> None:
    """Put a proxy before the server, for one site, whose kit then leads there."""
    listen = f"127.0.0.1:{free_port()}"
    authority, key = Authority.load(federation.home / "authority"), make_key()
    about = {"kind": "server", "name": "server", "hosts": ["127.0.0.1"], "days": 1, "now": datetime.now(UTC)}
    certificate = authority.issue(key.public_key(), **about)  # type: ignore[arg-type]
    kit = Kit.read(site.kit, kind="site")
    own = Tls(ca=kit.ca, certificate=federation.folder / "proxy.pem", key=federation.folder / "proxy_key.pem")
    own.certificate.write_bytes(certificate_pem(certificate))
    own.key.write_bytes(private_pem(key))
    given = {
        "listen": listen,
        "server": federation.address,
        "own": {name: str(path) for name, path in asdict(own).items()},
        "site": {name: str(path) for name, path in asdict(kit.tls()).items()},
        "records": str(recorded),
    }
    (federation.folder / "proxy.json").write_text(json.dumps(given))
    words = [sys.executable, str(HERE / "recording_proxy.py"), str(federation.folder / "proxy.json")]
    federation.run("proxy", site.name, words).wait_for_text("the proxy listens")
    file = site.kit / "kit.toml"
    file.write_text(file.read_text().replace(kit.server, listen))
