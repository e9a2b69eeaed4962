"""Decoding of images from files, or from bytes inside the records; each image is decoded separately.

Decoding an untrusted image can take any amount of memory and time.  The size of the file, its format, its number of
pixels and its aspect ratio are therefore checked, from the header, before the image is decoded.
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

from fedtune.data.text_rows import MAX_BYTES, name_json_type
from fedtune.extras import require_extra
from fedtune.spec import DataError

FORMATS, SUFFIXES = ("JPEG", "PNG", "WEBP"), (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 50_000_000  # more than a camera's resolution, and up to 1 GB during decoding
MAX_TIMES = 20  # maximum aspect ratio, because a processor resizes the shorter side
_MAX_SCANS = 100  # maximum scans of a JPEG, each a pass over all pixels; progressive JPEGs have about ten
WITHIN = "data:;base64,"
"""Prefix of an image field that contains the image itself, as a data URL (RFC 2397)."""
_BOUND = f"must be a complete {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image of at most {MAX_PIXELS:,} pixels"


def read_image_field(value: object, at: str) -> str:
    """Read an image field: a path unchanged, or the image's bytes as text; from {bytes, path} the bytes take
    precedence.

    Raises:
        DataError: the value is neither a path nor bytes.
    """
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None and "path" in value else value.get("bytes")
    if isinstance(value, bytes):
        return WITHIN + base64.b64encode(value).decode()
    if not isinstance(value, str) or not value.strip():
        kind = "blank" if isinstance(value, str) else name_json_type(value)
        raise DataError(at, kind, "must be the path of an image, or its bytes (role image)")
    return value


def decode_image(field: str, *, file: str, at: str) -> Any:
    """Decode a record's image to RGB (`PIL.Image.Image`), rotated by its EXIF orientation.

    16-bit gray images are reduced to their upper 8 bits, transparency is dropped as in transformers, and only the first
    frame is used.

    Args:
        field: the field from `read_image_field`.
        file: the record's file; image paths must stay below its folder.  An empty string allows any path.
        at: the position of the field, for messages.

    Raises:
        DataError: the image is missing, too large or cannot be decoded.
    """
    require_pillow()
    from PIL import Image, ImageFile, ImageOps

    content = _read_content(field, file, at=at)
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > _MAX_SCANS:
        raise DataError(at, f"more than {_MAX_SCANS} scans", f"must have at most {_MAX_SCANS} scans, as a JPEG")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library in this process may have changed it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about images that are refused below, and about unusual metadata
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise DataError(at, f"{width * height:,} pixels", _BOUND)
                if max(width, height) > MAX_TIMES * min(width, height):
                    bound = f"must have an aspect ratio of at most {MAX_TIMES}"
                    raise DataError(at, f"{width} by {height} pixels", bound)
                opened.load()
                turned: Any = opened
                with suppress(Exception):  # broken metadata does not make an image unusable
                    turned = ImageOps.exif_transpose(opened)
                if turned.mode.startswith("I"):
                    turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
                return turned.convert("RGB")
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(at, "far too many pixels", _BOUND) from None
    except Exception:  # any decoder error; its message may quote the file
        raise DataError(at, "not a decodable image", _BOUND) from None


def _read_content(field: str, file: str, *, at: str) -> bytes:
    """Return the bytes of an image.  Relative paths must stay below the folder of the data file."""
    is_within = field.startswith(WITHIN)
    try:
        if is_within:
            content = base64.b64decode(field.removeprefix(WITHIN), validate=True)
        else:
            folder = Path(file).parent.resolve()
            path = (folder / field).resolve()
            if file and not path.is_relative_to(folder):
                raise DataError(at, "a path outside the folder", "must be a path below the folder of the record's file")
            if not path.is_file():
                raise DataError(at, "no such file", _explain_missing(folder / field, field))
            with path.open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError):  # no permission; a null byte or invalid base64; circular links
        kind = "text that is not base64" if is_within else "a file that cannot be read"
        raise DataError(at, kind, _BOUND) from None
    if len(content) > MAX_BYTES:
        raise DataError(at, f"more than {MAX_BYTES} bytes", f"must have at most {MAX_BYTES} bytes per image")
    return content


def _explain_missing(path: Path, field: str) -> str:
    """Return the error text for a missing image file, with a hint about the most likely mistake."""
    if "\\" in field:
        return "must separate folders with /, not with \\ as in Windows"
    spelt = {path.name.lower(), path.name.upper(), path.stem + path.suffix.lower(), path.stem + path.suffix.upper()}
    case = " (a file name differs only in case)" * any(path.with_name(name).is_file() for name in spelt)
    return f"must be the path of an image, relative to the folder of the record's file{case}"


def generate_image_field(draw: Callable[[int], int]) -> str:
    """Generate the field of a random image; `draw(n)` returns a random integer below n."""
    from PIL import Image

    stream, pixels = io.BytesIO(), bytes(int(draw(256)) for _ in range(3 * 8 * 8))
    Image.frombytes("RGB", (8, 8), pixels).save(stream, "PNG")
    return read_image_field(stream.getvalue(), "image")


def require_pillow() -> None:
    """Require Pillow, the image decoder.

    Raises:
        ConfigError: Pillow is not installed.
    """
    require_extra("data.input", "image", "images", "PIL")
