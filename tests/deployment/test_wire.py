"""Byte-level checks of everything that leaves a site, and of the parts of a lead's message that a site ignores.

A proxy between one site and the server terminates TLS and records every request of the site: during an update, a round
that fails with a record's text in the exception, a refusal, a pause, a broken file, and the end of a run.
"""

import base64
import contextlib
import getpass
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedtune.data import Record
from fedtune.flower import flower_records
from fedtune.ops.kits.certificates import Authority, encode_certificate_pem, encode_private_pem, generate_connection_key
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.wire.identity import Tls
from fedtune.ops.wire.waiting import WAIT
from fedtune.privacy.policy_file import read_policy, write_policy
from fedtune.privacy.release import Difference, Offer, Reason, Receipt, Refusal, Update

from ..flower.loopback import find_free_port
from ..processes import RUN_S, wait_for
from . import outbound
from .books import check_books
from .federation import ONE_THREAD, Federation, list_settings, partition_records, write_records
from .site_folder import SiteFolder

HERE = Path(__file__).parent
SITES = ("north", "south")
NUM_RECORDS = 137
"""The true number of north's records; it appears nowhere else."""
PLANTED = "zebra-quartz-4711 owes the hospital money"
EXCEPTION = f"could not read {PLANTED!r} out of a cell"
RUN = "wire"
HEADERS = {
    *("accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"),
    *("flwr-component-name", "flwr-package-name", "flwr-package-version"),
    *("flwr-public-key", "flwr-signature", "flwr-timestamp"),
}
OPAQUE_HEADERS = {"content-length", "flwr-public-key", "flwr-signature", "flwr-timestamp"}
ANSWERS = [
    *((0, "offer"), (1, "update"), (2, "site_error"), (3, "max_local_steps"), (4, "paused"), (4, "site_error")),
    (0, "end"),
]
"""The expected answers of north, by round."""


@dataclass
class Wire:
    """A federation after the run, with the recorded traffic of north."""

    federation: Federation
    north: SiteFolder
    calls: list[outbound.Call]  # Flower's calls
    waits: list[outbound.Call]  # fedtune's own calls, in which the site waits for a question
    listening: dict[str, list[int]]  # ports of the server and south while they ran; north's proxy is in its network


@pytest.fixture(scope="module")
def wire(make_federation: Callable[..., Federation]) -> Wire:
    federation = make_federation(names=SITES)
    north, south = (federation.sites[name] for name in SITES)
    records = [*partition_records(SITES)["north"][: NUM_RECORDS - 1], Record({"text": PLANTED, "label": "age_limit"})]
    write_records(north.folder / "questions.csv", records)
    log = federation.folder / "recorded.jsonl"
    _start_proxy(federation, north, log)
    federation.start(held=True)
    _run(federation)
    listening = {
        name: list_listening_ports(process.pid, whole_network=federation.network.isolated)
        for name, process in (("server", federation.server), ("south", south.up))
    }
    for site in (north, south):
        site.up.ask_to_end()
        assert site.up.end(seconds=60) == 0
    calls = outbound.read_calls(log)
    waits = [call for call in calls if call.path.startswith(f"{WAIT}?")]
    return Wire(federation, north, [call for call in calls if call not in waits], waits, listening)


def list_listening_ports(pid: int, *, whole_network: bool) -> list[int]:
    """List the TCP ports on which the process `pid`, or any process in its network namespace, listens, from /proc."""
    inodes, ports = set(), []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed in the meantime
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and (whole_network or words[9] in inodes):
                ports.append(int(words[1].rpartition(":")[2], 16))
    return ports


def _run(federation: Federation) -> None:
    """Run four rounds in which north sends an update, fails, refuses and pauses, while south answers all rounds."""
    north, south = (federation.sites[name] for name in SITES)
    policy = read_policy(north.site_toml)
    south.hold(True)
    lead = federation.lead(RUN, *list_settings("federation.num_rounds=4", "federation.min_sites=1"))

    def wait_for_answer(kind: str) -> None:
        wait_for(lambda: north.count_answers(kind, RUN), seconds=RUN_S, what=f"north's {kind}", needs=lead)

    def release_next_round(round: int) -> None:
        """Let south finish its paused round, and pause it again in the next round."""
        south.wait_for(RUN, "reserve", round=round, lead=lead)
        south.hold(False)
        south.wait_for(RUN, "commit", round=round, lead=lead)
        south.hold(True)

    wait_for_answer("update")
    (north.folder / "fail").write_text(EXCEPTION)
    release_next_round(1)
    wait_for_answer("site_error")
    (north.folder / "fail").unlink()
    north.edit(limits={"max_local_steps": 1})
    release_next_round(2)
    wait_for_answer("max_local_steps")
    write_policy(policy, north.site_toml, others=ONE_THREAD)
    # The header is broken, because an unreadable record is skipped and would not end the round.
    questions = north.folder / "questions.csv"
    questions.write_bytes(PLANTED.encode() + b"\xff," + questions.read_bytes())
    federation.do("site", "pause", "--kit", str(north.kit))
    release_next_round(3)
    wait_for_answer("paused")
    south.hold(False)
    federation.do("site", "resume", "--kit", str(north.kit))
    assert lead.end() == 0, lead.text


