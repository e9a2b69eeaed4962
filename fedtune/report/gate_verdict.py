"""The verdict of `fedtune gate` on a run, stored as `gate.json` in the run's folder and repeated in its model cards.

The verdict names the run, the model files and the report that were judged, and each rule with its limit and its result.
It can be signed, and documents all criteria that were applied to a model before its release.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from fedtune.codec import decode, parse_json
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.report.facts import RunFacts
from fedtune.report.model import Signature
from fedtune.spec import RUN_SCHEMA, ConfigError, check_schema, spec

GATE = "gate.json"
_PURPOSE = "gate"


@spec
class GateVerdict:
    """The result of judging one finished run by one rule set.

    Attributes:
        schema_version: schema version of the run folder.
        fedtune_version: fedtune version that judged the run.
        judged: date of the verdict, in UTC.
        run: name of the run in the sites' ledgers.
        adapter_digest: digest of the run's adapter, as in run.json and the judged report.
        report_sha256: SHA-256 of the judged report.json.
        rules: name of the rule set.
        rules_sha256: SHA-256 of the rule file.
        limits: rule -> its limit, as JSON.
        results: rule -> "right", "wrong" or "missing", as in `Check`.
        reasons: rule -> a sentence about the result, in English.
        signature: signature over all other fields; None: the verdict is not signed.
    """

    schema_version: int
    fedtune_version: str
    judged: str
    run: str
    adapter_digest: str
    report_sha256: str
    rules: str
    rules_sha256: str
    limits: Mapping[str, str]
    results: Mapping[str, str]
    reasons: Mapping[str, str]
    signature: Signature | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """The rules that were violated or could not be judged."""
        return tuple(rule for rule, state in self.results.items() if state != "right")

    def sign(self, key: SigningKey) -> GateVerdict:
        """Return a copy of the verdict that is signed with `key`."""
        signature = Signature(key=key.public, signature=key.sign(_PURPOSE, self._signed_bytes()))
        return dataclasses.replace(self, signature=signature)

    @property
    def has_valid_signature(self) -> bool:
        """Whether the verdict is signed by the key that it names."""
        signed = self.signature
        return signed is not None and is_signed(signed.key, _PURPOSE, self._signed_bytes(), signed.signature)

    def _signed_bytes(self) -> bytes:
        fields = dataclasses.asdict(self) | {"signature": None}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def verdict_to_json(verdict: GateVerdict) -> bytes:
    """Serialize a verdict as the content of gate.json; `read_verdict` is the inverse."""
    return json.dumps(dataclasses.asdict(verdict), indent=1, ensure_ascii=False).encode() + b"\n"


def read_verdict(folder: Path, facts: RunFacts) -> GateVerdict | None:
    """Read the verdict on a run from its folder.

    Guarantee: the verdict is about this run and exactly this adapter, and its signature, if any, is valid.

    Returns:
        The verdict; None if the file is missing or invalid, is about another run or model, or was changed after
            signing.
    """
    path = folder / GATE
    if not path.is_file():
        return None
    try:
        fields = parse_json(path.read_bytes(), key=GATE, bound="must be an object")
        check_schema("schema_version", fields.get("schema_version"), RUN_SCHEMA, of="run folder")
        verdict = decode(GateVerdict, fields)
    except ConfigError:
        return None
    is_own = (verdict.run, verdict.adapter_digest) == (facts.run, facts.adapter_digest)
    return verdict if is_own and (verdict.signature is None or verdict.has_valid_signature) else None
