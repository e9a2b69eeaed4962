"""The canonical bytes of a report, its signature, and a strict parser that detects any changed digit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from itertools import zip_longest
from pathlib import Path

from fedtune.codec import read_bounded_file
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.report.facts import LedgerFacts, RunFacts
from fedtune.report.model import Report, Signature, from_json, to_json
from fedtune.spec import ConfigError, RunError, name_file_in_errors

PURPOSE = "report"  # signature domain, so that a signature on a receipt or ledger is not valid for a report
_MAX_DIGITS = 19
_MAX_SHOWN = 100  # characters of a line in an error message


def encode_canonical_bytes(report: Report) -> bytes:
    """Serialize a report without its signature as compact UTF-8 JSON with sorted keys and shortest float digits.

    Raises:
        RunError: a text of the report is not Unicode.
    """
    fields = to_json(report)
    del fields["signature"]
    return _encode_text(json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


def report_to_json(report: Report) -> str:
    """Serialize a report as the content of a `report.json`; `parse_report` is the inverse."""
    return json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def encode_report(report: Report) -> bytes:
    """Serialize a report as the bytes of a `report.json`.

    Raises:
        RunError: a text of the report is not Unicode.
    """
    return _encode_text(report_to_json(report))


def compute_report_digest(report: Report) -> str:
    """Return the SHA-256 of a report's `report.json`, in hex."""
    return hashlib.sha256(encode_report(report)).hexdigest()


def parse_report(data: bytes) -> Report:
    """Parse the bytes of a `report.json`, which must be exactly as fedtune writes them, except for line endings.

    Otherwise the file could be changed without changing the signed bytes, for example by a duplicate key or by digits
    beyond a float's precision.

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
            bound = f"differs from fedtune's output, which has: {other.strip()}"
            raise ConfigError(f"report, line {number}", one.strip()[:_MAX_SHOWN], bound)
    return report


def read_report(name: str) -> tuple[Path, Report]:
    """Read a report from a file, or from the report.json in a folder; return the file's path and the report."""
    path = Path(name) / "report.json" if Path(name).is_dir() else Path(name)
    data = read_bounded_file(path, key="report", name=name, bound="must be a report.json, or a folder with one")
    with name_file_in_errors(path):
        return path, parse_report(data)


def sign_report(report: Report, key: SigningKey) -> Report:
    """Return a copy of the report that is signed with `key`; an earlier signature is replaced."""
    signature = Signature(key=key.public, signature=key.sign(PURPOSE, encode_canonical_bytes(report)))
    return dataclasses.replace(report, signature=signature)


def format_verify_command(report: Report) -> str:
    """Return the command that runs all required checks (docs/report.md) on the report in the current folder.

    KEY stands for the signer's public key; roster.json has the keys of a run's real sites.  Without a signature,
    the command has neither option.
    """
    if not report.signature:
        return "fedtune report verify report.json"
    of_sites = isinstance(report.facts, RunFacts) and not report.facts.simulated
    return f"fedtune report verify report.json --key KEY{' --roster roster.json' if of_sites else ''}"


def verify_report_signature(report: Report, *, expected_key: str | None = None) -> str | None:
    """Verify a report's signature and return the public key that made it; None: the report is not signed.

    Guarantee: with an `expected_key` from a source other than the report, only the holder of that key can have changed
    the report.

    Raises:
        RunError: the signature is invalid, was made with another key, or is missing although a key is expected.
    """
    if (signature := report.signature) is None:
        if expected_key is not None:
            raise RunError(f"the report is not signed: ask for a report that is signed by {expected_key}")
        return None
    if not is_signed(signature.key, PURPOSE, encode_canonical_bytes(report), signature.signature):
        raise RunError(f"the signature by {signature.key} is invalid: the report or the signature was changed")
    # A ledger's report is signed by the key that signs the ledger's events.
    facts = report.facts
    own = [facts.verification.site_key] if isinstance(facts, LedgerFacts) and facts.verification else []
    for other in (expected_key, *own):
        if other not in (None, signature.key):
            raise RunError(f"the report is signed by {signature.key}, not by {other}")
    return signature.key


def _encode_text(text: str) -> bytes:
    """Encode a report's JSON, which contains a lone surrogate if a JSON file of the run or the ledger escaped one."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        before = text[: error.start].rpartition("\n")[2].strip()[-_MAX_SHOWN:]
        bound = "a file of the run or the ledger is damaged"
        raise RunError(f"the report contains a text that is not Unicode, after {before}: {bound}") from error


def _parse_bounded_int(text: str) -> int:
    # No count needs more than 64 bits, and Python refuses to print integers of more than 4,300 digits.
    if len(text) > _MAX_DIGITS:
        raise ConfigError("report", f"{text[:_MAX_DIGITS]}...", f"must be a number of at most {_MAX_DIGITS} digits")
    return int(text)
