"""Images in files and rows: paths below the table's folder, limits on decoding, and independence."""

import os
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image, ImageFile
from pyarrow import parquet

from fedtune.data import images
from fedtune.data.formats import detect_format, list_data_files
from fedtune.data.images import read_image_field
from fedtune.data.records import Record, iter_records, iter_usable_records, make_validator
from fedtune.spec import ConfigError, DataError

from ..pictures import encode_image, make_picture
from .conftest import write_jsonl

COLUMNS = {"image": "picture", "label": "y"}


def decode_record_image(record: Record) -> Any:
    return images.decode_image(record.fields["image"], file=record.file, at=record.at("image"))


def decode(content: bytes) -> Image.Image:
    image = decode_record_image(Record({"image": read_image_field(content, "image")}))
    assert image.mode == "RGB"
    return image


def list_pixels(image: Image.Image) -> list[Any]:
    return np.asarray(image).tolist()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_supported_image_formats_are_decoded(format: str) -> None:
    image = make_picture()
    decoded = decode(encode_image(image, format))
    assert decoded.size == image.size
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(image)).mean() < (1e-9 if format == "PNG" else 60)


def test_images_are_rotated_by_exif_and_converted_to_rgb() -> None:
    image, exif = make_picture(size=(4, 2)), Image.Exif()
    exif[274] = 6  # rotate by 90 degrees
    assert list_pixels(decode(encode_image(image, exif=exif))) == list_pixels(image.rotate(-90, expand=True))
    image = make_picture()
    few, clear = image.quantize(8), image.copy()
    clear.putalpha(0)  # the colors below stay visible, as in transformers
    for mode in (image.convert("L"), few, clear, image.convert("1")):
        assert list_pixels(decode(encode_image(mode))) == list_pixels(mode.convert("RGB"))
    assert list_pixels(decode(encode_image(few, transparency=bytes(range(8))))) == list_pixels(few.convert("RGB"))
    assert decode(encode_image(image.convert("CMYK"), "JPEG")).size == image.size
    deep = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]], dtype=np.uint16)
    pixels = list_pixels(decode(encode_image(Image.fromarray(deep))))
    assert pixels == [[[upper] * 3 for upper in row] for row in ([0, 0, 1], [0x12, 0xFF, 0xFF])], "the upper 8 bits"


WHOLE, JPEG = encode_image(make_picture()), encode_image(make_picture(size=(90, 90)), "JPEG")


def make_png_header(width: int, height: int) -> bytes:
    """Make a PNG that declares this number of pixels but has few bytes."""
    header = b"IHDR" + struct.pack(">II", width, height) + WHOLE[24:29]
    return WHOLE[:12] + header + struct.pack(">I", zlib.crc32(header)) + WHOLE[33:]


BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a decodable image"),
    "text": (b"\xffno image", "not a decodable image"),
    "cut off": (WHOLE[:-60], "not a decodable image"),
    "a bit flipped": (WHOLE[:60] + bytes([WHOLE[60] ^ 255]) + WHOLE[61:], "not a decodable image"),
    "a cut JPEG": (JPEG[:-900], "not a decodable image"),
    "another format": (encode_image(make_picture(), "GIF"), "not a decodable image"),
    "too many pixels": (make_png_header(10_000, 5_001), "50,010,000 pixels"),
    "a bomb": (make_png_header(60_000, 60_000), "far too many pixels"),
    "a line": (make_png_header(2_000, 99), "2000 by 99 pixels"),
    "very many scans": (JPEG[:-2] + 101 * JPEG[JPEG.index(b"\xff\xda") : -2] + JPEG[-2:], "more than 100 scans"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_image_raises_one_error_without_content(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # must not allow truncated images here
    content, reason = BROKEN[name]
    (tmp_path / "secret.png").write_bytes(content)
    (tmp_path / "good.png").write_bytes(WHOLE)
    rows = [{"picture": name, "y": "a"} for name in ("good.png", "secret.png", "good.png")]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    _, record, _ = iter_records(file, COLUMNS)
    with pytest.raises(DataError) as caught:
        decode_record_image(record)
    assert str(caught.value).startswith(f"{file}:2, image = '{reason}': must ")
    assert "secret" not in str(caught.value)
    usable = iter_usable_records(file, COLUMNS, fault=make_validator(decode_record_image))
    assert [good.line for good in usable] == [1, 3]


def test_oversized_images_are_refused_and_missing_pillow_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(WHOLE)
    record = Record({"image": "a.png"}, file=str(tmp_path / "rows.csv"), line=1)
    with monkeypatch.context() as patched:
        patched.setattr(images, "MAX_BYTES", len(WHOLE) - 1)
        with pytest.raises(DataError, match=r"must have at most .* bytes per image"):
            decode_record_image(record)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"requires Pillow: pip install "):
        decode_record_image(record)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        *((path, "a path outside the folder") for path in ("../out.png", "/dev/zero", "sub/../../out.png", "link.png")),
        *((path, "no such file") for path in ("nothing.png", ".", "pipe.png")),
        *((path, "a file that cannot be read") for path in ("nu\0ll.png", "x" * 5000, "loop.png")),
        ("data:;base64,@@", "text that is not base64"),
    ],
)
def test_image_paths_must_stay_below_the_table_folder(path: str, found: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "out.png").write_bytes(WHOLE)
    (folder / "sub" / "in.png").write_bytes(WHOLE)
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    file = str(folder / "rows.csv")
    assert decode_record_image(Record({"image": "sub/in.png"}, file=file, line=1)).size == make_picture().size
    assert (
        decode_record_image(Record({"image": str(folder / "sub" / "in.png")}, file=file, line=1)).size
        == make_picture().size
    )
    with pytest.raises(DataError) as caught:
        decode_record_image(Record({"image": path}, file=file, line=7))
    assert str(caught.value).startswith(f"{file}:7, image = '{found}': must ")


