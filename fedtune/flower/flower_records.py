"""Conversion of fedtune's types to and from Flower's records; the only module with the keys of the wire format.

Each `to_...` function is the inverse of the `from_...` function.  Messages are untrusted, so it raises ConfigError for
malformed input, but it does not validate the decoded values.

An update is sent as its canonical bytes (`Update.to_bytes` in `fedtune/privacy/release.py`), which its receipt signs
and the ledger stores; an adapter is sent as safetensors.  Each is a single array of bytes, because Flower makes
several calls per array.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedtune.federation.protocol import Reply, Signed
from fedtune.federation.transport import Question
from fedtune.flower.site_socket import END as END
from fedtune.flower.site_socket import INVITE as INVITE
from fedtune.flower.site_socket import SUM as SUM
from fedtune.flower.site_socket import read_record_bytes, record_from_bytes
from fedtune.model.adapter import Adapter
from fedtune.privacy.release import Answer, Offer, Receipt, Refusal, Update
from fedtune.spec import ConfigError

ADAPTER, UPDATE = "adapter", "update"
REQUEST, SETTINGS, REPLY, RECEIPT = "request", "settings", "reply", "receipt"
ARRAYS = "arrays"  # input of Flower's strategies, only within the lead's process
WEIGHT, SITE = "weight", "site"
_AS_JSON: Mapping[str, type[Refusal | Offer]] = {"refusal": Refusal, "offer": Offer}
"""Answer types that are sent as JSON, by kind; an update is sent as bytes."""
PARTS = "parts"
WEIGHT_KEY = "num-examples"  # Flower's key for the weight of an update, here always the declared size


def to_arrays(tensors: Mapping[str, npt.NDArray[np.float32]]) -> ArrayRecord:
    """Convert tensors to an `ArrayRecord` with the same names, order and values."""
    return ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in tensors.items()})


def from_arrays(arrays: ArrayRecord) -> dict[str, npt.NDArray[np.float32]]:
    """Convert an `ArrayRecord` back to tensors; the inverse of `to_arrays`."""
    return {name: array.numpy() for name, array in arrays.items()}


def count_payload_bytes(content: RecordDict) -> int:
    """Count the payload bytes of a message: array data, other bytes, and UTF-8 texts."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    others = [value for record in content.config_records.values() for value in record.values()]
    return arrays + sum(len(value if isinstance(value, bytes) else str(value).encode()) for value in others)


@contextmanager
def _convert_to_config_error(content: RecordDict, key: str, bound: str) -> Iterator[None]:
    """Convert every error in the block, from Flower, JSON, safetensors or fedtune's readers, to a ConfigError."""
    try:
        yield
    except Exception as error:
        raise ConfigError(key, sorted(content), bound) from error


def from_adapter(adapter: Adapter) -> ArrayRecord:
    """Encode an adapter as an `ArrayRecord`, which several messages can share."""
    return record_from_bytes(adapter.to_bytes())


def to_adapter(content: RecordDict) -> Adapter:
    """Decode the adapter from the content of a message."""
    with _convert_to_config_error(content, "message", "must contain an adapter"):
        return Adapter.from_bytes(read_record_bytes(content.array_records[ADAPTER]))


def from_question(question: Question, adapter: ArrayRecord | None) -> RecordDict:
    """Encode a signed question with its settings and attachments; `adapter` is the output of `from_adapter`."""
    signed = question.signed
    content = RecordDict({REQUEST: ConfigRecord({"json": signed.text, "signature": signed.signature})})
    if question.settings:
        content[SETTINGS] = ConfigRecord({"json": question.settings})
    if adapter is not None:
        content[ADAPTER] = adapter
    if question.parts is not None:
        content[PARTS] = ConfigRecord({f"{number:03d}": part for number, part in enumerate(question.parts)})
    return content


