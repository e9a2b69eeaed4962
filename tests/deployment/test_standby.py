"""A second machine takes the server's address over: what goes on, and what is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from .books import check_books
from .federation import LEAD, Federation, dealt, settings
from .networks import Namespaces
from .processes import FEDTUNE, RUN_S

pytestmark = pytest.mark.nightly

NAMES, STANDBY = ("north", "south"), "standby"


@pytest.mark.usefixtures("own_networks")  # on loopback the address would stay where it was
def test_a_standby_takes_over_within_a_round(make_federation: Callable[..., Federation]) -> None:
    """It has a copy of the kit that is older than the last roster, and no database at all."""
    federation = make_federation(names=NAMES, network=Namespaces([LEAD, *NAMES, STANDBY]))
    gone = federation.join("gone", dealt(NAMES)["north"][:20])
    kit, data = federation.folder / STANDBY, federation.folder / "data of the standby"
    shutil.copytree(federation.home / "server", kit)
    data.mkdir()
    federation.do("provision", "revoke-site", gone.name, "--federation", str(federation.home))
    federation.start(*NAMES, held=True)

    north = federation.sites["north"]
    north.hold(True)
    lead = federation.lead("first", *settings("federation.num_rounds=2"))
    north.wait_for("first", "reserve", round=1, lead=lead)
    assert federation.server is not None
    federation.server.kill()
    federation.network.hand_over(STANDBY)
    words = [*FEDTUNE, "server", "start", "--kit", str(kit), "--data", str(data)]
    standby = federation.run(STANDBY, STANDBY, [*words, "--host", federation.network.address])
    standby.wait_for_text("the server listens")
    assert "gone is registered" in standby.text, "it does not know of what its copy of the kit does not say"
    north.hold(False)
    assert lead.end(seconds=RUN_S) == 0, lead.text
    check_books(federation, "first")
    assert [one["sites"] for one in federation.result("first")["rounds"]] == [list(NAMES)] * 2
    charged = {name: about["rounds"] for name, about in federation.result("first")["privacy"]["sites"].items()}
    assert charged == dict.fromkeys(NAMES, 2), "nothing was trained or charged twice"

    # The page's last step brings it the roster that it missed.
    assert "gone was revoked" not in standby.text
    shutil.copy(federation.home / "server/roster.json", kit)
    standby.wait_for_text("gone was revoked")
    again = federation.lead("second", *settings("federation.num_rounds=1", "sites=[north,south]"))
    assert again.end(seconds=RUN_S) == 0, again.text