def _start_proxy(federation: Federation, site: SiteFolder, recorded: Path) -> None:
    """Start a proxy between one site and the server, and point the site's kit to the proxy."""
    listen = f"127.0.0.1:{find_free_port()}"
    authority, key = Authority.load(federation.home / "authority"), generate_connection_key()
    subject = {"kind": "server", "name": "server", "hosts": ["127.0.0.1"], "days": 1, "now": datetime.now(UTC)}
    certificate = authority.issue(key.public_key(), **subject)  # type: ignore[arg-type]
    kit = Kit.read(site.kit, kind="site")
    proxy = Tls(ca=kit.ca, certificate=federation.folder / "proxy.pem", key=federation.folder / "proxy_key.pem")
    proxy.certificate.write_bytes(encode_certificate_pem(certificate))
    proxy.key.write_bytes(encode_private_pem(key))
    settings = {
        "listen": listen,
        "server": federation.address,
        "proxy": {name: str(path) for name, path in asdict(proxy).items()},
        "site": {name: str(path) for name, path in asdict(kit.tls()).items()},
        "records": str(recorded),
    }
    (federation.folder / "proxy.json").write_text(json.dumps(settings))
    words = [sys.executable, str(HERE / "recording_proxy.py"), str(federation.folder / "proxy.json")]
    federation.run("proxy", site.name, words).wait_for_text("the proxy listens")
    file = site.kit / "kit.toml"
    file.write_text(file.read_text().replace(kit.server, listen))


def list_field_names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def test_site_makes_only_known_calls_and_listens_on_no_port(wire: Wire) -> None:
    assert wire.listening == {"server": [wire.federation.network.port], "south": []}
    assert {call.path for call in wire.calls} == set(outbound.CALLS)
    assert {call.method for call in wire.calls} == {"POST"}
    headers = [header for call in wire.calls for header in call.headers]
    assert {name for name, _ in headers} == HEADERS
    certificate = x509.load_pem_x509_certificate((wire.north.kit / "site.pem").read_bytes())
    public = certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    sent = {name: {value for other, value in headers if other == name} for name in HEADERS}
    assert sent["flwr-public-key"] == {base64.b64encode(public).decode()}
    assert sent["content-type"] == {"application/protobuf"}
    assert sent["flwr-component-name"] == {"SuperNode"}
    (agent,) = sent["user-agent"]
    assert re.fullmatch(r"python-httpx/[\d.]+", agent)
    for call in wire.calls:
        assert call.request is not None  # parsed to the last byte


def test_wait_request_contains_only_the_question_count(wire: Wire) -> None:
    assert wire.waits
    numbers = []
    for call in wire.waits:
        assert (call.method, call.body) == ("GET", b"")
        assert {name for name, _ in call.headers} <= HEADERS
        (number,) = re.fullmatch(r"/v1/fedtune/wait\?heard=(-1|\d+)", call.path).groups()  # type: ignore[union-attr]
        numbers.append(int(number))
    # The numbers come from the server, which counts its lead's questions.
    assert numbers[0] == -1
    assert max(numbers) <= len(outbound.collect_messages(wire.calls))


def test_site_answers_use_only_fedtune_types(wire: Wire) -> None:
    answers = []
    for request, content in outbound.collect_messages(wire.calls):
        assert list(request.clientapp_runtime_list) == [0.0]
        assert list(content.metric_records) == []
        answers.append(check_answer(content))
    # A waiting site repeats its answer.
    assert [answer for index, answer in enumerate(answers) if index == 0 or answer != answers[index - 1]] == ANSWERS
    objects = outbound.collect_objects(wire.calls)
    kinds = sorted(map(outbound.read_object_kind, objects.values()))
    assert set(kinds) == {"Message", "RecordDict", "ConfigRecord", "ArrayRecord", "Array", "ArrayChunk"}
    # Every pushed object is part of an answer, and the only array is the update's.
    assert set(objects) == outbound.list_announced_ids(wire.calls)
    assert [kind for kind in kinds if "Array" in kind] == ["Array", "ArrayChunk", "ArrayRecord"]


