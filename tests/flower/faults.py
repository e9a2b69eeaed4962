"""Connections that break at a chosen call."""

from typing import Any

import httpx


class Faulty(httpx.BaseTransport):
    """A transport that breaks the first call whose path ends in `call`, once `break_at` was called.

    "before": the server never receives the call. "after": the server has answered, and the answer is lost. "garbled":
    a third party answers with its own page.
    """

    def __init__(self, client: Any) -> None:
        # Flower's clients have an httpx client, which has the transport.
        self._inner = client._client._transport
        client._client._transport = self
        self._call, self._when = "", ""

    @property
    def waits(self) -> bool:
        return bool(self._call)

    def break_at(self, call: str, when: str) -> None:
        self._call, self._when = call, when

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        fails = self.waits and request.url.path.endswith(f"/{self._call}")
        if fails:
            self._call = ""
            if self._when == "before":
                raise httpx.ConnectError("cut off", request=request)
            if self._when == "garbled":
                return httpx.Response(200, text="<html>Please log in to the hotel's network", request=request)
        response = self._inner.handle_request(request)
        if fails:
            response.read()
            response.close()
            raise httpx.ReadError("cut off", request=request)
        return response

    def close(self) -> None:
        self._inner.close()
