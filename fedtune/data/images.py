"""Images as patches of pixels: in a file beside their record's, or within it; decoded within bounds, each by itself.

What a decoder makes of a file decides about memory and time before anybody has looked at it.  So a file's size, its
format, its number of pixels and its form are bounded, by what its header says, and only then it is decoded.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data.text_rows import MOST_BYTES, json_type
from fedtune.extras import require_extra
from fedtune.spec import DataError

FORMATS, SUFFIXES = ("JPEG", "PNG", "WEBP"), (".jpg", ".jpeg", ".png", ".webp")
MOST_PIXELS = 50_000_000  # of an image: more than a camera's, and up to 1 GB while it is decoded
MOST_TIMES = 20  # that one side may be as long as the other: a processor brings the shorter one to its size
_MOST_SCANS = 100  # of a JPEG, each of which costs a pass over all pixels: a progressive one has about ten
WITHIN = "data:;base64,"
"""Begins the field of an image that its record holds, as an address does that holds what it names (RFC 2397)."""
_BOUND = f"must be a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image of at most {MOST_PIXELS:,} pixels"


def image_of(value: object, at: str) -> str:
    """The field of an image: a path as it is, or the image's bytes as text, which count first in {bytes, path}."""
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None and "path" in value else value.get("bytes")
    if isinstance(value, bytes):
        return WITHIN + base64.b64encode(value).decode()
    if not isinstance(value, str) or not value.strip():
        found = "blank" if isinstance(value, str) else json_type(value)
        raise DataError(at, found, "must be the path of an image, or its bytes (role image)")
    return value


def decoded(field: str, *, file: str, at: str) -> Any:
    """A record's image, in three colours (`PIL.Image.Image`), turned as its EXIF orientation says; or a DataError.

    Of 16 bits for each grey pixel the upper 8 are taken; transparency is dropped, as transformers does it; of several
    frames the first counts.  `field` is as `image_of` makes it; the image lies in the folder of the record's `file` or
    below (empty: anywhere); `at` names the field in messages.
    """
    require_pillow()
    from PIL import Image, ImageFile, ImageOps

    content = _content(field, file, at=at)
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > _MOST_SCANS:
        raise DataError(at, f"more than {_MOST_SCANS} scans", f"must have at most {_MOST_SCANS} scans, as a JPEG")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whatever another library of this process wants
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below, and of odd marks beside the pixels
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    raise DataError(at, f"{width * height:,} pixels", _BOUND)
                if max(width, height) > MOST_TIMES * min(width, height):
                    bound = f"must have sides of which one is at most {MOST_TIMES} times as long as the other"
                    raise DataError(at, f"{width} by {height} pixels", bound)
                opened.load()
                turned: Any = opened
                with suppress(Exception):  # marks beside the pixels are no reason to do without these
                    turned = ImageOps.exif_transpose(opened)
                if turned.mode.startswith("I"):
                    turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
                return turned.convert("RGB")
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(at, "far too many pixels", _BOUND) from None
    except Exception:  # whatever a decoder raises; its own words may quote the file
        raise DataError(at, "no image that can be decoded", _BOUND) from None


def _content(field: str, file: str, *, at: str) -> bytes:
    """The bytes of an image file.  Of a record in a file it lies in that file's folder or below."""
    is_within = field.startswith(WITHIN)
    try:
        if is_within:
            found = base64.b64decode(field.removeprefix(WITHIN), validate=True)
        else:
            folder = Path(file).parent.resolve()
            path = (folder / field).resolve()
            if file and not path.is_relative_to(folder):
                raise DataError(at, "a path out of the folder", "must be a path below the folder of the record's file")
            if not path.is_file():
                raise DataError(at, "no such file", _why_missing(folder / field, field))
            with path.open("rb") as stream:
                found = stream.read(MOST_BYTES + 1)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError):  # no permission; a null byte, or no base64; links in a circle
        kind = "text that is no base64" if is_within else "a file that cannot be read"
        raise DataError(at, kind, _BOUND) from None
    if len(found) > MOST_BYTES:
        raise DataError(at, f"more than {MOST_BYTES} bytes", f"must have at most {MOST_BYTES} bytes an image")
    return found


def _why_missing(path: Path, field: str) -> str:
    """The bound that a path without a file breaks, in the form that is likeliest to be meant."""
    if "\\" in field:
        return "must have / between its folders, and not \\ as in Windows"
    spelt = {path.name.lower(), path.name.upper(), path.stem + path.suffix.lower(), path.stem + path.suffix.upper()}
    case = " (a file's name differs in case alone)" * any(path.with_name(one).is_file() for one in spelt)
    return f"must be the path of an image, from the folder of the record's file{case}"


def noise(draw: Callable[[int], int]) -> str:
    """The field of an invented image; `draw(n)` takes one of n."""
    from PIL import Image

    stream, pixels = io.BytesIO(), bytes(int(draw(256)) for _ in range(3 * 8 * 8))
    Image.frombytes("RGB", (8, 8), pixels).save(stream, "PNG")
    return image_of(stream.getvalue(), "image")


def require_pillow() -> None:
    """Raise ConfigError where Pillow is not installed, so that no image can be decoded."""
    require_extra("data.input", "image", "images", "PIL")