@pytest.mark.parametrize(("path", "reason"), [("sub\\in.png", "must separate folders"), ("sub/IN.PNG", "only in case")])
def test_missing_image_path_error_explains_the_difference(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "in.png").write_bytes(WHOLE)
    with pytest.raises(DataError, match=reason):
        decode_record_image(Record({"image": path}, file=str(tmp_path / "rows.csv"), line=7))


def test_class_folders_yield_one_record_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sick/b.png", "sick/a.PNG", "well/c.png", "well/notes.txt"):
        (tmp_path / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scans" / name).write_bytes(WHOLE)
    monkeypatch.chdir(tmp_path / "scans")
    for folder in (tmp_path / "scans", Path()):
        records = list(iter_records(folder, {"image": "image", "label": "label"}))
        assert [record.fields["label"] for record in records] == ["sick", "sick", "well"]
        assert [decode_record_image(record).size for record in records] == [make_picture().size] * 3
        assert [file.name for file in list_data_files(folder)] == ["a.PNG", "b.png", "c.png"]
    (tmp_path / "scans" / "labels.csv").write_text("image,label\n")
    assert detect_format(tmp_path / "scans") == "brat", "next to a table, images must not be separate records"


def test_parquet_rows_contain_image_bytes_or_paths(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(encode_image(make_picture(seed=2)))
    rows = [
        {
            "bytes": encode_image(make_picture(seed=1)),
            "path": "/somewhere/else.png",
        },  # the format of Hugging Face datasets
        {"bytes": None, "path": "b.png"},
        None,
        {"bytes": None, "path": None},
    ]
    parquet.write_table(pyarrow.table({"picture": rows, "y": ["a"] * 4}), tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.table({"picture": [WHOLE, b"x"], "y": ["a"] * 2}), tmp_path / "plain.parquet")
    records = list(iter_usable_records(tmp_path / "rows.parquet", COLUMNS))
    assert [list_pixels(decode_record_image(record)) for record in records] == [
        list_pixels(make_picture(seed=seed)) for seed in (1, 2)
    ]
    first, second = iter_records(tmp_path / "plain.parquet", COLUMNS)
    assert list_pixels(decode_record_image(first)) == list_pixels(make_picture())
    with pytest.raises(DataError, match=r"plain\.parquet:2, image"):
        decode_record_image(second)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_image_metadata_uses_bounded_memory(format: str) -> None:
    """Four thousand tags refer to the same 9 kB; Pillow before 13 copied the bytes for each tag."""
    count, shared = 4000, 9_000
    begin = 8 + 2 + 12 * count + 4
    tags = b"".join(struct.pack("<HHII", tag, 7, shared, begin) for tag in range(1, count + 1))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, count) + tags + bytes(4 + shared)
    content = read_image_field(encode_image(make_picture(), format, exif=exif), "image")
    tracemalloc.start()
    try:
        images.decode_image(content, file="", at="x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000
