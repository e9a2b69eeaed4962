"""A signature covers every value of a report, and each value has one spelling."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.report import signing
from fedtune.report.model import Signature, from_json, to_json
from fedtune.spec import REPORT_SCHEMA, ConfigError, FedtuneError, RunError

from ..privacy.builders import site_key as key
from ..privacy.builders import stranger_key
from .shown import Make, change_facts, iter_leaves, put


@pytest.fixture
def text(a_report: Make) -> str:
    """A signed report, which every example of a test changes anew."""
    return signing.report_to_json(signing.sign_report(a_report(), key))


def test_report_round_trips_in_its_canonical_form(a_report: Make, a_ledger_report: Make) -> None:
    for report in (a_report(), a_ledger_report(), signing.sign_report(a_report(), key)):
        assert signing.parse_report(signing.report_to_json(report).encode()) == report
    # The canonical form is sorted, dense and without the signature.
    report = change_facts(a_report(), name="Königsberg")
    text = signing.encode_canonical_bytes(report).decode()
    assert all(part in text for part in ('"name":"Königsberg"', '"delta":1e-05'))
    assert not any(part in text for part in ("\n", ', "', '": '))
    assert "signature" not in json.loads(text)
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert signing.encode_canonical_bytes(signing.sign_report(report, key)) == text.encode()


def test_report_with_a_lone_surrogate_is_never_written_as_bytes(a_report: Make, a_ledger_report: Make) -> None:
    for report in (change_facts(a_report(), name="Königs\ud800berg"), change_facts(a_ledger_report(), site="\udfff")):
        for encode in (signing.encode_report, signing.encode_canonical_bytes, signing.compute_report_digest):
            with pytest.raises(RunError, match=r'not Unicode, after .*"(name": ?"Königs|site": ?")'):
                encode(report)
        with pytest.raises(RunError, match="not Unicode"):
            signing.sign_report(report, key)


def test_signature_names_its_key(a_report: Make) -> None:
    report = signing.sign_report(a_report(), key)
    assert signing.verify_report_signature(report) == key.public
    assert signing.verify_report_signature(report, expected_key=key.public) == key.public
    assert signing.sign_report(report, key) == report
    # A missing one is an error only where one is expected.
    assert signing.verify_report_signature(a_report()) is None
    with pytest.raises(RunError, match="not signed"):
        signing.verify_report_signature(a_report(), expected_key=key.public)


def test_foreign_or_misused_signature_is_detected(a_report: Make) -> None:
    report = signing.sign_report(a_report(), key)
    with pytest.raises(RunError, match=f"not by {stranger_key.public}"):
        signing.verify_report_signature(report, expected_key=stranger_key.public)
    for signature in (
        Signature(key=stranger_key.public, signature=report.signature.signature),
        Signature(key=report.signature.key, signature=report.signature.signature.replace("a", "A")),
        Signature(key="00" * 32, signature="00" * 64),
        Signature(key="", signature=""),
        Signature(key=key.public, signature=key.sign("receipt", signing.encode_canonical_bytes(report))),
    ):
        with pytest.raises(RunError, match="the report or the signature was changed"):
            signing.verify_report_signature(replace(report, signature=signature))


def test_ledger_report_must_be_signed_by_its_site(a_ledger_report: Make) -> None:
    report = a_ledger_report()
    with pytest.raises(RunError, match="ef" * 32):
        signing.verify_report_signature(signing.sign_report(report, key))
    own_report = change_facts(report, verification=replace(report.facts.verification, site_key=key.public))
    assert signing.verify_report_signature(signing.sign_report(own_report, key)) == key.public


def test_signature_covers_every_value(a_ledger_report: Make, a_report: Make) -> None:
    report = signing.sign_report(a_report(sites=(*a_report().sites, *a_ledger_report().sites)), key)
    num_changed = 0
    for path, value in iter_leaves(to_json(report)):
        data, number = to_json(report), isinstance(value, int | float)
        put(data, path, not value if isinstance(value, bool) else value + 1 if number else f"{value}x")
        try:
            edited = from_json(json.dumps(data))
        except ConfigError:
            continue
        with pytest.raises(RunError):
            signing.verify_report_signature(edited)
        num_changed += 1
    assert num_changed > 300


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_edited_report_is_rejected_or_equal(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 8)))
    edited = text[:start] + data.draw(st.text(max_size=3)) + text[end:]
    try:
        parsed = signing.parse_report(edited.encode())
        signing.verify_report_signature(parsed)
    except FedtuneError:
        return
    assert replace(parsed, signature=None) == replace(signing.parse_report(text.encode()), signature=None)


def test_report_accepts_only_its_canonical_spelling(a_report: Make) -> None:
    text = signing.report_to_json(a_report())
    assert signing.parse_report(text.replace("\n", "\r\n").encode()) == a_report()  # as a checkout on Windows has it
    fields = json.loads(text)
    for edited in (json.dumps(fields), json.dumps(fields, indent=1, sort_keys=True), f"{text} "):
        with pytest.raises(ConfigError, match="differs from fedtune's output"):
            signing.parse_report(edited.encode())
    with pytest.raises(ConfigError, match=r"line \d+.*1\.0e-05.*which has: \"delta\": 1e-05"):
        signing.parse_report(text.replace('"delta": 1e-05', '"delta": 1.0e-05', 1).encode())


def test_invalid_reports_are_refused(a_report: Make) -> None:
    text = signing.report_to_json(a_report())
    edits = tomllib.loads(Path(__file__).with_name("invalid_reports.toml").read_text())
    for before, after in (
        *((before, after) for before, replacements in edits.items() for after in replacements),
        (f'"schema_version": {REPORT_SCHEMA}', f'"schema_version": {REPORT_SCHEMA - 1}'),
        ("{", '{"a": ' * 100_000),
    ):
        assert before in text
        with pytest.raises(ConfigError):
            signing.parse_report(text.replace(before, after, 1).encode())
    for data in (b"", b"\xff\xfe\x00", b"null", b"[]", b"{}", b"1" * 5000):
        with pytest.raises(ConfigError):
            signing.parse_report(data)
