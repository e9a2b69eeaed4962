"""A server and a site start as processes of this version in the folders that fedtune 0.1.0 left, and meet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy.site_files import SiteFiles

from ..deploy.test_upgrade import copied
from .networks import free_port
from .processes import FEDTUNE, Process


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A copy at a port that is free."""
    folder = copied(tmp_path / "left")
    port = free_port()
    for path in (*folder.glob("*/kit/kit.toml"), *folder.glob("federation/*/kit.toml")):
        text = path.read_text()
        assert "127.0.0.1:9092" in text
        path.write_text(text.replace("127.0.0.1:9092", f"127.0.0.1:{port}"))
    return folder


@contextmanager
def running(folder: Path, name: str, *words: str) -> Iterator[Process]:
    process = Process(
        name, [*FEDTUNE, *words], log=folder / f"{name}.log", cwd=folder, env={"FLWR_HOME": str(folder / "flower")}
    )
    try:
        yield process
    finally:
        process.stop()


def test_server_and_site_start_where_0_1_0_ended(left: Path, command: Callable[..., Any]) -> None:
    site_toml = left / "north/site.toml"
    files = SiteFiles.of(site_toml)
    before = files.verified()
    assert before is not None
    served = ("server", "start", "--kit", "federation/server", "--host", "127.0.0.1")
    own = ("--kit", str(left / "north/kit"), "--site", str(site_toml))
    for time in ("first", "second"):  # the second time with what this version has written
        with running(left, f"server-{time}", *served) as server:
            server.wait_for_text("the server listens")
            with running(left, f"site-{time}", "site", "start", *own) as site:
                site.wait_for_text("the site is up")
                told = json.loads(command("site", "doctor", *own, "--json").out)["checks"]
                assert {check["name"]: check["status"] for check in told}["authentication"] == "ok"
                site.ask_to_end()
                assert site.end(seconds=60) == 0, site.text
            server.ask_to_end()
            assert server.end(seconds=60) == 0, server.text
        after = files.verified()
        assert after is not None
        assert after.events[: len(before.events)] == before.events
        assert after.history.charged() == before.history.charged(), "to start costs nothing"
