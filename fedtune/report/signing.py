"""The canonical bytes of a report, its signature, and a strict reader that detects any changed digit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from itertools import zip_longest
from pathlib import Path

from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.report.facts import LedgerFacts
from fedtune.report.model import Report, Signature, from_json, to_json
from fedtune.spec import ConfigError, RunError, name_file_in_errors

PURPOSE = "report"  # purpose of the signature, so that one made for a receipt or a ledger does not pass here
_MOST_DIGITS = 19
_MOST_SHOWN = 100  # letters of a line
MOST_BYTES = 64 << 20  # of a report's file


def encode_canonical_bytes(report: Report) -> bytes:
    """Serialize everything but the signature as UTF-8 JSON with sorted keys, no spaces, and the shortest digits of
    floats.
    """
    fields = to_json(report)
    del fields["signature"]
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def report_to_json(report: Report) -> str:
    """Return the content of a `report.json`; `parse_report` is the inverse."""
    return json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def report_digest(report: Report) -> str:
    """Return the SHA-256 of the report's `report.json`, in hex."""
    return hashlib.sha256(report_to_json(report).encode()).hexdigest()


def parse_report(data: bytes) -> Report:
    """Read a report from the bytes of a `report.json`, which must be exactly as fedtune writes it, except for line
    endings.

    Otherwise somebody could change a digit beyond a float's precision, or add a second value for a key, without
    changing the signed bytes.

    Raises:
        ConfigError: the bytes are not such a report.
    """
    try:
        json.loads(data, parse_int=_parse_bounded_int)
        report = from_json(data)
        said, right = data.decode().splitlines(), report_to_json(report).splitlines()
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        where = f"text that is not JSON from line {error.lineno} on" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError("report", where or "not JSON in UTF-8", "must be a complete report.json") from None
    for number, (one, other) in enumerate(zip_longest(said, right, fillvalue=""), start=1):
        if one != other:
            bound = f"must be as written by fedtune: {other.strip()}"
            raise ConfigError(f"report, line {number}", one.strip()[:_MOST_SHOWN], bound)
    return report


def read_bounded_file(path: Path, *, key: str, name: str, bound: str) -> bytes:
    """Read a file of at most `MOST_BYTES`.

    Raises:
        ConfigError: the file cannot be read or is too large; `key`, `name` and `bound` are the error's.
    """
    try:
        file = path.stat()
        if not stat.S_ISREG(file.st_mode) or file.st_size > MOST_BYTES:  # a pipe would wait for ever
            raise ConfigError(key, name, f"{bound}, of at most {MOST_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(key, name, f"{bound} ({error.strerror})") from None


def read_report(name: str) -> tuple[Path, Report]:
    """Read a report from a file, or from the report.json in a folder; return its path and the report."""
    path = Path(name) / "report.json" if Path(name).is_dir() else Path(name)
    data = read_bounded_file(path, key="report", name=name, bound="must be a report.json, or a folder with one")
    with name_file_in_errors(path):
        return path, parse_report(data)


def sign_report(report: Report, key: SigningKey) -> Report:
    """Return the report with a signature by `key`, which replaces any earlier signature."""
    signature = Signature(key=key.public, signature=key.sign(PURPOSE, encode_canonical_bytes(report)))
    return dataclasses.replace(report, signature=signature)


def verify_report_signature(report: Report, *, expected_key: str | None = None) -> str | None:
    """Verify the signature and return the public key that made it; None: the report is not signed.

    Guarantee: with an `expected_key`, known from a source other than the report, nobody without that key changed
    anything in the report.

    Raises:
        RunError: the signature is wrong, was made with another key, or is missing although a key is expected.
    """
    if (signature := report.signature) is None:
        if expected_key is not None:
            raise RunError(f"the report is not signed, but must be signed by {expected_key}")
        return None
    if not is_signed(signature.key, PURPOSE, encode_canonical_bytes(report), signature.signature):
        raise RunError(f"the signature by {signature.key} does not match the report: one of them was changed")
    # A ledger's report is signed by the key that signs the ledger's events.
    facts = report.facts
    own = [facts.verification.site_key] if isinstance(facts, LedgerFacts) and facts.verification else []
    for other in (expected_key, *own):
        if other not in (None, signature.key):
            raise RunError(f"the report is signed by {signature.key}, not by {other}")
    return signature.key


def _parse_bounded_int(text: str) -> int:
    # Nothing that is counted needs more than 64 bits, and a sum of what has 4,300 digits cannot be written.
    if len(text) > _MOST_DIGITS:
        raise ConfigError("report", f"{text[:_MOST_DIGITS]}...", f"must be a number of at most {_MOST_DIGITS} digits")
    return int(text)
