"""Image files whose end is missing: refused wherever Pillow would make other pixels of what is there."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from tasks import media
from tasks.errors import InvalidSampleError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of most cuts, and goes on

RNG = np.random.default_rng(5)
NOISE = RNG.integers(0, 256, (61, 47, 3), np.uint8)
Y, X = np.mgrid[0:61, 0:47]
SMOOTH = np.stack([Y * 3, X * 4, (Y + X) * 2], -1).astype(np.uint8)
FLAT = np.full((61, 47, 3), 0xD0, np.uint8)  # runs of a value that begins runs


def saved(pixels: np.ndarray, mode: str, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray | None:
    """What is sent of a file; None if it is refused."""
    try:
        image = Image.open(io.BytesIO(data))
    except OSError:
        return None
    try:
        media.check_image(image, "image", 10**8)
        return media.encode_image(media.hold(image), "image")
    except InvalidSampleError:
        return None


def tiff(compression: int, strips: list[bytes]) -> bytes:
    """A grey TIFF of 47x61 with its directory before its strips, as cameras and scanners write it."""
    rows = -(-61 // len(strips))
    entries = [
        (256, 4, (47,)), (257, 4, (61,)), (258, 3, (8,)), (259, 3, (compression,)), (262, 3, (1,)),
        (273, 4, None), (277, 3, (1,)), (278, 4, (rows,)), (279, 4, tuple(map(len, strips))),
    ]  # fmt: skip
    start = 8 + 2 + 12 * len(entries) + 4
    extra, at = b"", start + 8 * len(strips)
    offsets = []
    for strip in strips:
        offsets.append(at)
        at += len(strip)
    directory = struct.pack("<H", len(entries))
    for tag, kind, values in entries:
        values = values or tuple(offsets)
        packed = struct.pack(f"<{len(values)}{'I' if kind == 4 else 'H'}", *values)
        if len(packed) > 4:
            where = struct.pack("<I", start + len(extra))
            extra += packed
        else:
            where = packed.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, len(values)) + where
    return b"II*\0\x08\0\0\0" + directory + b"\0\0\0\0" + extra.ljust(8 * len(strips), b"\0") + b"".join(strips)


GREY = NOISE[..., 0]
TIFFS = {
    "raw": tiff(1, [GREY.tobytes()]),
    "raw strips": tiff(1, [GREY[i : i + 16].tobytes() for i in range(0, 61, 16)]),
    "packbits strips": tiff(
        32773, [b"".join(bytes([46]) + row.tobytes() for row in GREY[i : i + 16]) for i in range(0, 61, 16)]
    ),
}
FILES = {
    **{f"TIFF {name}": data for name, data in TIFFS.items()},
    **{
        f"PCX {mode} {name}": saved(pixels, mode, "PCX")
        for mode in ("P", "L", "1", "RGB")
        for name, pixels in (("noise", NOISE), ("smooth", SMOOTH), ("flat", FLAT))
    },
    **{f"TIFF {mode} as saved": saved(NOISE, mode, "TIFF") for mode in ("RGB", "L", "P", "1")},
    "TIFF LZW": saved(SMOOTH, "RGB", "TIFF", compression="tiff_lzw"),
    "JPEG2000": saved(NOISE, "RGB", "JPEG2000"),
    "JPEG2000 grey": saved(SMOOTH, "L", "JPEG2000"),
    "codestream": saved(NOISE, "RGB", "JPEG2000", no_jp2=True),
}


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_taken_with_the_pixels_that_pillow_reads(name):
    expected = np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    assert np.array_equal(pixels_of(FILES[name]), expected)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_has_the_right_pixels_or_is_refused(name):
    whole = FILES[name]
    expected = pixels_of(whole)
    cuts = {*range(1, min(len(whole), 300)), *range(max(1, len(whole) - 800), len(whole), 3)}
    cuts |= {len(whole) * k // 97 for k in range(1, 97)}
    wrong = []
    for cut in sorted(cuts):
        found = pixels_of(whole[:cut])
        if found is not None and not np.array_equal(found, expected):
            wrong.append(cut)
    assert wrong == []


def test_a_cut_palette_file_is_refused_with_its_reason():
    image = Image.open(io.BytesIO(FILES["PCX P noise"][:-100]))
    assert image.mode == "L"  # what Pillow makes of it
    with pytest.raises(InvalidSampleError, match="cannot be read: the file is cut: its pixels and palette take"):
        media.encode_image(media.hold(image), "image")


def test_a_tiff_whose_directory_names_more_than_there_is_is_refused_with_its_reason():
    image = Image.open(io.BytesIO(TIFFS["raw strips"][:-7]))
    with pytest.raises(InvalidSampleError, match="the file is cut: a part of it ends at byte"):
        media.encode_image(media.hold(image), "image")
