"""Each format has a schema number: a reader refuses any other number and says what to do."""

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedtune.api.compose import compose_run
from fedtune.config import read_saved_config
from fedtune.ops.kits.kit_file import KitFile, read_spec
from fedtune.ops.kits.members import JoinRequest, Roster
from fedtune.privacy.keys import SigningKey
from fedtune.privacy.ledger.chain import Head
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.report import signing
from fedtune.report.from_run import read_run
from fedtune.spec import KIT_SCHEMA, LEDGER_SCHEMA, REPORT_SCHEMA, RUN_SCHEMA, ConfigError
from fedtune.tasks.saved import load_task_model

from .conftest import make_site_policy, write_config

GO_ON = "use the version of fedtune that wrote the ledger; its charges stay in force"
A_REPORT = Path(__file__).parent / "report" / "reports" / "run.json"


def list_wrong_numbers(number: int) -> list[object]:
    return [number - 1, number + 1, 0, None, str(number), True]


def build_refusal_pattern(key: str, number: int, *, of: str) -> str:
    bound = f"must be {number}: another version of fedtune wrote this {of}; read it with that version"
    return f"{re.escape(key)}( = -?\\d+)?: {re.escape(bound)}$"


def test_ledger_or_anchor_with_another_schema_is_refused(tmp_path: Path) -> None:
    path, anchor, key = (
        tmp_path / "ledger.db",
        tmp_path / "anchor.json",
        SigningKey.load_or_create(tmp_path / "key.pem"),
    )
    fields = json.loads(SiteLedger(path, make_site_policy("north"), key, create=True).head().to_bytes())
    for number in list_wrong_numbers(LEDGER_SCHEMA):
        anchor.write_text(json.dumps({"other": 1, **fields, "schema": number}))
        with pytest.raises(ConfigError, match=f"must be {LEDGER_SCHEMA}: {GO_ON}$"):
            Head.read(anchor)
    for number in (0, LEDGER_SCHEMA - 1, LEDGER_SCHEMA + 1):
        with sqlite3.connect(path) as file:
            file.execute(f"PRAGMA user_version = {number}")
        file.close()
        before = path.read_bytes()
        for opened in (lambda: verify(path), lambda: SiteLedger(path, make_site_policy("north"), key, create=True)):
            with pytest.raises(ConfigError) as caught:
                opened()
            assert str(caught.value) == f"{path}: schema = {number}: must be {LEDGER_SCHEMA}: {GO_ON}"
        assert path.read_bytes() == before


def test_report_with_another_schema_is_refused() -> None:
    fields = json.loads(A_REPORT.read_text())
    for number in list_wrong_numbers(REPORT_SCHEMA):
        changed = {**fields, "schema_version": number, "verdict": None}  # other versions may have other fields
        with pytest.raises(ConfigError, match=build_refusal_pattern("schema_version", REPORT_SCHEMA, of="report")):
            signing.parse_report(json.dumps(changed).encode())


def test_run_folder_with_another_schema_is_refused(tmp_path: Path) -> None:
    write_config(compose_run(["experiment=debug"]), tmp_path)
    config, text = tmp_path / "config.yaml", (tmp_path / "config.yaml").read_text()
    for number in list_wrong_numbers(RUN_SCHEMA):
        config.write_text(text.replace(f"schema_version: {RUN_SCHEMA}", f"schema_version: {json.dumps(number)}"))
        for read in (read_saved_config, read_run):
            with pytest.raises(
                ConfigError, match=build_refusal_pattern(f"{config}: schema_version", RUN_SCHEMA, of="run folder")
            ):
                read(tmp_path)
        config.write_text(text)
        read: Any
        for name, of, read in (("run.json", "run folder", read_run), ("fedtune.json", "adapter", load_task_model)):
            (tmp_path / name).write_text(json.dumps({"schema_version": number}))
            with pytest.raises(
                ConfigError, match=build_refusal_pattern(f"{tmp_path / name}: schema_version", RUN_SCHEMA, of=of)
            ):
                read(tmp_path)
            (tmp_path / name).unlink()


def test_kit_with_another_schema_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "kit.toml"
    for number in (KIT_SCHEMA - 1, KIT_SCHEMA + 1, 0):
        file.write_text(f"version = {number}\nother = 1\n")
        with pytest.raises(ConfigError, match=build_refusal_pattern(f"{file}: version", KIT_SCHEMA, of="file")):
            read_spec(KitFile, file)
    for read in (Roster.read, JoinRequest.read):
        for number in list_wrong_numbers(KIT_SCHEMA):
            file.write_text(json.dumps({"version": number, "other": 1}))
            with pytest.raises(ConfigError, match=build_refusal_pattern(f"{file}: version", KIT_SCHEMA, of="file")):
                read(file)
