"""A report's page as PDF: what a printer would make of it, without a browser."""

from __future__ import annotations

import hashlib
import importlib
import logging
from typing import Any

from fedtune.spec import ConfigError


def made(html: str) -> bytes:
    """`html`, a page of `page.render`, as tagged PDF; equal pages give equal bytes on one machine.

    Nothing is fetched: what a page names outside itself is left out.

    Raises:
        ConfigError: WeasyPrint is not installed, or a library of the system that it needs.
    """
    weasyprint = _weasyprint()
    # It tells of each rule of the style sheet that is for screens only.
    logging.getLogger("weasyprint").setLevel(logging.ERROR)
    # A class made here, since its base may be missing.
    refusing = type("Refusing", (weasyprint.urls.URLFetcher,), {"fetch": _refuse})
    document = weasyprint.HTML(string=html, base_url=None, url_fetcher=refusing())
    identifier = hashlib.sha256(html.encode()).digest()[:16]
    return bytes(document.write_pdf(pdf_identifier=identifier, pdf_tags=True))


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
