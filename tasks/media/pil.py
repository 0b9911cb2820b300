"""PIL images to pixels: their files are read here, and what Pillow makes of them is checked."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
from PIL import Image

from tasks.errors import InvalidSampleError
from tasks.media.arrays import PixelsHWC
from tasks.media.held import Held, check_unchanged
from tasks.media.whole_files import check_whole

ORIENTATION_TAG = 0x0112
"""Of EXIF. 1 is upright."""

_reading_files = threading.Lock()
"""PIL reads a file at the first use of its pixels. Two threads that read one file at once get pieces of each other's
image."""


def _read_in_a_child() -> None:
    """A new lock: the thread that may hold the old one does not exist in a forked child."""
    global _reading_files
    _reading_files = threading.Lock()


os.register_at_fork(after_in_child=_read_in_a_child)


def encode_pil(held: Held, where: str) -> PixelsHWC:
    """The pixels of a PIL image, uint8 `(H, W, 3)`. Raises `InvalidSampleError` as `encode_image` does."""
    _read(held, where)
    image = _of_its_mode(held.value)
    if image.has_transparency_data:
        image = _opaque(image, where)
    try:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return np.ascontiguousarray(np.asarray(rgb))
    except Exception as error:
        raise InvalidSampleError(
            f"{where}: an image of mode {image.mode!r} cannot be made RGB: {_words(error)}"
        ) from None


def orientation_of(image: Any) -> int:
    """How the file of an image says that its pixels are to be turned or mirrored, as EXIF has it; 1 if not at all.

    Call it after the image was read: some files say it at their end. A TIFF's pixels are turned by Pillow itself.
    """
    if "exif" not in image.info:
        return 1
    try:
        found = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # it is a hint; the pixels were read
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _read(held: Held, where: str) -> None:
    """Have Pillow read the pixels, if it has not yet."""
    image: Image.Image = held.value
    try:
        with _reading_files:
            check_unchanged(held, where)
            check_whole(image)
            image.load()
    except InvalidSampleError:
        raise
    except Exception as error:
        # The decoders of image files raise anything, for a closed file an AssertionError.
        reason = str(error) or f"{type(error).__name__}; was its file closed?"
        raise InvalidSampleError(
            f"{where}: the image cannot be read: {reason}"
        ) from None


def _of_its_mode(image: Image.Image) -> Image.Image:
    """An image as its mode says it is.

    A GIF or TGA that is grey may bring a palette. Pillow says then that its mode is L or LA, and converts it by the
    palette all the same, as if its levels were numbers of colours.
    """
    if image.im.mode == image.mode:
        return image
    plain = Image.frombytes(image.mode, image.size, image.tobytes())
    plain.info = image.info
    return plain


def _opaque(image: Image.Image, where: str) -> Image.Image:
    """An image with an alpha channel as RGBA, after checking that no pixel is transparent."""
    try:
        rgba = image.convert("RGBA")
    except Exception as error:
        # Pillow leaves the transparency of a file with images of other modes that are made of it.
        raise InvalidSampleError(
            f"{where}: info['transparency'] of an image of mode {image.mode!r} cannot be read ({_words(error)}); if it "
            'is of an earlier mode, drop it: image.info.pop("transparency"), else flatten the image'
        ) from None
    lowest_alpha = np.asarray(rgba)[..., 3].min()
    if lowest_alpha < 255:
        raise InvalidSampleError(
            f"{where}: the image is transparent (alpha down to {lowest_alpha}); flatten it"
        )
    return rgba


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
