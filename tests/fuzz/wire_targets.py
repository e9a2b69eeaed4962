"""Network input: a server's requests at a site, sites' answers at the server, and calls at its gate."""

import asyncio
import hashlib
import json
import struct
import time
from collections.abc import Callable, MutableMapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import strategies as st

from fedtune.federation.protocol import EndOfRun, RoundRequest, Signed
from fedtune.federation.site_round import PreparedRun, TrainingResult, answer
from fedtune.flower import flower_records
from fedtune.flower.site_socket import record_from_bytes
from fedtune.model.adapter import Adapter, AdapterError
from fedtune.ops.kits.members import PURPOSE, JoinRequest, initialize_site
from fedtune.ops.wire.audit_log import AuditLog
from fedtune.ops.wire.fleet import HELLO
from fedtune.ops.wire.gate import Gate
from fedtune.ops.wire.identity import BODY, CALL, SIGNATURE, TIME, _build_signed_message
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.release import Reason, Refusal, Refused, Update
from fedtune.sites.shared_settings import read_settings
from fedtune.spec import ConfigError

from ..builders import MadeSite
from . import seeds
from .mutations import mutate_bytes_like, mutate_json, mutate_json_like
from .target import Target


def _decode_text(data: bytes) -> str:
    """Decode a text as Flower does, including lone surrogates, which a caller in this process could send."""
    return data.decode("utf-8", "surrogateescape")


def _parse_signed(kind: type[RoundRequest | EndOfRun]) -> Callable[[bytes], object]:
    """Parse bytes as a message of this kind, signed by the lead."""
    return lambda data: kind.from_signed(
        Signed(text=_decode_text(data), signature=seeds.key(1).sign(kind.purpose, data))
    )


def _parse_unsigned_request(data: bytes) -> object:
    return RoundRequest.from_signed(Signed(text=_decode_text(data), signature=_decode_text(data)[:128]))


def _answer_request(data: bytes) -> None:
    """Check that a site answers any request, without the text of an exception."""

    def refuse_settings(request: RoundRequest) -> PreparedRun:
        raise Refused(Reason.BASE_MODEL_MISSING)

    signed = Signed(text=_decode_text(data), signature=seeds.key(1).sign(RoundRequest.purpose, data))
    ledger = SiteLedger(seeds.make_folder() / "answering.db", seeds.make_policy(), seeds.key(2), create=True)
    site = MadeSite(
        ledger, prepare=refuse_settings, train=lambda request, adapter, attempt: TrainingResult(adapter=adapter)
    )
    reply = answer(site, signed, seeds.make_adapter())
    assert isinstance(reply.body, Refusal)
    assert reply.body.reason is not Reason.SITE_ERROR, "fedtune itself failed"


def _read_settings(data: bytes) -> object:
    return read_settings.__wrapped__(_decode_text(data), plan=seeds.plan(), task=seeds.make_config().task)


def _read_adapter(data: bytes) -> object:
    """Parse bytes as an adapter in its transfer format."""
    return flower_records.to_adapter(RecordDict({flower_records.ADAPTER: record_from_bytes(data)}))


def _parse_reply(data: bytes) -> object:
    content = flower_records.from_reply(seeds.reply())
    content["reply"] = ConfigRecord({"json": _decode_text(data)})
    return flower_records.to_reply(content)


