"""A report's page as PDF: what a printer would make of it, without a browser."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtune.privacy.durable import write_durably
from fedtune.spec import ConfigError

_EARLIEST = "315532800"  # 1 January 1980, for fonts that would otherwise note when they were put in


def write(html: str, path: Path) -> None:
    """Write `html`, a page of `page.render`, as tagged PDF; equal pages give equal files on one machine.

    Nothing is fetched: a page that names anything outside itself is made without it.

    Raises:
        ConfigError: WeasyPrint is not installed, or its libraries (Pango) are missing.
    """
    weasyprint = _weasyprint()
    # A class made here, since its base may be missing.
    refusing = type("Refusing", (weasyprint.urls.URLFetcher,), {"fetch": _refuse})
    with _without_dates():
        made = weasyprint.HTML(string=html, base_url=None, url_fetcher=refusing()).write_pdf(
            pdf_identifier=hashlib.sha256(html.encode()).digest()[:16], pdf_tags=True
        )
    write_durably(path, made)


def _weasyprint() -> Any:
    try:
        importlib.import_module("weasyprint.urls")
        return importlib.import_module("weasyprint")
    except ImportError:
        raise ConfigError("--pdf", True, "needs WeasyPrint: pip install 'fedtune[pdf]'") from None
    except OSError as error:  # the package is there, a library of the system is not
        bound = f"needs Pango (on Debian: apt-get install libpango-1.0-0 libpangoft2-1.0-0): {error}"
        raise ConfigError("--pdf", True, bound) from None


def _refuse(_: object, url: str, *__: object, **___: object) -> None:
    raise ValueError(f"a report needs nothing from outside, and not {url}")


@contextmanager
def _without_dates() -> Iterator[None]:
    """While fonts are put in: they note the time, unless this variable tells another one."""
    before = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = before or _EARLIEST
    try:
        yield
    finally:
        if before is None:
            del os.environ["SOURCE_DATE_EPOCH"]
