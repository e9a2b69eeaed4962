"""The live page's server, spoken to over loopback: who gets in, what it answers, and that it only reads."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.report.watch_page import WatchedFolder
from fedtune.spec import ConfigError

from .watched import MadeRun, Served, contents, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = MadeRun.at(tmp_path_factory.mktemp("runs") / "run", "federation.num_rounds=5").begin()
    run.ask().finish_round({"site-2": "max_epsilon"})
    return run.folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Served]:
    with served(folder) as found:
        yield found


def raw(page: Served, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """What comes of these very bytes, which no client would send."""
    host, port = page.origin.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def asking(page: Served, path: str, *, method: str = "GET", host: str | None = None, more: str = "") -> bytes:
    host = page.origin.removeprefix("http://") if host is None else host
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{more}Connection: close\r\n\r\n".encode("latin-1")


def cookie(page: Served) -> str:
    with page.reader() as client:
        ((name, value),) = client.cookies.items()
    return f"Cookie: {name}={value}\r\n"


# Who gets in.


def test_the_printed_address_gives_a_cookie_and_leads_to_a_clean_one(page: Served) -> None:
    with page.client() as client:
        answer = client.get(page.address)
        assert (answer.status_code, answer.headers["location"], answer.content) == (303, "/", b"")
        told = answer.headers["set-cookie"]
        assert "HttpOnly" in told
        assert "samesite=strict" in told.lower()
        assert "Path=/" in told
        assert "Max-Age" not in told
        assert page.token not in told
        page_ = client.get("/")
        assert page_.status_code == 200
        assert page.token not in page_.text
        assert page.token not in client.get("/state").text


def test_without_cookie_or_token_there_is_one_line(page: Served) -> None:
    token, wrong = page.token, "A" * len(page.token)
    almost = [f"/?token={one}" for one in (token[:-1], f"{token}A", token.swapcase(), f"{token}%C3%A9")]
    with page.client() as client:
        for path in ("/", "/state", "/nothing", "/?token=", f"/?token={wrong}", f"/state?token={token}", *almost):
            answer = client.get(path)
            assert answer.status_code == 401, path
            assert answer.headers["content-type"].startswith("text/plain")
            assert len(answer.text.splitlines()) == 1
            assert "set-cookie" not in answer.headers
            assert "run" not in answer.text.replace("fedtune", "")


def test_another_cookie_gets_nothing(page: Served) -> None:
    name = cookie(page).split(": ")[1].split("=")[0]
    for value in ("", "x", page.token, "é"):
        status, _, _ = raw(page, asking(page, "/state", more=f"Cookie: {name}={value}\r\n"))
        assert status == 401
    assert raw(page, asking(page, "/state", more=cookie(page)))[0] == 200


def test_every_start_has_secrets_of_its_own(page: Served, folder: Path) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", page.address)
    with served(folder) as other:
        assert other.token != page.token
        with other.client() as client:
            assert client.get(f"/?token={page.token}").status_code == 401
        status, _, _ = raw(other, asking(other, "/", more=cookie(page)))
        assert status == 401
        assert cookie(other).split("=")[0] != cookie(page).split("=")[0], "a browser sends one port's to the others"


FOREIGN = ("evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "localhost@evil.example:{port}")


@pytest.mark.parametrize("host", [*FOREIGN, "127.0.0.1", "127.0.0.1:1", "localhost:{port}.", "[::1]", ""])
def test_a_name_that_was_made_to_point_here_gets_nothing(page: Served, host: str) -> None:
    host = host.format(port=page.origin.rsplit(":", 1)[1])
    for path in ("/state", f"/?token={page.token}"):
        status, headers, body = raw(page, asking(page, path, host=host, more=cookie(page)))
        assert status == 400
        assert "set-cookie" not in headers
        assert len(body.splitlines()) == 1


def test_the_names_of_this_machine_are_known_and_one_is_needed(page: Served) -> None:
    port = page.origin.rsplit(":", 1)[1]
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        assert raw(page, asking(page, "/state", host=f"{name}:{port}", more=cookie(page)))[0] == 200
    assert raw(page, asking(page, "/", more=f"Host: 127.0.0.1:{port}\r\n"))[0] == 400
    assert raw(page, b"GET / HTTP/1.0\r\n\r\n")[0] == 400


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUERY"])
def test_it_can_only_be_read(page: Served, method: str) -> None:
    with page.reader() as client:
        for path in ("/", "/state", "/nothing"):
            answer = client.request(method, path)
            assert answer.status_code == 405
            assert answer.headers["allow"] == "GET, HEAD"


# What it answers.


def test_every_answer_has_the_same_protection(page: Served) -> None:
    with page.reader() as client, page.client() as stranger:
        answers = [client.get("/"), client.get("/state"), client.get("/docs"), client.post("/"), stranger.get("/")]
        answers += [stranger.get(page.address), stranger.get("/", headers={"Host": "evil.example"})]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 405, 401, 303, 400]
    for answer in answers:
        headers = answer.headers
        assert headers["content-security-policy"].startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers
        assert not [name for name in headers if name.startswith("access-control")]


def test_what_runs_bears_a_nonce_that_is_new_with_every_answer(page: Served) -> None:
    nonces = []
    with page.reader() as client:
        for _ in range(2):
            answer = client.get("/")
            ((nonce),) = set(re.findall(r"'nonce-([\w-]+)'", answer.headers["content-security-policy"]))
            assert set(re.findall(r'<(?:script|style) nonce="([^"]*)">', answer.text)) == {nonce}
            assert not re.findall(r"<(?:script|style)>|\son\w+=|javascript:|\sstyle=", answer.text)
            nonces.append(nonce)
    assert nonces[0] != nonces[1]


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/state/", "/run.json", "/config.yaml", "//",
                                  "/../run.json", "/%2e%2e/config.yaml", "/..%2fconfig.yaml", "/state/../config.yaml",
                                  "/static/..\\config.yaml", "/%00", "/sites/site-1/ledger.db", "*"])  # fmt: skip
def test_no_file_and_no_description_is_served(page: Served, path: str) -> None:
    status, _, body = raw(page, asking(page, path, more=cookie(page)))
    assert status == 404
    assert body == b"There is nothing here.\n"


def test_the_whole_page_and_the_state_say_the_same(page: Served) -> None:
    def no_constant(name: str) -> None:
        raise ValueError(name)

    with page.reader() as client:
        html, answer = client.get("/").text, client.get("/state")
    data = json.loads(answer.text, parse_constant=no_constant)
    assert answer.headers["content-type"] == "application/json"
    assert f"<title>{data['title']}</title>" in html
    for part in data["parts"].values():
        assert part in html
    assert data["state"]["progress"]["failures"] == [{"round": 1, "site": "site-2", "reason": "max_epsilon"}]


def test_what_did_not_change_or_was_not_asked_for_is_not_sent(page: Served) -> None:
    with page.reader() as client:
        first = client.get("/state")
        again = client.get("/state", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get("/state", headers={"If-None-Match": '"other"'}).status_code == 200
        for path in ("/", "/state"):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == get.headers["content-length"]


def test_a_mistake_of_ours_tells_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    with served(folder) as found, found.reader() as client:

        def broken(self: WatchedFolder) -> None:
            raise KeyError("secret")

        monkeypatch.setattr(WatchedFolder, "now", broken)
        answer = client.get("/state")
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "secret" in caplog.text, "but the terminal does"


def test_many_at_once_and_nothing_is_written(folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = contents(folder)
    with served(folder) as found, found.reader() as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: client.get(path).status_code, ["/", "/state"] * 20))
    assert answers == [200] * 40
    assert contents(folder) == before


# Where it listens.


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "", "127.0.0.1:80", "::ffff:127.0.0.1"]
)
def test_only_this_machine_can_reach_it(folder: Path, host: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"--host = .*: must be an address of this machine alone"),
        served(folder, host=host),
    ):
        pass


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.9", "::1"])
def test_loopback_addresses(folder: Path, host: str) -> None:
    try:
        with served(folder, host=host) as found, found.reader() as client:
            assert client.get("/state").status_code == 200
    except ConfigError as error:
        if host != "::1":
            raise
        pytest.skip(f"no IPv6 here: {error}")


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none(folder: Path, port: int) -> None:
    with pytest.raises(ConfigError, match=f"--port = {port}: must be from 0"), served(folder, port=port):
        pass


def test_a_port_that_is_taken(folder: Path, page: Served) -> None:
    port = int(page.origin.rsplit(":", 1)[1])
    bound = r"cannot be listened on at 127\.0\.0\.1 \(Address already in use"
    with pytest.raises(ConfigError, match=f"--port = {port}: {bound}"), served(folder, port=port):
        pass
