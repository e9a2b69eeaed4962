"""Files that people exchange, edit or find damaged: policies, kits, rosters, ledgers, run folders, reports, data."""

import gzip
import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pyarrow
import yaml
from hypothesis import strategies as st

from fedtune.config import read_saved_config
from fedtune.data.records import iter_records, iter_usable_records
from fedtune.federation.lead import Checkpoints, read_receipts
from fedtune.model.manifest import build_manifest
from fedtune.model.unsupported_models import check_content
from fedtune.ops.kits import provisioning
from fedtune.ops.kits.federation_folder import FederationFile, FederationFolder
from fedtune.ops.kits.kit_file import KitFile, read_spec
from fedtune.ops.kits.members import Roster
from fedtune.ops.services.lead_and_server import read_latest_answers
from fedtune.ops.services.site_state import SiteState
from fedtune.privacy.ledger import store
from fedtune.privacy.ledger.chain import EVENT, START, Event, Head, to_canonical_json
from fedtune.privacy.ledger.site_ledger import SiteLedger
from fedtune.privacy.ledger.verify import verify
from fedtune.privacy.policy_file import read_policy
from fedtune.report import from_ledger, from_run, signing
from fedtune.report.checks import TrustedValues, check_report
from fedtune.report.from_run import read_run
from fedtune.sites.virtual_site import DEALT, read_partition_settings
from fedtune.spec import KIT_SCHEMA, ConfigError, DataError, FedtuneError, RunError
from fedtune.tasks.saved import load_task_model

from ..data.conftest import encode_parquet
from . import seeds
from .mutations import mutate_bytes, mutate_bytes_like, mutate_json, mutate_json_like, mutate_toml_like
from .target import Target
from .wire_targets import join_request

COLUMNS = {"text": "body", "label": "kind"}
_SAVED, _ARROW = Path(__file__).parents[1] / "data" / "fixtures" / "saved_set", "data-00000-of-00001.arrow"
_OURS, _OF_ALL = (ConfigError, RunError), (FedtuneError,)


def _build_manifest(index: Path) -> object:
    """Build the manifest of a folder that contains this index of shards."""
    with TemporaryDirectory() as scratch:
        for name in ("config.json", "a.safetensors", "b.safetensors"):
            Path(scratch, name).write_text("{}")
        shutil.copy(index, scratch)
        return build_manifest(Path(scratch))


