"""fedtune's own types to and from Flower's records; the only file that knows the keys on the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedtune.federation.protocol import Reply, RoundRequest
from fedtune.model import Adapter
from fedtune.privacy.release import Reason, Receipt, Refusal, Update
from fedtune.spec import ConfigError

ARRAYS, REQUEST, REPLY, WEIGHT, SITE = "arrays", "request", "reply", "weight", "site"
WEIGHT_KEY = "num-examples"
"""Flower's name for an average's weight.  Here it always holds the declared size."""


def to_arrays(tensors: Mapping[str, npt.NDArray[np.float32]]) -> ArrayRecord:
    """An `ArrayRecord` with the same names, order and values."""
    return ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in tensors.items()})


def from_arrays(arrays: ArrayRecord) -> dict[str, npt.NDArray[np.float32]]:
    """The inverse of `to_arrays`."""
    return {name: array.numpy() for name, array in arrays.items()}


def num_bytes(content: RecordDict) -> int:
    """Payload of a message: array bytes, and texts."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    texts = sum(len(str(value)) for record in content.config_records.values() for value in record.values())
    return arrays + texts


def from_request(request: RoundRequest, arrays: ArrayRecord) -> RecordDict:
    """Content of the message that asks a site for a round."""
    return RecordDict({ARRAYS: arrays, REQUEST: ConfigRecord({"json": request.to_json()})})


def to_request(content: RecordDict) -> tuple[RoundRequest, Adapter]:
    """The request and the adapter that travels with it.

    Raises:
        ConfigError: the message is not such a request.
    """
    try:
        text = str(content.config_records[REQUEST]["json"])
        tensors = from_arrays(content.array_records[ARRAYS])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("message", sorted(content), "must hold a round request") from error
    return RoundRequest.from_json(text), Adapter(tensors)


def from_reply(reply: Reply) -> RecordDict:
    """Content of a site's answer: the released tensors, and a JSON of the release types' other fields."""
    body, receipt = reply.body, reply.receipt
    fields: dict[str, Any] = {
        "kind": "update" if isinstance(body, Update) else "refusal",
        "receipt": None if receipt is None else asdict(receipt),
        "site": body.site,
        "run": body.run,
        "round": body.round,
    }
    if isinstance(body, Refusal):
        fields |= {"reason": body.reason.value, "asked": body.asked, "allowed": body.allowed}
        return RecordDict({REPLY: ConfigRecord({"json": json.dumps(fields)})})
    return RecordDict({ARRAYS: to_arrays(body.tensors), REPLY: ConfigRecord({"json": json.dumps(fields)})})


def to_reply(content: RecordDict) -> Reply:
    """The answer that `from_reply` wrote.

    Raises:
        ConfigError: anything else; a site may send whatever it likes.
    """
    try:
        fields = json.loads(str(content.config_records[REPLY]["json"]))
        receipt = None if fields["receipt"] is None else _receipt(fields["receipt"])
        where: dict[str, Any] = {"site": str(fields["site"]), "run": str(fields["run"]), "round": int(fields["round"])}
        body: Update | Refusal
        if fields["kind"] == "update":
            body = Update(**where, tensors=from_arrays(content.array_records[ARRAYS]))
        else:
            words: dict[str, Any] = {
                key: None if fields[key] is None else str(fields[key]) for key in ("asked", "allowed")
            }
            body = Refusal(**where, reason=Reason(fields["reason"]), **words)
    except Exception as error:  # numpy alone raises five kinds over bytes that are no array
        raise ConfigError("reply", sorted(content), "must be a site's answer") from error
    return Reply(body=body, receipt=receipt)


def _receipt(fields: dict[str, Any]) -> Receipt:
    receipt = Receipt(**fields)
    counts = (receipt.charged_rounds, receipt.charged_steps, receipt.sequence)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a receipt's counts")
    return receipt


def weighted(adapter: Adapter, declared_size: int) -> RecordDict:
    """What Flower's strategies average: an update and its public weight."""
    return RecordDict({ARRAYS: to_arrays(adapter.tensors), WEIGHT: MetricRecord({WEIGHT_KEY: declared_size})})
