"""The verdict of `fedtune gate`: `gate.json` in a run's folder, which the run's model cards repeat.

The verdict names the run, the model's files and the report that were judged, each rule with its limit and its result,
and may be signed.  It is the record of all criteria that were applied to one model before its release.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from fedtune.codec import decode, parse_json
from fedtune.federation.run_folder import RunFolder
from fedtune.privacy.keys import SigningKey, is_signed
from fedtune.report.facts import RunFacts
from fedtune.report.model import Signature
from fedtune.spec import RUN_SCHEMA, ConfigError, check_schema, spec

GATE = "gate.json"
_PURPOSE = "gate"


@spec
class GateVerdict:
    """The result of judging one finished run by one set of rules.

    Attributes:
        schema_version: the schema number of the run folder.
        fedtune_version: the version that judged.
        judged: the day of the judgment, in UTC.
        run: the run, as the sites' ledgers call it.
        model: file of the run's adapter -> its SHA-256, as in the judged report.
        report_sha256: the SHA-256 of the judged report.json.
        rules: the name of the set of rules.
        rules_sha256: the SHA-256 of the file with the rules.
        limits: rule -> its limit, as JSON.
        results: rule -> "right", "wrong" or "missing", as in `Check`.
        reasons: rule -> what was found, in English.
        signature: the signature over everything else; None: nobody signed.
    """

    schema_version: int
    fedtune_version: str
    judged: str
    run: str
    model: Mapping[str, str]
    report_sha256: str
    rules: str
    rules_sha256: str
    limits: Mapping[str, str]
    results: Mapping[str, str]
    reasons: Mapping[str, str]
    signature: Signature | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """The rules that do not hold, or could not be judged."""
        return tuple(rule for rule, state in self.results.items() if state != "right")

    def sign(self, key: SigningKey) -> GateVerdict:
        """Return the verdict with a signature by `key`."""
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
    """Return the content of gate.json; `read_verdict` reads it."""
    return json.dumps(dataclasses.asdict(verdict), indent=1, ensure_ascii=False).encode() + b"\n"


def list_adapter_files(facts: RunFacts) -> Mapping[str, str]:
    """Return the files of the run's own adapter in a report's facts: name -> SHA-256."""
    return {name: digest for name, digest in facts.files.items() if name.startswith(f"{RunFolder(Path()).adapter}/")}


def read_verdict(folder: Path, facts: RunFacts) -> GateVerdict | None:
    """Read the verdict on a run from its folder.

    Guarantee: the verdict is about this run and exactly these model files, and a signature in it is valid.

    Returns:
        The verdict; None if there is none, if it is about another run or model, or if its file was changed.
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
    is_own = (verdict.run, verdict.model) == (facts.run, list_adapter_files(facts))
    return verdict if is_own and (verdict.signature is None or verdict.has_valid_signature) else None
