"""The metrics endpoint: paths, addresses, and the metrics of each process."""

import json
import math
import re
import sys
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from fedtune.ops import metrics
from fedtune.ops.health import Health, send_probe
from fedtune.ops.kits.kit_file import Kit
from fedtune.ops.metrics import FIGURES, LeadMetrics, ServerMetrics, SiteMetrics, Values, serve_metrics
from fedtune.ops.wire.gate import Traffic
from fedtune.privacy.ledger.site_ledger import Reservation
from fedtune.privacy.release import Reason, Refused
from fedtune.privacy.site_files import SiteFiles
from fedtune.spec import ConfigError

from ..processes import wait_for
from .deployment_files import find_tool, run, run_tool

MONITORING = Path(__file__).parents[2] / "deployment/monitoring"
(GROUP,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]


def scrape_figures(figures: Callable[[], Values]) -> list[Sample]:
    """Scrape all samples over a real connection with the client's own parser."""
    with (
        serve_metrics("127.0.0.1:0", figures) as address,
        urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def list_values(samples: list[Sample], name: str) -> dict[str, float]:
    """Return the values of one metric by label."""
    values = {"".join(sample.labels.values()): sample.value for sample in samples if sample.name == name}
    assert values, f"no {name}"
    return values


def test_metrics_server_answers_only_get_on_one_path() -> None:
    answers = [("fedtune_lead_answers", {"x": 2, 'y"\n': 3})]
    assert list_values(scrape_figures(lambda: answers), "fedtune_lead_answers_total") == {"x": 2.0, 'y"\n': 3.0}
    with serve_metrics("127.0.0.1:0", lambda: answers) as address:
        assert send_probe(address, "/")[0] == 404
        posted = urllib.request.Request(f"http://{address}/metrics", data=b"{}")
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(posted, timeout=30)


def test_metrics_require_a_loopback_address_and_prometheus_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("0.0.0.0:0", "192.0.2.1:9464"):
        with pytest.raises(ConfigError, match=r"^--metrics = .*use a loopback address"), serve_metrics(address, list):
            pass
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with (
        pytest.raises(ConfigError, match="requires prometheus-client: pip install "),
        serve_metrics("127.0.0.1:0", list),
    ):
        pass


def make_site_metrics(folder: Path, health: Health | None = None) -> SiteMetrics:
    kit = Kit.read(folder / "kit", kind="site")
    return SiteMetrics(kit=kit, site_toml=folder / "site.toml", health=health or Health())


def test_metrics_file_is_replaced_atomically_and_repeatedly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_FILE_S", 0.02)
    file, rounds = tmp_path / "fedtune.prom", iter(range(10_000))
    figures: Callable[[], Values] = lambda: [("fedtune_lead_round_seconds", float(next(rounds)))]  # noqa: E731
    (target := tmp_path.parent / "key.pem").write_text("kept")
    (tmp_path / "fedtune.prom.new").symlink_to(target)
    file.symlink_to(target)
    with serve_metrics(str(file), figures) as served:
        assert served == str(file)
        assert file.stat().st_mode & 0o777 == 0o644
        wait_for(lambda: float(file.read_text().split()[-1]) >= 2, what="the third writing")
    assert [path.name for path in tmp_path.iterdir()] == ["fedtune.prom.new"]
    assert target.read_text() == "kept", "a planted link must not be followed"
    with pytest.raises(ConfigError, match="must be a file that can be written"), serve_metrics("/x/y.prom", figures):
        pass


def test_site_budget_metrics_match_the_ledger(north_folder: Path, run_proposal: Any, command: Any) -> None:
    metrics = make_site_metrics(north_folder)
    assert list_values(scrape_figures(metrics.collect_values), "fedtune_site_ledger_usable") == {"": 0.0}, (
        "there is no ledger yet"
    )
    ledger, proposal = SiteFiles.from_site_toml(north_folder / "site.toml").open_ledger(create=True), run_proposal()
    assert list_values(scrape_figures(metrics.collect_values), "fedtune_site_epsilon_spent") == {
        "charged": 0.0,
        "with_reserved": 0.0,
    }
    assert isinstance(ledger.reserve(proposal, round=1, request="1"), Reservation)
    samples, told_metrics = (
        scrape_figures(metrics.collect_values),
        json.loads(command("ledger", "spent", str(north_folder), "--json").out),
    )
    spent = {"charged": told_metrics["epsilon"], "with_reserved": told_metrics["with_reserved"]}
    assert list_values(samples, "fedtune_site_epsilon_spent") == pytest.approx(spent)
    assert 0 < spent["charged"] < spent["with_reserved"]
    assert list_values(samples, "fedtune_site_epsilon_cap") == {"": told_metrics["max_epsilon"]}
    (remaining,), (runs,) = (
        list_values(samples, f"fedtune_site_{name}").values() for name in ("epsilon_remaining", "remaining_runs")
    )
    assert (remaining, runs) == (told_metrics["remaining_epsilon"], told_metrics["reference_remaining_runs"])
    assert 1 <= runs < math.inf
    assert list_values(samples, "fedtune_site_ledger_usable") == {"": 1.0}


def test_exhausted_ledger_reports_zero_runs_and_damaged_ledger_no_budget(north_folder: Path, run_proposal: Any) -> None:
    metrics, ledger = (
        make_site_metrics(north_folder),
        SiteFiles.from_site_toml(north_folder / "site.toml").open_ledger(create=True),
    )
    with pytest.raises(Refused) as refused:
        _ = [ledger.reserve(run_proposal(run=f"r{number}"), round=1, request="1") for number in range(100)]
    assert refused.value.reason is Reason.MAX_EPSILON
    samples = scrape_figures(metrics.collect_values)
    assert list_values(samples, "fedtune_site_remaining_runs") == {"": 0.0}
    assert list_values(samples, "fedtune_site_epsilon_remaining")[""] > 0
    ledger.freeze("consent withdrawn")
    assert list_values(scrape_figures(metrics.collect_values), "fedtune_site_ledger_usable") == {"": 0.0}
    data = bytearray((north_folder / "ledger.db").read_bytes())
    position = data.index(b"consent withdrawn")
    data[position : position + 7] = b"CONSENT"
    (north_folder / "ledger.db").write_bytes(data)
    samples = scrape_figures(metrics.collect_values)
    assert list_values(samples, "fedtune_site_ledger_usable") == {"": 0.0}
    assert not [sample for sample in samples if "epsilon" in sample.name or "runs" in sample.name]


def test_site_metrics_cover_contact_answers_and_certificate(north_folder: Path) -> None:
    health = Health()
    metrics = make_site_metrics(north_folder, health)
    # Counters must start at 0: a value that first appears as 1 does not count as an increase.
    assert list_values(scrape_figures(metrics.collect_values), "fedtune_site_answers_total") == {
        "update": 0.0,
        "site_error": 0.0,
    }
    for answer in ("update", "paused", "paused"):
        metrics.record_answer(answer)
    samples = scrape_figures(metrics.collect_values)
    assert list_values(samples, "fedtune_site_answers_total") == {"update": 1.0, "paused": 2.0, "site_error": 0.0}
    assert 0 <= list_values(samples, "fedtune_site_contact_age_seconds")[""] < 60
    assert 360 <= list_values(samples, "fedtune_certificate_days_left")[""] <= 365
    health.update(last_contact=datetime(2026, 1, 1, tzinfo=UTC))
    age_s = (datetime.now(UTC) - datetime(2026, 1, 1, tzinfo=UTC)).total_seconds()
    assert list_values(scrape_figures(metrics.collect_values), "fedtune_site_contact_age_seconds")[""] == pytest.approx(
        age_s, abs=60
    )


def make_server_metrics(federation: Path) -> ServerMetrics:
    """Create the metrics of a server with two sites, one of which has called, and a revoked third."""
    metrics = ServerMetrics(kit=Kit.read(federation / "server", kind="server"))
    assert [name for name, _ in metrics.collect_values()] == ["fedtune_certificate_days_left"]
    metrics.members = [
        SimpleNamespace(site=name, node_key=name.encode(), revoked=name == "west")
        for name in ("north", "south", "west")
    ]
    metrics.traffic = traffic = Traffic()
    traffic.began -= 1000
    traffic.heard.update(north=traffic.began + 990, west=traffic.began)
    traffic.connections.update([b"north", b"west", b"stranger"])
    traffic.received, traffic.sent, traffic.waiting = 5, 7, 1
    return metrics


def test_server_metrics_cover_sites_traffic_and_waiting_calls(federation: Path) -> None:
    samples = scrape_figures(make_server_metrics(federation).collect_values)
    assert list_values(samples, "fedtune_server_sites") == {"known": 2.0, "connected": 1.0}
    silent = list_values(samples, "fedtune_server_site_silent_seconds")
    assert silent == {"north": pytest.approx(10, abs=9), "south": pytest.approx(1000, abs=9)}
    assert list_values(samples, "fedtune_server_bytes_total") == {"received": 5.0, "sent": 7.0}
    assert list_values(samples, "fedtune_server_waiting_calls") == {"": 1.0}


# The files in deployment/monitoring.


def list_metrics(expression: str) -> set[str]:
    """List the metrics in a PromQL expression; promtool validates the expression."""
    return set(re.findall(r"\bfedtune_\w+", expression))


def test_alert_rules_and_dashboard_use_existing_metrics(north_folder: Path, federation: Path) -> None:
    SiteFiles.from_site_toml(north_folder / "site.toml").open_ledger(create=True)
    lead = LeadMetrics(kit=Kit.read(federation / "lead", kind="lead"))
    figures = (
        make_site_metrics(north_folder).collect_values,
        make_server_metrics(federation).collect_values,
        lead.collect_values,
    )
    assert {name for process in figures for name, _ in process()} == set(FIGURES), "together they must be complete"
    known, used = {f"{name}_total" if figure.grows else name for name, figure in FIGURES.items()}, set[str]()
    for rule in GROUP["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        used |= list_metrics(rule["expr"])
    assert used < known
    needed = {"remaining_runs", "contact_age_seconds", "ledger_usable"}
    assert {f"fedtune_site_{name}" for name in needed} < used
    assert {"fedtune_certificate_days_left", "fedtune_server_site_silent_seconds"} < used
    board = json.loads((MONITORING / "grafana_dashboard.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert {name for panel in panels for target in panel["targets"] for name in list_metrics(target["expr"])} == known
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_alerts_fire_only_when_expected_and_pass_promtool(tmp_path: Path) -> None:
    file = Path(__file__).with_name("alerts_test.yaml")
    alerts = [rule_test for case in yaml.safe_load(file.read_text())["tests"] for rule_test in case["alert_rule_test"]]
    expected = sorted((rule["alert"], fires) for rule in GROUP["rules"] for fires in (False, True))
    assert sorted((rule_test["alertname"], bool(rule_test["exp_alerts"])) for rule_test in alerts) == expected
    promtool = find_tool("promtool")
    run_tool(promtool, "test", "rules", file)
    for kind, name in (("rules", "alerts.yaml"), ("config", "prometheus.yaml")):
        run_tool(promtool, "check", kind, MONITORING / name)
    broken = tmp_path / "alerts.yaml"
    broken.write_text((MONITORING / "alerts.yaml").read_text().replace("expr: up", "expr: up{", 1))
    assert run(promtool, "check", "rules", broken).returncode != 0


def test_operations_page_explains_every_alert() -> None:
    page = (MONITORING.parents[1] / "docs/operations.md").read_text()
    (table,) = re.findall(r"^\| alert \| what to do \|\n\|.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [re.fullmatch(r"\| (.*?) \| (.+) \|", line) for line in table.splitlines()]
    alerts = [name for row in rows if row for name in re.findall(r"`(\w+)`", row[1])]
    assert sorted(alerts) == sorted(rule["alert"] for rule in GROUP["rules"])
    assert len(rows) == len([row for row in rows if row])
