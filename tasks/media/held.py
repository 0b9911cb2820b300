"""Media that `submit()` keeps by reference, and how a change of them before they are encoded is noticed.

A torch tensor counts its changes in place. Of numpy arrays, PIL images, image files and tensors of this host a few
values are kept (a probe), spread over the whole: enough for a buffer that is filled anew, too few for a retouched spot.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from tasks.errors import InvalidSampleError
from tasks.media.arrays import is_tensor

NUM_SPOTS = 256
"""Values of an array in its probe. More of them see smaller changes and cost more: each is a line of the processor's
cache."""

MIN_SPOTS = 16
"""Of each frame in a list; the frames of a long list share `NUM_SPOTS`."""

_CHANGED = "before it was sent; submit a copy, or call flush() before you reuse it"


@dataclass(frozen=True, slots=True)
class Held:
    """A reference to the caller's media, with what is needed to notice a change before they are encoded."""

    value: Any
    version: int | None = None
    """A torch tensor's `_version` at `submit()`; None for a tensor made in inference mode, which has no version."""
    event: Any = None
    """A CUDA event after which a tensor's data are there."""
    num_spots: int = 0
    """How many values are in the probe; 0 if there is none."""
    probe: Any = None
    """What `probe_of` said at `submit()`; None where nothing can be said."""


def hold(value: Any, *, num_spots: int = 0) -> Held:
    """Keep `value` by reference until a sender's thread encodes it; nothing is copied.

    Args:
        num_spots: Values to keep, so that a change can be noticed where no version tells (`NUM_SPOTS`); 0 keeps none.
    """
    if isinstance(value, list | tuple):
        shared = max(MIN_SPOTS, num_spots // max(1, len(value))) if num_spots else 0
        return Held(tuple(hold(v, num_spots=shared) for v in value))

    probe = probe_of(value, num_spots) if num_spots else None
    if not is_tensor(value):
        return Held(value, num_spots=num_spots, probe=probe)

    event = None
    if value.is_cuda:
        torch = sys.modules["torch"]
        event = torch.cuda.current_stream(value.device).record_event()
    version = None if value.is_inference() else value._version
    return Held(value, version, event, num_spots, probe)


def check_unchanged(held: Held, where: str) -> None:
    """Raise `InvalidSampleError` if the media are not what was submitted, as far as version and probe can tell."""
    if isinstance(held.value, tuple):
        for i, one in enumerate(held.value):
            check_unchanged(one, f"{where}[{i}]")
        return
    if held.version is not None and held.value._version != held.version:
        raise InvalidSampleError(
            f"{where}: the tensor was changed in place after submit() and {_CHANGED}: tensor.clone()"
        )
    if held.probe is None:
        return
    # Read since: the file was looked at when it was read for this sample or another.
    if held.probe[0] == "file" and not _is_unread(held.value):
        return
    if probe_of(held.value, held.num_spots) != held.probe:
        kind = "image" if isinstance(held.value, Image.Image) else "array"
        raise InvalidSampleError(
            f"{where}: the {kind} was changed after submit() and {_CHANGED}: x.copy()"
        )


def probe_of(value: Any, num_spots: int) -> Any:
    """A few values of an image, array or tensor, to be compared with those at another time; None if it has none here.

    An image whose file was not read yet is not read: size, time of change and some bytes of the file are its probe.
    """
    # A probe is no check: what cannot be looked at raises when it is encoded, and says why.
    with contextlib.suppress(Exception):
        if isinstance(value, Image.Image):
            return _of_image(value, num_spots)
        if isinstance(value, np.ndarray):
            return "array", _of_array(np.asarray(value), num_spots)
        if is_tensor(value):
            return _of_tensor(value, num_spots)
    return None


def _of_array(array: np.ndarray[Any, Any], num_spots: int) -> int:
    if array.size <= num_spots:
        return hash(array.tobytes())
    return hash(array[_spots(array.shape, num_spots)].tobytes())


@functools.lru_cache(maxsize=64)
def _spots(shape: tuple[int, ...], num_spots: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Places in an array of this shape, the same each time: one by chance in each of so many equal parts."""
    size = int(np.prod(shape, dtype=np.int64))
    starts = np.arange(num_spots, dtype=np.int64) * size // num_spots
    offsets = np.random.default_rng(0).random(num_spots) * (size / num_spots)
    flat = np.minimum(starts + offsets.astype(np.int64), size - 1)
    return np.unravel_index(flat, shape)


def _of_tensor(tensor: Any, num_spots: int) -> Any:
    """Of a plain tensor in this host's memory. Tensors on a GPU would have to be waited for."""
    torch = sys.modules["torch"]
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
        return None
    plain = tensor.detach()
    if plain.dtype is torch.bfloat16:  # which numpy does not know
        plain = plain.view(torch.int16)
    return "tensor", _of_array(plain.numpy(), num_spots)


# --- PIL images --------------------------------------------------------------------------

_READ_WHEN_OPENED = ("WEBP", "AVIF")
"""Formats whose files Pillow has in memory as soon as it has opened them."""


def _of_image(image: Image.Image, num_spots: int) -> tuple[Any, ...]:
    if isinstance(image, ImageFile.ImageFile) and _is_unread(image):
        return _of_file(image, num_spots)
    return _of_pixels(image, num_spots)


def _is_unread(image: Image.Image) -> bool:
    """Whether an image's pixels are still in its file; Pillow reads them at their first use."""
    if not isinstance(image, ImageFile.ImageFile):
        return False
    return bool(image.tile) or getattr(image, "_im", image) is None


def _of_pixels(image: Image.Image, num_spots: int) -> tuple[Any, ...]:
    width, height = image.size
    edge = math.isqrt(num_spots)
    grid = min(edge, width), min(edge, height)
    # The core's own, since `Image.resize` reads files, and takes four times as long.
    few = image.im.resize(grid, Image.Resampling.NEAREST, (0, 0, width, height))
    seen = image._new(few).tobytes()
    if image.palette is not None:
        seen += bytes(image.palette.palette)
    return "pixels", image.mode, image.size, image.tell(), hash(seen)


def _of_file(image: ImageFile.ImageFile, num_spots: int) -> tuple[Any, ...]:
    """Which frame of the file it is, and what is known of the file without reading it."""
    return "file", image.size, image.tell(), _state_of_file(image, num_spots)


def _state_of_file(image: ImageFile.ImageFile, num_spots: int) -> Any:
    file: Any = image.fp
    if image.format in _READ_WHEN_OPENED or file is None:
        return None
    if isinstance(file, io.BytesIO):
        # Copies nothing until somebody writes, who would be refused that while `getbuffer()` is in use.
        return _of_array(np.frombuffer(file.getvalue(), np.uint8), num_spots)
    with contextlib.suppress(io.UnsupportedOperation, AttributeError):
        opened = os.fstat(file.fileno())
        # Pillow maps raw pixels, for which it opens the path once more: another file may be there by then.
        is_mapped = len(image.tile) == 1 and image.tile[0][0] == "raw"
        path = image.filename if is_mapped and image.filename else None
        mapped = os.stat(path) if path is not None else opened
        return opened.st_size, opened.st_mtime_ns, mapped.st_ino
    return None
