"""Image files of which Pillow does not notice that their end is missing: what their format says of their length.

Looked at before the pixels are read, since Pillow fills what is missing, or takes other bytes for it. Of an image that
the caller has read already nothing can be told any more.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_OFFSETS_AND_SIZES = ((273, 279), (324, 325))
"""TIFF tags: where strips are, and how many bytes each has; the same of tiles."""

_PCX_HEADER_BYTES = 128
_PCX_PALETTE_BYTES = 769
_PCX_RUN = 0xC0
"""A byte of at least this begins a run: its lower bits are the length, the next byte is the value."""

_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "
_END_OF_CODESTREAM = b"\xff\xd9"


class CutFileError(OSError):
    """A file ends before its image does."""


def check_whole(image: Any) -> None:
    """Raise `CutFileError` for an image that was not read yet and whose file ends too early. The file is left where it
    was."""
    check = _CHECKS.get(image.format)
    file = getattr(image, "fp", None)
    if check is None or file is None or not getattr(image, "tile", None):
        return
    before = file.tell()
    try:
        check(image, file)
    finally:
        file.seek(before)


def _check_tiff(image: Any, file: BinaryIO) -> None:
    num_bytes = file.seek(0, os.SEEK_END)
    for offsets_tag, sizes_tag in _OFFSETS_AND_SIZES:
        offsets = image.tag_v2.get(offsets_tag, ())
        sizes = image.tag_v2.get(sizes_tag, ())
        for offset, size in zip(_listed(offsets), _listed(sizes), strict=False):
            if offset + size > num_bytes:
                raise CutFileError(
                    f"the file is cut: a part of it ends at byte {offset + size} of {num_bytes}"
                )


def _listed(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check_pcx(image: Any, file: BinaryIO) -> None:
    """Of 256 levels or colours the palette is at the end: without it Pillow takes indices for grey levels."""
    file.seek(0)
    data = np.frombuffer(file.read(), np.uint8)
    bits, num_planes = int(data[3]), int(data[65])
    if bits != 8 or num_planes != 1:
        return  # the decoder notices
    bytes_a_line = int(data[66]) | int(data[67]) << 8
    num_read = _num_encoded(data[_PCX_HEADER_BYTES:], bytes_a_line * image.height)
    needed = _PCX_HEADER_BYTES + num_read + _PCX_PALETTE_BYTES
    if needed > len(data):
        raise CutFileError(
            f"the file is cut: its pixels and palette take {needed} bytes, it has {len(data)}"
        )


def _num_encoded(data: npt.NDArray[np.uint8], num_pixels: int) -> int:
    """How many bytes of run-length code make so many pixels; more than there are if they do not."""
    is_high = data >= _PCX_RUN
    # Within a row of high bytes every second one is the value of the run that the byte before it begins.
    places = np.arange(len(data))
    last_low = np.maximum.accumulate(np.where(is_high, -1, places))
    begins_run = is_high & ((places - last_low) % 2 == 1)
    is_value_of_run = np.concatenate([[False], begins_run[:-1]])
    lengths = np.where(begins_run, 0, 1)
    of_run = np.concatenate([[0], data[:-1].astype(np.int64) & (_PCX_RUN ^ 0xFF)])
    lengths = np.where(is_value_of_run, of_run, lengths)
    made = np.cumsum(lengths)
    return int(np.searchsorted(made, num_pixels)) + 1


def _check_jpeg2000(_image: Any, file: BinaryIO) -> None:
    """A codestream ends with a marker; a JP2 file says in which of its boxes the codestream is."""
    num_bytes = file.seek(0, os.SEEK_END)
    end = _end_of_codestream(file, num_bytes)
    if end > num_bytes:
        raise CutFileError(
            f"the file is cut: its codestream ends at byte {end}, it has {num_bytes}"
        )
    file.seek(max(0, end - len(_END_OF_CODESTREAM)))
    if file.read(len(_END_OF_CODESTREAM)) != _END_OF_CODESTREAM:
        raise CutFileError("the file is cut: its codestream has no end")


def _end_of_codestream(file: BinaryIO, num_bytes: int) -> int:
    """Where the codestream should end. Raises `CutFileError` if the file has none."""
    file.seek(0)
    if file.read(len(_JP2_SIGNATURE)) != _JP2_SIGNATURE:
        return num_bytes  # a codestream without boxes
    at = 0
    while at + 8 <= num_bytes:
        file.seek(at)
        size, kind = struct.unpack(">I4s", file.read(8))
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8).rjust(8, b"\0"))
        if kind == b"jp2c":
            return at + size if size else num_bytes
        if size < 8:
            break
        at += size
    raise CutFileError("the file is cut: it has no codestream")


_CHECKS: dict[str | None, Callable[[Any, BinaryIO], None]] = {
    "TIFF": _check_tiff,
    "PCX": _check_pcx,
    "JPEG2000": _check_jpeg2000,
}