def to_signed(content: RecordDict) -> Signed:
    """Decode the lead's signed question from the content of a message."""
    with _convert_to_config_error(content, "message", "must contain a signed request"):
        record = content.config_records[REQUEST]
        return Signed(text=str(record["json"]), signature=str(record["signature"]))


def to_settings(content: RecordDict) -> str:
    """Decode the JSON text of the run's configuration from a message; an empty string if the message has none."""
    if SETTINGS not in content:
        return ""
    with _convert_to_config_error(content, "message", "must contain settings as text"):
        return str(content.config_records[SETTINGS]["json"])


def to_parts(content: RecordDict) -> list[bytes]:
    """Decode the attached protocol messages of a secure aggregation request."""
    parts: list[bytes] = []
    with _convert_to_config_error(content, "message", "must contain secure aggregation messages as bytes"):
        for _, part in sorted(content.config_records[PARTS].items()):
            if type(part) is not bytes:
                raise TypeError("a part must be bytes")
            parts.append(part)
    return parts


def from_step(answer: bytes | Refusal) -> RecordDict:
    """Encode a site's answer to a step of secure aggregation."""
    if isinstance(answer, bytes):
        return RecordDict({PARTS: ConfigRecord({"000": answer})})
    return from_reply(Reply(body=answer, receipt=None))


def to_step(content: RecordDict) -> bytes | Refusal:
    """Decode a site's answer to a step of secure aggregation."""
    if PARTS not in content:
        body = to_reply(content).body
        if isinstance(body, Refusal):
            return body
    parts = to_parts(content)
    if len(parts) != 1:
        raise ConfigError("message", len(parts), "must contain exactly one secure aggregation message")
    return parts[0]


def from_receipt(receipt: Receipt | None) -> RecordDict:
    """Encode a site's answer to the notice of the end of a run."""
    text = json.dumps(None if receipt is None else receipt.to_json())
    return RecordDict({RECEIPT: ConfigRecord({"json": text})})


def to_receipt(content: RecordDict) -> Receipt | None:
    """Decode a site's answer to the notice of the end of a run; None if the site has no receipt."""
    with _convert_to_config_error(content, "receipt", "must be a site's receipt"):
        fields = json.loads(str(content.config_records[RECEIPT]["json"]))
        return None if fields is None else Receipt.from_json(fields)


def from_reply(reply: Reply) -> RecordDict:
    """Encode a site's answer with its receipt: an update as canonical bytes, any other answer as JSON."""
    body, receipt = reply.body, None if reply.receipt is None else reply.receipt.to_json()
    if isinstance(body, Update):
        text = json.dumps({"kind": UPDATE, "receipt": receipt})
        return RecordDict({UPDATE: record_from_bytes(body.to_bytes()), REPLY: ConfigRecord({"json": text})})
    kind = next(kind for kind, release in _AS_JSON.items() if isinstance(body, release))
    return RecordDict({REPLY: ConfigRecord({"json": json.dumps({"kind": kind, "receipt": receipt, **body.to_json()})})})


def to_reply(content: RecordDict) -> Reply:
    """Decode a site's answer to a round or an invitation."""
    with _convert_to_config_error(content, "reply", "must be a site's answer"):
        fields = json.loads(str(content.config_records[REPLY]["json"]))
        kind, receipt = fields.pop("kind"), fields.pop("receipt")
        body: Answer
        if kind in _AS_JSON:
            body = _AS_JSON[kind].from_json(fields)
        else:
            body = Update.from_bytes(read_record_bytes(content.array_records[UPDATE]))
        return Reply(body=body, receipt=None if receipt is None else Receipt.from_json(receipt))


def build_weighted_record(tensors: Mapping[str, npt.NDArray[np.float32]], weight: float) -> RecordDict:
    """Build a Flower record with an update, or a piece of an update, and its public weight."""
    return RecordDict({ARRAYS: to_arrays(tensors), WEIGHT: MetricRecord({WEIGHT_KEY: weight})})
