"""A text that the lead's model has no token for: whether a site holds one must not show in its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from fedtune.model import Adapter
from fedtune.privacy.release import Update
from fedtune.tasks import classification

from .conftest import write_records


def test_a_record_without_a_token_stops_no_round(
    station: Callable[..., Any], first_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = classification.encode

    def encode(texts: Sequence[str], *args: Any, **options: Any) -> Iterator[list[int]]:
        for text, ids in zip(texts, original(texts, *args, **options), strict=True):
            yield [] if text == "\u200b" else ids

    monkeypatch.setattr(classification, "encode", encode)
    site = station()
    write_records(site.data, [("one letter", "praise"), ("\u200b", "praise"), ("another", "invoice")])
    reply = site.ask(adapter=first_adapter)
    assert isinstance(reply.body, Update), reply.body
    assert list(map(len, site.real._warm[1].examples._dataset.input_ids)).count(1) == 1, "the text had none"