def _make_seed(kind: str, write: Callable[[Any], RecordDict], seed: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: json.loads(str(write(seed()).config_records[kind]["json"]))


def _read_receipt(data: bytes) -> object:
    return flower_records.to_receipt(RecordDict({"receipt": ConfigRecord({"json": _decode_text(data)})}))


def _read_records(data: bytes) -> None:
    """Read a message whose records do not match its keys; each reader must refuse or read it."""
    kinds = (
        ConfigRecord({"json": _decode_text(data)}),
        ConfigRecord({"x": 1}),
        ArrayRecord({}),
        ConfigRecord({"json": [1]}),
    )
    picks = [byte % (len(kinds) + 1) for byte in data[:6]] + [0] * 6
    names = ("adapter", "difference", "request", "settings", "reply", "receipt")
    content = RecordDict({name: kinds[pick - 1] for name, pick in zip(names, picks, strict=False) if pick})
    for read in (
        *(flower_records.to_signed, flower_records.to_settings, flower_records.to_adapter),
        *(flower_records.to_receipt, flower_records.to_reply),
    ):
        try:
            read(content)
        except ConfigError:
            continue


def _call_gate(data: bytes) -> None:
    """Make one call: the first byte selects the path, headers follow line by line, and the rest is the body."""
    lines = data.split(b"\n")
    paths = (HELLO, "/v1/fleet/pull-messages", "/v1/control/start-run", "/v1/runtime/get-nodes", "/", "/docs")
    path = paths[data[0] % len(paths)] if data else ""
    headers = [(name, value) for name, colon, value in (line.partition(b": ") for line in lines[1:-1]) if colon]
    sent: list[MutableMapping[str, Any]] = []

    async def fail_on_call(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("a broken call was accepted")

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": lines[-1], "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    member = SimpleNamespace(site="north", node_key=b"unknown", revoked=False)
    rules: Any = None  # no call gets this far
    gate = Gate(fail_on_call, lead=seeds.key(3).public, roster=lambda: [member], rules=rules, audit=AuditLog(None))
    asyncio.run(gate({"type": "http", "path": path, "headers": headers}, receive, send))
    assert sent[0]["status"] in (401, 403, 404)


def _make_gate_seed() -> bytes:
    moment, body = repr(time.time()), hashlib.sha256(b"body").hexdigest()
    path = "/v1/control/start-run"
    signature = seeds.key(1).sign(CALL, _build_signed_message(path, moment, body))
    headers = {TIME: moment, BODY: body, SIGNATURE: signature, "flwr-public-key": "AAAA", "flwr-signature": "AAAA"}
    lines = [b"\x02", *(f"{name}: {value}".encode() for name, value in headers.items()), b"body"]
    return b"\n".join(lines)


def _parse_join_request(data: bytes) -> object:
    """Parse a join request that the site signed again after the change, as an attacker would."""
    try:
        fields = json.loads(data)
        unsigned = {key: value for key, value in fields.items() if key != "signature"}
        canonical = json.dumps(unsigned, sort_keys=True, separators=(",", ":")).encode()
        signature = seeds.key(2).sign(PURPOSE, canonical)
        data = json.dumps({**fields, "signature": signature}).encode()
    except (ValueError, RecursionError, TypeError, AttributeError):
        pass  # not a JSON object: left unchanged
    return JoinRequest.parse_request(data)


def join_request() -> Path:
    """Make the join request file of a site."""
    path = seeds.make_folder() / "joining" / "site.toml"
    if not path.exists():
        path.parent.mkdir()
        path.write_text(seeds.read_policy_toml())
        initialize_site(path, out=None)
    return path.parent / "kit" / "join_request.json"


def _update_headers() -> st.SearchStrategy[bytes]:
    """Yield updates with mutated headers."""
    body = b"".join(value.tobytes() for value in seeds.make_adapter().tensors.values())
    headers = mutate_json(json.loads(seeds.update()._encode_parts()[0]))
    return headers.map(lambda header: b"fedtune-update-2\n" + struct.pack("<Q", len(header)) + header + body)


_END = asdict(EndOfRun(run="r", lead=seeds.key(1).public, adapter_digest="ab" * 32))
TARGETS = (
    Target("request", mutate_json_like(seeds.request_json), _parse_signed(RoundRequest), (ConfigError, Refused)),
    Target("unsigned request", mutate_json_like(seeds.request_json), _parse_unsigned_request, (ConfigError, Refused)),
    Target("answer", mutate_json_like(seeds.request_json), _answer_request, ()),
    Target("end of run", mutate_json_like(lambda: _END), _parse_signed(EndOfRun), (ConfigError, Refused)),
    Target("settings", mutate_json_like(seeds.make_settings), _read_settings, (Refused,)),
    Target("update", mutate_bytes_like(lambda: seeds.update().to_bytes()), Update.from_bytes, (ConfigError,)),
    Target("update header", _update_headers, Update.from_bytes, (ConfigError,)),
    Target("adapter", mutate_bytes_like(lambda: seeds.make_adapter().to_bytes()), Adapter.from_bytes, (AdapterError,)),
    Target(
        "adapter on the wire", mutate_bytes_like(lambda: seeds.make_adapter().to_bytes()), _read_adapter, (ConfigError,)
    ),
    Target(
        "reply",
        mutate_json_like(_make_seed("reply", flower_records.from_reply, seeds.reply)),
        _parse_reply,
        (ConfigError,),
    ),
    Target(
        "receipt",
        mutate_json_like(_make_seed("receipt", flower_records.from_receipt, seeds.make_receipt)),
        _read_receipt,
        (ConfigError,),
    ),
    Target("records", lambda: st.binary(max_size=32), _read_records, ()),
    Target("gate", mutate_bytes_like(_make_gate_seed), _call_gate, ()),
    Target(
        "join request",
        mutate_json_like(lambda: json.loads(join_request().read_bytes())),
        _parse_join_request,
        (ConfigError,),
    ),
)