def _parse_as_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Parse bytes as the content of a separate file."""

    def parse(data: bytes) -> object:
        path = seeds.make_folder() / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return read(path)

    return parse


def _parse_in_copy(name: str, read: Callable[[Path], object], of: Callable[[], Path]) -> Callable[[bytes], object]:
    """Parse bytes as one file of a copy of a folder."""

    def parse(data: bytes) -> object:
        folder = seeds.make_folder() / f"with other {Path(name).name}"
        if not folder.exists():
            shutil.copytree(of(), folder)
        (folder / name).write_bytes(data)
        return read(folder)

    return parse


_in_run = partial(_parse_in_copy, of=seeds.run_folder)


def _parse_as_spec(name: str, kind: type[Any]) -> Callable[[bytes], object]:
    return _parse_as_file(name, partial(read_spec, kind))


def _feed_adapter_file(name: str) -> Callable[[bytes], object]:
    return _in_run(f"adapter/{name}", lambda folder: load_task_model(folder / "adapter"))


def _read_run_file(name: str) -> bytes:
    return (seeds.run_folder() / name).read_bytes()


def _read_ledger(path: Path) -> None:
    """Read a ledger as its owner does, who opens it for training, and as others do, who verify it."""
    problems = []
    for read in (
        lambda: verify(path).history.count_total_charges(),
        lambda: SiteLedger(path, seeds.make_policy(), seeds.key(2), create=True).history.epsilon(),
    ):
        try:
            read()
        except RunError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def _list_valid_events() -> Any:
    """List the events of the valid ledger as plain data."""
    seeds.make_ledger()
    events = verify(seeds.make_folder() / "seed" / "ledger.db").events
    return json.loads(json.dumps([asdict(event) for event in events]))


def _resign_body(data: bytes) -> None:
    """Make a ledger into which its owner wrote and signed arbitrary content: verification must not crash."""
    rows, before = list[list[object]](), START
    try:
        for fields in json.loads(data):
            event = Event(**{**fields, "hash": "", "signature": ""})
            before = event.compute_hash_after(before)
            values = {**asdict(event), "detail": to_canonical_json(event.detail).decode(), "hash": before}
            values["signature"] = seeds.key(2).sign(EVENT, before.encode())
            rows.append([*values.values()])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # the file cannot contain this value
    path = seeds.make_folder() / "signed_anew.db"
    path.unlink(missing_ok=True)
    file = sqlite3.connect(path, isolation_level=None)
    try:
        file.execute("PRAGMA synchronous = OFF")
        file.execute("PRAGMA application_id = 0x66656474")
        for statement in store.SCHEMA:
            file.execute(statement)
        for row in rows:
            file.execute(f"INSERT INTO events VALUES ({', '.join('?' * len(row))})", row)
        with store.open_for_reading(seeds.make_folder() / "seed" / "ledger.db") as valid:
            file.executemany("INSERT INTO replies VALUES (?, ?, ?, x'')", store.read_replies(valid))
    except (sqlite3.Error, OverflowError, UnicodeEncodeError):
        return
    finally:
        file.close()
    verify(path)
    from_ledger.build_ledger_report(path)


def _parse_report(data: bytes) -> None:
    report = signing.parse_report(data)
    check_report(Path("nowhere", "report.json"), report, TrustedValues())


def _read_checkpoint(folder: Path) -> object:
    return Checkpoints(folder / "checkpoints", json.loads(_read_run_file("run.json"))["config_sha256"]).load()


def _find_newest_checkpoint() -> str:
    return f"checkpoints/{max((seeds.run_folder() / 'checkpoints').glob('round-*')).name}"


def _read_both_ways(path: Path, columns: Mapping[str, str]) -> object:
    return list(iter_usable_records(path, columns)), list(iter_records(path, columns))


def _parse_rows(name: str, columns: Mapping[str, str] = COLUMNS) -> Callable[[bytes], object]:
    return _parse_as_file(name, partial(_read_both_ways, columns=columns))


def _parse_in_saved_set(name: str) -> Callable[[bytes], object]:
    """Parse bytes as one file of a folder that Hugging Face datasets saved."""
    return _parse_in_copy(
        name, partial(_read_both_ways, columns={role: role for role in ("text", "label", "messages")}), lambda: _SAVED
    )


def _show_waiting(data: bytes) -> object:
    """List the pending runs as shown to the person who approves them."""
    state = SiteState(seeds.make_folder() / "state")
    (state.folder / "pending").mkdir(parents=True, exist_ok=True)
    (state.folder / "pending" / "run.json").write_bytes(data)
    return state.list_pending_runs()


def _make_pending_seed() -> dict[str, object]:
    proposal = json.loads(json.dumps(seeds.request().proposal.to_json()))
    return {"proposal": proposal, "settings": seeds.list_decisive_settings(), "since": "2026-11-20T10:00:00+00:00"}


def _read_retired_keys(path: Path) -> object:
    return FederationFolder(folder=path.parent, settings=cast(Any, None), lead_key="").read_retired_keys()


def _make_roster_seed() -> Any:
    home, now = seeds.make_folder() / "clinics", datetime.now(UTC)
    if not home.exists():
        (seeds.make_folder() / "federation.toml").write_text(_FEDERATION)
        provisioning.init_federation(seeds.make_folder() / "federation.toml", out=home, now=now)
        provisioning.check_join_request(home, request=join_request(), days=None, now=now)[1]()
    return json.loads((home / "server" / "roster.json").read_bytes())


def _make_kit_seed() -> str:
    kit = KitFile(
        version=KIT_SCHEMA, kind="site", federation="clinics", server="a.b:1", lead=seeds.key(1).public, site="north"
    )
    return kit.to_toml() + '\n[[model]]\nname = "m"\nsha256 = "' + "ab" * 32 + '"\nlicense = "MIT"\n'


_SEEDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("file_seeds.yaml").read_text())
_OF_A_MODEL, _SHARDS, _CHATS, _BIOC, _ANSWERS, _DEALT_OUT, _FEDERATION = _SEEDS.values()
_JSONL = b'{"body": "a letter", "kind": "praise"}\n{"body": "another", "kind": 3, "x": [1, {"y": null}]}\n\n'
_ARRAY = b"[" + b",\n".join(_JSONL.splitlines()) + b"]"
_CSV = b'body,kind,x\r\n"a ""letter""\r\nof two lines",praise,1\r\nanother,3,\r\n'
_RETIRED = {"version": KIT_SCHEMA, "fingerprints": ["ab" * 32]}
_TABLE = pyarrow.table({"body": ["good morning", "good night"] * 9, "kind": ["a", "b"] * 9})
_RECEIPTS = {
    "north": json.loads(json.dumps({k: getattr(seeds.make_receipt(), k) for k in seeds.make_receipt().__slots__}))
}


def _feed_yaml(valid: Callable[[], bytes]) -> Callable[[], st.SearchStrategy[bytes]]:
    """Yield mutated JSON as YAML, except for numbers that only one of the formats has."""
    return lambda: mutate_json(yaml.safe_load(valid())) | mutate_bytes(valid()) | st.binary(max_size=64)


def _feed_run_file(name: str) -> Callable[[], Any]:
    return lambda: json.loads(_read_run_file(name))


def _feed_json(
    name: str, valid: Any, parse: Callable[[bytes], object], errors: Any = _OURS, *, cost: int = 1
) -> Target:
    """Yield mutated JSON; `valid` is such JSON, or a function that makes it."""
    return Target(name, mutate_json_like(valid if callable(valid) else lambda: valid), parse, errors, cost)


def _feed_bytes(name: str, valid: Any, parse: Callable[[bytes], object], errors: Any = _OURS) -> Target:
    return Target(name, mutate_bytes_like(valid if callable(valid) else lambda: valid), parse, errors)


TARGETS = (
    Target("policy", mutate_toml_like(seeds.read_policy_toml), _parse_as_file("site.toml", read_policy), _OURS),
    Target(
        "federation.toml",
        mutate_toml_like(lambda: _FEDERATION),
        _parse_as_spec("federation.toml", FederationFile),
        _OURS,
    ),
    Target("kit.toml", mutate_toml_like(_make_kit_seed), _parse_as_spec("kit.toml", KitFile), _OURS),
    _feed_json("roster", _make_roster_seed, _parse_as_file("roster.json", Roster.read)),
    _feed_json("receipts.json", _RECEIPTS, _parse_as_file("receipts.json", read_receipts)),
    _feed_json("a run that waits for approval", _make_pending_seed, _show_waiting),
    _feed_json("answers.json", _ANSWERS, _parse_as_file("answers.json", lambda path: read_latest_answers(path.parent))),
    _feed_json(
        "how records were dealt out",
        _DEALT_OUT,
        _parse_as_file(DEALT, partial(read_partition_settings, keys=tuple(_DEALT_OUT))),
    ),
    _feed_json("anchor", seeds.anchor, _parse_as_file("ledger.anchor", Head.read)),
    _feed_bytes("ledger", seeds.make_ledger, _parse_as_file("ledger.db", _read_ledger)),
    Target("ledger signed anew", lambda: mutate_json(_list_valid_events()), _resign_body, _OURS),
    _feed_json("run.json", _feed_run_file("run.json"), _in_run("run.json", from_run.build_run_report), cost=5),
    _feed_json("environment.json", _feed_run_file("environment.json"), _in_run("environment.json", read_run), cost=5),
    *(
        Target(name, _feed_yaml(lambda: _read_run_file("config.yaml")), _in_run("config.yaml", read), _OURS, cost=5)
        for name, read in (("config.yaml", read_run), ("config.yaml of a resumed run", read_saved_config))
    ),
    _feed_json("retired keys", _RETIRED, _parse_as_file("retired_keys.json", _read_retired_keys)),
    _feed_bytes(
        "checkpoint",
        lambda: _read_run_file(_find_newest_checkpoint()),
        lambda data: _in_run(_find_newest_checkpoint(), _read_checkpoint)(data),
    ),
    _feed_bytes(
        "asked.jsonl",
        partial(_read_run_file, "checkpoints/asked.jsonl"),
        _in_run("checkpoints/asked.jsonl", _read_checkpoint),
    ),
    _feed_json("report.json", _feed_run_file("report.json"), _parse_report),
    _feed_json(
        "saved adapter's settings", _feed_run_file("adapter/fedtune.json"), _feed_adapter_file("fedtune.json"), _OF_ALL
    ),
    _feed_bytes(
        "saved adapter's head",
        partial(_read_run_file, "adapter/head.safetensors"),
        _feed_adapter_file("head.safetensors"),
        _OF_ALL,
    ),
    *(
        _feed_json(f"a model's {name}", fields, partial(check_content, name, folder="model"), (ConfigError,))
        for name, fields in _OF_A_MODEL.items()
    ),
    _feed_json(
        "a model's index of shards",
        _SHARDS,
        _parse_as_file("model.safetensors.index.json", _build_manifest),
        (ConfigError,),
    ),
    _feed_json("a line of data.jsonl", json.loads(_JSONL.splitlines()[1]), _parse_rows("data.jsonl"), (DataError,)),
    *(
        _feed_bytes(f"data.{kind}", data, _parse_rows(f"data.{kind}"), (DataError,))
        for kind, data in {
            "jsonl": _JSONL,
            "jsonl.gz": gzip.compress(_JSONL, mtime=0),
            "json": _ARRAY,
            "csv": _CSV,
            "tsv": _CSV.replace(b",", b"\t"),
            "parquet": encode_parquet(_TABLE),
        }.items()
    ),
    *(
        _feed_bytes(f"data.{kind}", data, _parse_rows(f"data.{kind}", columns), (DataError,))
        for kind, data, columns in (
            ("conll", b"# a\nmy B-drug\ncard O\n\n\xc2\xa0\n\nlost\tO\n", {"tokens": "tokens", "tags": "tags"}),
            ("pubtator", b"1|t|my card\n1|a|lost\n1\t0\t2\tmy\tdrug\n\n2|t|x\n", {"text": "text", "spans": "spans"}),
            ("bioc", json.dumps(_BIOC).encode(), {"text": "text", "spans": "spans"}),
        )
    ),
    _feed_json("conversations", _CHATS, _parse_rows("chats.json", {"messages": "chat"}), (DataError,)),
    _feed_bytes("a saved set's values", (_SAVED / _ARROW).read_bytes, _parse_in_saved_set(_ARROW), (DataError,)),
    _feed_json(
        "a saved set's state.json",
        json.loads((_SAVED / "state.json").read_bytes()),
        _parse_in_saved_set("state.json"),
        (DataError,),
    ),
)
