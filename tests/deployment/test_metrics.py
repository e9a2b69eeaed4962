"""What server, sites and lead tell Prometheus while a run goes on, read as its client reads it."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ..flower.loopback import free_port
from ..processes import FEDTUNE, RUN_S, environment, wait_for
from .federation import LEAD, Federation, settings
from .networks import SERVER

pytestmark = pytest.mark.nightly

_READ = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=30).read().decode())"


def test_figures_follow_a_run(make_federation: Callable[..., Federation]) -> None:
    ports = {member: f"127.0.0.1:{free_port()}" for member in (SERVER, LEAD, "north", "south")}
    federation = make_federation(names=("north", "south"))
    for name, site in federation.sites.items():
        site.start("--metrics", ports[name], held=True, wait=False)
    federation.start_server("--metrics", ports[SERVER])
    for site in federation.sites.values():
        site.wait_until_up()

    def scrape(member: str) -> dict[tuple[str, str], float]:
        """(name, value of the label) -> value, read at the member itself."""
        command = federation.network.inside(member, [sys.executable, "-c", _READ, f"http://{ports[member]}/metrics"])
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=True)
        families = text_string_to_metric_families(done.stdout)
        return {
            (sample.name, "".join(sample.labels.values())): sample.value
            for family in families
            for sample in family.samples
        }

    def value(member: str, name: str, label: str = "") -> float:
        return scrape(member)[f"fedtune_{name}", label]

    held = federation.sites["north"]
    held.hold(True)
    run = ["name=watched", "federation.num_rounds=2", f"tracking.output_dir='{federation.folder / 'runs'}'"]
    words = ["run", "--kit", str(federation.lead_kit), "--metrics", ports[LEAD], *settings(*run)]
    lead = federation.run("lead", LEAD, [*FEDTUNE, *words])
    held.wait_for("watched", "reserve", round=1, lead=lead)
    wait_for(lambda: value(LEAD, "lead_sites_answered") == 1, seconds=RUN_S, what="south's update", needs=lead)
    server = scrape(SERVER)
    assert server["fedtune_server_sites", "known"] == server["fedtune_server_sites", "connected"] == 2
    assert server["fedtune_server_bytes_total", "received"] > 10_000
    assert server["fedtune_server_bytes_total", "sent"] > 10_000
    assert {server["fedtune_server_site_silent_seconds", name] < 60 for name in federation.sites} == {True}
    # A round that is being trained is charged already, and shows in nothing else.
    site = scrape("north")
    assert site["fedtune_site_answers_total", "update"] == 0
    assert site["fedtune_site_contact_age_seconds", ""] < 60
    charged = held.verified().history.epsilon()
    assert site["fedtune_site_epsilon_spent", "charged"] == pytest.approx(charged)
    assert charged > 0
    about = {"finished": value(LEAD, "lead_rounds", "finished"), "planned": value(LEAD, "lead_rounds", "planned")}
    assert about == {"finished": 0, "planned": 2}
    held.hold(False)
    wait_for(
        lambda: lead.code is not None or scrape(LEAD)["fedtune_lead_rounds", "finished"] == 1,
        seconds=RUN_S,
        what="a round to end",
    )
    assert lead.end() == 0, lead.text
    wait_for(lambda: value("north", "site_answers_total", "update") == 2, seconds=RUN_S, what="north's second answer")
    assert value("south", "site_answers_total", "update") == 2
    for member in (SERVER, "north", "south"):
        assert 300 < value(member, "certificate_days_left") <= 365
    held.up.stop()
    wait_for(lambda: value(SERVER, "server_sites", "connected") == 1, seconds=60, what="north to be gone")
