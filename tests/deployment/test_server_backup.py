"""A server is backed up while a round is on; its database is put back, and the run ends as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .books import check_books
from .federation import LEAD, Federation, settings
from .networks import best_network
from .processes import RUN_S

pytestmark = pytest.mark.nightly

NAMES = ("north", "south")


def test_a_server_is_put_back_from_a_backup_that_was_made_within_a_round(
    make_federation: Callable[..., Federation],
) -> None:
    federation = make_federation(names=NAMES, network=best_network([LEAD, *NAMES]))
    federation.start(held=True)
    north = federation.sites["north"]
    north.hold(True)
    lead = federation.lead("first", *settings("federation.num_rounds=2"))
    north.wait_for("first", "reserve", round=1, lead=lead)
    kit, file = federation.home / "server", federation.folder / "server.zip"
    federation.do("server", "backup", str(file), "--kit", str(kit))
    # The backup knows of the question alone; the answer is lost with the database.
    north.hold(False)
    north.wait_for("first", "commit", round=1)
    assert federation.server is not None
    federation.server.kill()
    lost = list(kit.glob("server.db*"))
    assert lost
    for path in lost:
        path.unlink()
    federation.do("server", "restore", str(file), "--kit", str(kit))
    assert (kit / "server.db").is_file()
    federation.start_server()
    assert lead.end(seconds=RUN_S) == 0, lead.text
    check_books(federation, "first")
    assert [one["sites"] for one in federation.result("first")["rounds"]] == [list(NAMES)] * 2
    charged = {name: about["rounds"] for name, about in federation.result("first")["privacy"]["sites"].items()}
    assert charged == dict.fromkeys(NAMES, 2), "nothing was trained or charged twice"