def check_answer(content: Any) -> tuple[int, str]:
    """Return (round, kind) of an answer, after checking that all its fields belong to one release type."""
    (config,) = content.config_records.values()
    assert list(config) == ["json"]
    fields = json.loads(config["json"])
    if flower_records.RECEIPT in content:
        assert set(content) == {flower_records.RECEIPT}
        assert set(fields) == list_field_names(Receipt)
        assert fields["run"].startswith(f"{RUN}-")
        return 0, "end"
    assert set(fields["receipt"]) == list_field_names(Receipt)
    reply = flower_records.to_reply(content)
    assert reply.receipt is not None
    assert reply.receipt.has_valid_signature()
    body = reply.body
    assert body.run.startswith(f"{RUN}-")
    assert reply.is_signed()
    if isinstance(body, Offer):
        assert set(content) == {flower_records.REPLY}
        assert set(fields) - {"kind", "receipt"} == list_field_names(Offer)
        return 0, "offer"
    if isinstance(body, Update):
        assert set(content) == {flower_records.REPLY, flower_records.UPDATE}
        assert set(fields) == {"kind", "receipt"}
        assert body.scores is None
        return body.round, "update"
    assert set(content) == {flower_records.REPLY}
    assert set(fields) - {"kind", "receipt"} == list_field_names(Refusal)
    assert body.reason is Reason.MAX_LOCAL_STEPS or (body.requested, body.allowed) == (None, None)
    return body.round, body.reason.value


def list_secrets(wire: Wire) -> list[str]:
    """List texts that must never leave the site."""
    names = [str(wire.north.folder), str(wire.federation.folder), str(Path.home()), socket.gethostname()]
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        names.append(getpass.getuser())
    return [PLANTED, PLANTED.split()[0], EXCEPTION, EXCEPTION[:14], "ValueError", "Traceback", "questions.csv", *names]


def test_no_record_path_name_or_exception_leaves_the_site(wire: Wire) -> None:
    everything = [call.path.encode() + json.dumps(call.headers).encode() + call.body for call in wire.calls]
    texts = [text.encode() for text in list_all_texts(wire)]
    for secret in list_secrets(wire):
        # Short names would also occur by chance in numbers and signatures.
        pattern = re.compile(rb"(?<![a-z0-9])" + re.escape(secret.lower().encode()) + rb"(?![a-z0-9])")
        assert not any(pattern.search(data.lower()) for data in (everything if len(secret) > 7 else texts)), secret
    assert any(b"max_local_steps" in data for data in everything)  # the search would find a match
    assert any(b"max_local_steps" in data for data in texts)


def test_true_record_count_does_not_leave_the_site(wire: Wire) -> None:
    assert len((wire.north.folder / "questions.csv").read_bytes().splitlines()) == NUM_RECORDS + 1
    assert all(number != NUM_RECORDS for _, number in list_all_numbers(wire))
    assert {"flwr.proto.Node.node_id", "json", "shape"} < {name for name, _ in list_all_numbers(wire)}
    for text in list_all_texts(wire):
        # Not within longer numbers, hashes and signatures.
        assert not re.search(rf"(?<![\w.+/=]){NUM_RECORDS}(?![\w.+/=])", text), text


def list_all_numbers(wire: Wire) -> Iterator[tuple[str, float]]:
    """List every number in Flower's messages, objects and fedtune's JSON, except the noised values of the update."""
    for call in wire.calls:
        yield from outbound.list_numbers(call.request)
    for _, content in outbound.collect_messages(wire.calls):
        for config in content.config_records.values():
            yield from (
                ("json", leaf)
                for leaf in outbound.iter_leaves(json.loads(config["json"]))
                if type(leaf) in (int, float)
            )
        for arrays in content.array_records.values():
            for array in arrays.values():
                yield from (("shape", length) for length in array.shape)
                update = Update.from_bytes(array.data)
                assert isinstance(update.tensors, Difference)
                yield from (("shape", length) for value in update.tensors.halves.values() for length in value.shape)
                yield "round", update.round


def list_all_texts(wire: Wire) -> Iterator[str]:
    """List every text in headers, Flower's messages and fedtune's JSON, except keys, signatures and times."""
    for call in wire.calls:
        # It must be the length of the body.
        assert ("content-length", str(len(call.body))) in call.headers
        assert {name for name, _ in call.headers} <= HEADERS
        yield from (value for name, value in call.headers if name not in OPAQUE_HEADERS)
        yield from outbound.list_texts(call.request)
    for _, content in outbound.collect_messages(wire.calls):
        yield from (str(config["json"]) for config in content.config_records.values())


def test_logs_and_files_outside_the_sites_contain_no_records(wire: Wire) -> None:
    federation = wire.federation
    assert "ValueError" in wire.north.up.text  # the site's own log contains the error
    assert "DataError" in wire.north.up.text
    elsewhere = [path for name in ("banks", "runs") for path in (federation.folder / name).rglob("*")]
    for path in [*federation.logs(), *elsewhere]:
        if path.is_file():
            content = path.read_bytes()
            assert PLANTED.encode() not in content, path
            assert PLANTED.split()[0].encode() not in content, path


def test_failed_rounds_are_charged_in_the_ledgers(wire: Wire) -> None:
    check_books(wire.federation, RUN)
    result = wire.federation.result(RUN)
    failed = [round["failed_sites"].get("north", "update") for round in result["rounds"]]
    assert failed == ["update", "site_error", "max_local_steps", "site_error"]
    # Failed rounds were started, and a round is charged before a record is read.
    assert result["privacy"]["sites"]["north"]["rounds"] == 3
