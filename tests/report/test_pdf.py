import contextlib
import http.server
import math
import os
import re
import subprocess
import sys
import threading
import types
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedtune.report.page import render
from fedtune.report.page.translations import load_catalog
from fedtune.spec import ConfigError

from .shown import LONG, NAMES, Make, build_reports, change_facts, render_page

pytestmark = pytest.mark.nightly

try:
    weasyprint, REASON = render._import_weasyprint(), ""
except ConfigError as missing:
    weasyprint, REASON = None, str(missing)
needs_weasyprint = pytest.mark.skipif(weasyprint is None, reason=REASON)


def render_pages(html: str) -> list[Any]:
    return list(weasyprint.HTML(string=html).render().pages)


def cut_after_page_1(html: str) -> str:
    """Page 1 and how the next one begins, which take a tenth of the time."""
    start, remainder = html.split('<nav aria-labelledby="contents">')
    heading = remainder[remainder.index("<details") :].split("<h3>")[0]
    return f"{start}{heading}</section></details></main></body></html>"


@needs_weasyprint
@pytest.mark.parametrize("name", NAMES)
def test_page_one_fits_on_one_sheet_with_spare_margin(name: str, language: str) -> None:
    less = "@media print { @page { margin-bottom: 17mm } }</style>"
    for fillable in (False, True):
        html = cut_after_page_1(render.render(build_reports()[name], language=language, fillable=fillable))
        assert "margin: 8mm 12mm 12mm" in html
        first, second, *other_pages = render_pages(html.replace("</style>", less))
        assert not other_pages, name
        assert {"verdict", "sign-off"} <= set(first.anchors), name
        assert "engineer" in second.anchors, name


WITHOUT_FONTS = """
import sys, warnings
warnings.simplefilter("error")
from fedtune.report.page.render import convert_to_pdf
sys.stdout.buffer.write(convert_to_pdf(sys.stdin.read()))
"""


@needs_weasyprint
def test_pdf_is_complete_and_identical_without_system_fonts(a_report: Make, tmp_path: Path) -> None:
    html = render.render(a_report(), language="de", fillable=True)
    none = tmp_path / "fonts.conf"
    none.write_text(f"<fontconfig><cachedir>{tmp_path}</cachedir></fontconfig>")
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_FONTS],
        input=html.encode(),
        capture_output=True,
        check=False,
        env={**os.environ, "FONTCONFIG_FILE": str(none)},
    )
    assert process.returncode == 0, process.stderr.decode()
    assert process.stderr == b""
    assert process.stdout == render.convert_to_pdf(html)
    font_names = set(re.findall(rb"/FontName /\w+\+([\w-]+)", unpack_pdf(process.stdout)))
    assert font_names == {b"Fedtune-Sans", b"Fedtune-Sans-Bold", b"Fedtune-Mono"}
    assert process.stdout.startswith(b"%PDF-")
    assert process.stdout.rstrip().endswith(b"%%EOF")
    objects = unpack_pdf(process.stdout)
    assert b"/MarkInfo" in objects  # tagged: a screen reader finds headings and tables
    assert not re.search(rb"/(JavaScript|Launch|EmbeddedFile)\b", objects)


@needs_weasyprint
@pytest.mark.parametrize("before", [None, "1700000000"])
def test_pdf_is_reproducible_without_harfbuzz(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """fontTools makes them then, and writes the time into them."""
    monkeypatch.setattr("weasyprint.pdf.fonts.harfbuzz_subset", None)
    clock = iter(range(1_700_000_000, 1_800_000_000, 1000))
    monkeypatch.setattr("fontTools.misc.timeTools.time", types.SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    if before is not None:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", before)
    assert render.convert_to_pdf("<p>text</p>") == render.convert_to_pdf("<p>text</p>")
    assert os.environ.get("SOURCE_DATE_EPOCH") == before


@needs_weasyprint
def test_form_inputs_become_fillable_pdf_fields(language: str) -> None:
    """On page 1; the page for screens and browsers has none."""
    for name in ("by_user", "wide_run"):
        pdf = render.render(build_reports()[name], language=language, fillable=True)
        html = cut_after_page_1(pdf)
        assert pdf.count("<input") == html.count("<input")
        objects = unpack_pdf(render.convert_to_pdf(html))
        requested = html.count('class="asked"')
        assert requested > 0
        assert objects.count(b"/FT /Btn") == 6 + 2 * requested, "three choices for each of two, yes and no"
        assert objects.count(b"/FT /Tx") == 7, "conditions, name and date of both, and when to look again"
        assert "<input" not in render_page(name, language)


def unpack_pdf(data: bytes) -> bytes:
    """A PDF, and what its streams hold."""
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL):
        with contextlib.suppress(zlib.error):
            data += zlib.decompressobj().decompress(stream)  # its last byte may look like the end of a line
    return data


def list_printed(page: Any, *, below: float = 0, above: float = math.inf) -> str:
    """What stands between two heights of a page, without its spaces."""
    boxes = [box for box in page._page_box.descendants() if type(box).__name__ == "TextBox"]
    return "".join(str(box.text) for box in boxes if below <= box.position_y < above).replace(" ", "")


@needs_weasyprint
def test_every_pdf_page_shows_report_name_and_digest(a_report: Make) -> None:
    html = render.render(change_facts(a_report(), name=LONG), language="en")
    digest = re.findall(r"\b[0-9a-f]{64}\b", html)[-1]
    for page in render_pages(html):
        footer = list_printed(page, below=page.height - 60)
        assert digest in footer
        assert "universi" in footer


@needs_weasyprint
@pytest.mark.parametrize("name", ["within", "no_guarantee"])
def test_every_pdf_page_of_a_study_shows_its_banner(name: str) -> None:
    report = build_reports()[name]
    assert report.banners
    for page in render_pages(render_page(name, "de")):
        for banner in report.banners:
            assert load_catalog("de").texts["banner"][banner].replace(" ", "") in list_printed(page, above=30)


@needs_weasyprint
def test_page_one_shows_the_banner_when_margins_cannot() -> None:
    """As in a browser that knows none of what `@supports` asks for, which WeasyPrint leaves out."""
    report = build_reports()["no_guarantee"]
    for fillable in (False, True):
        first, *_ = render_pages(cut_after_page_1(render.render(report, language="en", fillable=fillable)))
        for banner in report.banners:
            has_banner = load_catalog("en").texts["banner"][banner].replace(" ", "") in list_printed(first, below=30)
            assert has_banner != fillable


@needs_weasyprint
def test_pdf_rendering_fetches_nothing() -> None:
    requested: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            self.send_error(404)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        image = f'<img src="http://127.0.0.1:{server.server_port}/x.png"><img src="file:///etc/hostname">'
        style = f'<link rel="stylesheet" href="http://127.0.0.1:{server.server_port}/x.css">'
        assert render.convert_to_pdf(f"<html><head>{style}</head><body>{image}<p>text</p></body></html>").startswith(
            b"%PDF-"
        )
        server.shutdown()
    assert requested == []


def test_missing_weasyprint_or_pango_error_suggests_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.extras.is_installed", lambda module: False)
    with pytest.raises(ConfigError, match="--pdf: requires weasyprint: pip install "):
        render.convert_to_pdf("<p>")
    monkeypatch.setattr("fedtune.extras.is_installed", lambda module: True)
    no_pango = Mock(side_effect=OSError("cannot load library 'libpango-1.0-0'"))
    monkeypatch.setattr(render.importlib, "import_module", no_pango)
    with pytest.raises(ConfigError, match=r"requires Pango .*libpango-1\.0-0"):
        render.convert_to_pdf("<p>")
