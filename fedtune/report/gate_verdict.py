"""The verdict of `fedtune gate` on a run, stored as `gate.json` in the run's folder and repeated in its model cards.

The verdict names the run, the model files and the report that were judged, and each rule with its limit and its result.
It documents all criteria that were applied to a model before its release. Pages and cards repeat it only if it is
signed with the key that signed the run's report, because anybody can write such a file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from fedtune.codec import decode, read_json_object
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.report import signing
from fedtune.report.facts import RunFacts
from fedtune.report.model import Report, Signature
from fedtune.spec import RUN_SCHEMA, ConfigError, RunError, check_schema, spec

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
        simulated: whether the run was a simulation, whose model must not be released even if all rules hold.
        rules: name of the rule set.
        rules_sha256: SHA-256 of the rule file.
        limits: rule -> its limit, as JSON.
        results: rule -> "passed", "failed" or "missing", as in `Check`.
        reasons: rule -> a sentence about the result, in English.
        signature: signature over all other fields; None: the verdict is not signed.
    """

    schema_version: int
    fedtune_version: str
    judged: str
    run: str
    adapter_digest: str
    report_sha256: str
    simulated: bool
    rules: str
    rules_sha256: str
    limits: Mapping[str, str]
    results: Mapping[str, str]
    reasons: Mapping[str, str]
    signature: Signature | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """The rules that were violated or could not be judged."""
        return tuple(rule for rule, state in self.results.items() if state != "passed")

    @property
    def passed(self) -> bool:
        """Whether the model may be released."""
        return not self.failed and not self.simulated

    @property
    def decision(self) -> str:
        """What the verdict says about the model, as the end of a sentence."""
        if self.failed:
            return f"must not be released: these rules fail: {', '.join(self.failed)}"
        if self.simulated:
            return "must not be released: all rules hold, but the run is a simulation"
        return "may be released"

    def sign(self, key: SigningKey) -> GateVerdict:
        """Return a copy of the verdict that is signed with `key`."""
        signature = Signature(key=key.public, signature=key.sign(_PURPOSE, self._signed_bytes()))
        return dataclasses.replace(self, signature=signature)

    def has_valid_signature_by(self, key: str | None) -> bool:
        """Whether the verdict is signed with `key`."""
        own = self.signature
        return own is not None and own.key == key and is_signed(key, _PURPOSE, self._signed_bytes(), own.signature)

    def _signed_bytes(self) -> bytes:
        fields = dataclasses.asdict(self) | {"signature": None}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def verdict_to_json(verdict: GateVerdict) -> bytes:
    """Serialize a verdict as the content of gate.json; `read_verdict` is the inverse."""
    return json.dumps(dataclasses.asdict(verdict), indent=1, ensure_ascii=False).encode() + b"\n"


def read_verdict(folder: Path, report: Report) -> GateVerdict | None:
    """Read the verdict on a run from its folder.

    Guarantee: the verdict is about this run and exactly this adapter, and is signed with the key that signed the
    folder's report.json. Whoever knows that key can trust the verdict as much as that report. An export makes
    report.json outdated but changes neither adapter nor verdict, so `report` may be newer, and unsigned.

    Returns:
        The verdict; None if the file is missing or invalid, is about another run or model, or lacks that signature.
    """
    path = folder / GATE
    if not path.is_file():
        return None
    try:
        signed = signing.read_report(str(folder))[1]
        key = signing.verify_report_signature(signed)
        fields = read_json_object(path, key=GATE)
        check_schema("schema_version", fields.get("schema_version"), RUN_SCHEMA, of="run folder")
        verdict = decode(GateVerdict, fields)
    except (ConfigError, RunError):
        return None
    assert isinstance(report.facts, RunFacts), "a verdict is on a run"
    named = {(one.run, one.adapter_digest) for one in (report.facts, signed.facts) if isinstance(one, RunFacts)}
    is_own = named == {(verdict.run, verdict.adapter_digest)}
    return verdict if is_own and verdict.has_valid_signature_by(key) else None
