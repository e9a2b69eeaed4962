"""The lead's memory of its sites' receipts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.federation.lead import ReceiptBook
from fedtune.privacy.release import Receipt
from fedtune.spec import RunError

MakeReceipt = Callable[..., Receipt]


@pytest.fixture
def book(tmp_path: Path) -> ReceiptBook:
    return ReceiptBook(tmp_path / "lead" / "receipts.json")


def test_receipts_come_back_as_they_were_with_signatures_that_hold(book: ReceiptBook, receipt: MakeReceipt) -> None:
    kept = {"a": receipt("a"), "b": receipt("b", charged=3)}
    book.keep(kept)
    assert ReceiptBook(book.path).read() == kept
    assert all(one.is_signed() for one in book.read().values())


def test_of_each_site_the_newest_is_kept_over_all_runs(book: ReceiptBook, receipt: MakeReceipt) -> None:
    book.keep({"a": receipt("a", charged=2), "b": receipt("b")})
    book.keep({"a": receipt("a", charged=1, run="older")})
    assert book.read()["a"] == receipt("a", charged=2)
    book.keep({"a": receipt("a", charged=3, run="newer")})
    assert book.read() == {"a": receipt("a", charged=3, run="newer"), "b": receipt("b")}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"a"', '{"a": 1}', '{"a": {}}', '{"a": {"site": "a"}}', "\udcff", "1" * 5000],
    ids=lambda text: text[:20],
)
def test_a_damaged_file_is_said_to_be_one_and_not_written_over(
    book: ReceiptBook, receipt: MakeReceipt, text: str
) -> None:
    book.path.parent.mkdir()
    book.path.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = book.path.read_bytes()
    # Taken for empty, it would let a ledger that was put back pass.
    for use in (book.read, lambda: book.keep({"a": receipt("a")})):
        with pytest.raises(RunError, match=r"receipts\.json is damaged"):
            use()
    assert book.path.read_bytes() == before
