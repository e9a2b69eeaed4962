"""What may leave a site: exactly these fields, in one canonical encoding."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtune.privacy import release
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.release import RECEIPT, Difference, Reason, Receipt, Refused, Update
from fedtune.spec import ConfigError, RefusedError

from .builders import make_key, site_key

MAGIC = b"fedtune-update-2\n"

updates = st.builds(
    Update,
    site=st.text(max_size=8),
    run=st.text(max_size=8),
    round=st.integers(1, 10**6),
    tensors=st.dictionaries(
        st.text(max_size=8),
        arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
        max_size=4,
    ),
    scores=st.none() | st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)),
)


def make_small_update() -> Update:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    return Update(site="a", run="r", round=12, tensors={"lora_A.weight": values, "head.weight": values[0]})


def encode_update(header: object, body: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MAGIC + struct.pack("<Q", len(raw)) + raw + body


@settings(max_examples=60, deadline=None, derandomize=True)
@given(updates)
def test_update_round_trips_through_its_bytes(update: Update) -> None:
    data = update.to_bytes()
    decoded = Update.from_bytes(data)
    assert (decoded.site, decoded.run, decoded.round) == (update.site, update.run, update.round)
    assert decoded.scores == update.scores
    assert list(decoded.tensors) == list(update.tensors), "the order of the tensors must be kept"
    for name, value in update.tensors.items():
        assert decoded.tensors[name].dtype == np.float32
        assert decoded.tensors[name].shape == value.shape
        assert decoded.tensors[name].tobytes() == value.tobytes()  # bitwise, because of NaN
    assert decoded.to_bytes() == data


def test_update_encoding_matches_golden_bytes() -> None:
    update = Update(site="a", run="r", round=2, tensors={"w": np.array([[1.0, -2.0]], dtype=np.float32)})
    header = b'{"site": "a", "run": "r", "round": 2, "tensors": [["w", [1, 2]]], "scores": null}'
    body = b"\0\0\x80\x3f\0\0\x00\xc0"
    assert update.to_bytes() == MAGIC + b"\x51\0\0\0\0\0\0\0" + header + body
    halved = dataclasses.replace(update, tensors=Difference({"w": np.array([[0x3F80, 0xC000]], dtype=np.uint16)}))
    inner = header.replace(b'[["w", [1, 2]]]', b'{"bfloat16": [["w", [1, 2]]]}')
    assert halved.to_bytes() == MAGIC + b"\x5f\0\0\0\0\0\0\0" + inner + b"\x80\x3f\x00\xc0"
    decoded = Update.from_bytes(halved.to_bytes()).tensors
    assert isinstance(decoded, Difference)
    assert decoded.halves["w"].tolist() == [[0x3F80, 0xC000]]
    scored = dataclasses.replace(update, scores=(0.5, -2.0)).to_bytes()
    assert scored == MAGIC + b"\x58\0\0\0\0\0\0\0" + header.replace(b"null", b"[0.5, -2.0]") + body


def test_truncated_update_raises_a_config_error() -> None:
    data = make_small_update().to_bytes()
    for length in range(len(data)):
        with pytest.raises(ConfigError, match="must be an encoded update"):
            Update.from_bytes(data[:length])


def test_flipped_bits_raise_a_config_error_or_give_another_valid_update() -> None:
    data = make_small_update().to_bytes()
    header_end = data.index(b"}") + 1
    refused = 0
    for bit in range(8 * header_end):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            decoded = Update.from_bytes(bytes(flipped))
        except ConfigError:
            refused += 1
        else:  # a letter in a name or a digit of the round changed: the result must be encoded exactly as read
            assert decoded.to_bytes() == bytes(flipped)
            assert (decoded.site, decoded.run, decoded.round, list(decoded.tensors)) != (
                "a",
                "r",
                12,
                list(make_small_update().tensors),
            )
    assert refused > 8 * header_end / 2


FIELDS = {"site": "a", "run": "r", "round": 1, "tensors": [], "scores": None}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        make_small_update().to_bytes() + b"\0",
        MAGIC + struct.pack("<Q", (1 << 20) + 1) + b" " * ((1 << 20) + 1),  # a long header is not read
        b"fedtune-update-1\n" + make_small_update().to_bytes()[len(MAGIC) :],
        MAGIC + struct.pack("<Q", 1 << 63) + b"{}",
        MAGIC + struct.pack("<Q", 100) + b"{}",
        encode_update(b"[" * 100_000),  # deeper than Python's parser allows
        encode_update(b"\xff\xfe"),
        encode_update([]),
        encode_update(None),
        encode_update({name: value for name, value in FIELDS.items() if name != "run"}),
        encode_update(FIELDS | {"train_loss": 3.1}),  # an additional field
        encode_update(json.dumps(FIELDS).replace(" ", "").encode()),  # whitespace could carry a message
        encode_update(json.dumps(FIELDS | {"round": -1}).replace("-1", "1e999").encode()),
        *(encode_update(FIELDS | fields) for fields in ({"round": "1"}, {"round": 1.0}, {"site": 5})),
        encode_update(FIELDS | {"scores": [1, 2]}),  # exact counts
        *(encode_update(FIELDS | {"scores": scores}) for scores in ([], {}, [1.0], [0.5, 2.0, 0.1], [0.5] * 4)),
        *(encode_update(FIELDS | {"scores": [one, 2.0]}) for one in (True, "0.5", float("nan"), float("inf"))),
        encode_update({name: value for name, value in FIELDS.items() if name != "scores"}),
        *(encode_update(FIELDS | {"tensors": tensors}) for tensors in (5, [["x"]], [["x", 5]])),
        encode_update(FIELDS | {"tensors": [["x", ["2"]]]}, bytes(8)),
        encode_update(FIELDS | {"tensors": [["x", [-1]]]}),
        encode_update(FIELDS | {"tensors": [["x", [True]]]}, bytes(4)),
        encode_update(FIELDS | {"tensors": [["x", [2**62, 2**62]]]}),
        encode_update(FIELDS | {"tensors": [["x", [1] * 100]]}, bytes(4)),
        encode_update(FIELDS | {"tensors": [["x", [1]], ["x", [1]]]}, bytes(8)),
        encode_update(FIELDS | {"tensors": {"bfloat16": [["x", [1]]]}}, bytes(4)),
        encode_update(FIELDS | {"tensors": {"float16": [["x", [1]]]}}, bytes(2)),
        encode_update(FIELDS | {"tensors": {"bfloat16": [["x", [1]]], "beside": 1}}, bytes(2)),
        encode_update(FIELDS | {"tensors": {"bfloat16": "masked"}}, bytes(2)),
    ],
)
def test_malformed_update_bytes_raise_a_config_error(data: bytes) -> None:
    with pytest.raises(ConfigError, match="must be an encoded update"):
        Update.from_bytes(data)


def test_released_types_and_refusal_reasons_match_a_fixed_list() -> None:
    # A new field must be noised, or derive only from request, plan and ledger; a new reason tells the server something
    # about a site. Masked or rounded values are part of an update.
    listed = json.loads(Path(__file__).with_name("released.json").read_text())
    classes = [value for value in vars(release).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
    own_classes = [cls for cls in classes if cls.__module__ == release.__name__ and cls is not Difference]
    types = {cls.__name__: cls for cls in own_classes}
    fields = {name: [field.name for field in dataclasses.fields(cls) if field.init] for name, cls in types.items()}
    assert fields == listed["fields"]
    assert all("__slots__" in vars(cls) for cls in types.values()), "released types must have no other attributes"
    assert sorted(reason for group in listed["reasons"].values() for reason in group) == sorted(map(str, Reason))
    with pytest.raises(ValueError, match="is not a valid Reason"):
        Reason("23 records were skipped")


def test_offer_of_rank_zero_is_invalid() -> None:
    offer = release.Offer(site="north", run="r", max_rounds=3, min_noise=None, rank=1).to_json()
    assert release.Offer.from_json(offer).rank == 1
    with pytest.raises(ConfigError, match=r"^rank = 0: "):
        release.Offer.from_json(offer | {"rank": 0})


def test_refusal_carries_reason_and_requested_and_allowed_values() -> None:
    refused = Refused(Reason.PLAN_EXHAUSTED, requested=6, allowed=5)
    assert isinstance(refused, RefusedError)
    assert refused.exit_code == 3
    assert (refused.reason, refused.requested, refused.allowed) == (Reason.PLAN_EXHAUSTED, "6", "5")
    assert Refused(Reason.SITE_ERROR).requested is None
    # An unknown value must not be shown as a value.
    assert str(refused) == "plan_exhausted: requested 6, allowed 5"
    assert str(Refused(Reason.PLAN_EXHAUSTED, requested=6)) == "plan_exhausted: requested 6"
    assert str(Refused(Reason.SITE_ERROR)) == "site_error"
    long = Refused(Reason.BASE_MODELS, requested="a" * 64, allowed=", ".join(["b" * 64] * 16))
    fields = {
        "site": "a",
        "run": "r",
        "round": 1,
        "reason": long.reason,
        "requested": long.requested,
        "allowed": long.allowed,
    }
    assert release.Refusal.from_json(fields).allowed == long.allowed, "a lead must accept the cut text"


def make_signed_receipt(key: SigningKey, **changes: object) -> Receipt:
    fields: dict[str, Any] = {"site": "a", "run": "r", "charged_rounds": 2, "sequence": 9}
    fields |= {"head": "0" * 64, "site_key": key.public, "ended": False, "plan": "", "seeded_noise": False}
    fields |= {"simulated": False} | changes
    return Receipt(**fields, signature=key.sign(RECEIPT, Receipt(**fields, signature="").encode_signed_bytes()))


def test_receipt_signature_covers_every_field() -> None:
    receipt = make_signed_receipt(site_key)
    assert receipt.has_valid_signature()
    changes: dict[str, object] = {"site": "b", "run": "s", "charged_rounds": 1, "sequence": 8}
    changes |= {
        "head": "1" * 64,
        "site_key": make_key(7).public,
        "signature": make_signed_receipt(make_key(7)).signature,
    }
    changes |= {"reply": "2" * 64, "ended": True, "plan": "3" * 64, "seeded_noise": True, "simulated": True}
    assert set(changes) == {field.name for field in dataclasses.fields(Receipt)}
    for name, value in changes.items():
        assert not dataclasses.replace(receipt, **{name: value}).has_valid_signature(), name
    with_a_reply = make_signed_receipt(site_key, reply="2" * 64)
    assert with_a_reply.has_valid_signature()
    assert not dataclasses.replace(with_a_reply, reply="").has_valid_signature()
    assert not dataclasses.replace(receipt, signature="").has_valid_signature()


def test_receipt_round_trips_through_json_and_rejects_other_values() -> None:
    receipt = make_signed_receipt(site_key)
    fields = json.loads(json.dumps(dataclasses.asdict(receipt)))
    assert Receipt.from_json(fields) == receipt
    invalid = {"charged_rounds": -1, "sequence": 1 << 62, "run": "r" * 1001, "site": "a\nb", "epsilon": 1}
    for key, value in invalid.items():
        with pytest.raises(ConfigError):
            Receipt.from_json(fields | {key: value})
