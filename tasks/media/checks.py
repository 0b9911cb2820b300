"""What `submit()` checks of media: types, shapes and dtypes, without a pass over the pixels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from tasks.errors import InvalidSampleError
from tasks.media.arrays import is_tensor

LONGEST_EDGE = {"jpeg": 65_500, "webp": 16_383}
"""Pixels of an edge that an image file of a format can have, as Pillow's libraries write it; PNG has no bound."""

EXACT_PIL_MODES = ("RGB", "L", "1", "P")
"""PIL modes that become RGB without a choice to make. RGBA does too where it is opaque."""

_IMAGE_NEEDS = "needs a PIL image, uint8 (H, W, 3), or float (3, H, W) in [0, 1]"
_VIDEO_NEEDS = "needs a list of images of one size, uint8 (T, H, W, 3), or float (T, 3, H, W) in [0, 1]"


def check_image(value: Any, where: str, max_pixels: int) -> None:
    """Raise `InvalidSampleError` unless `value` has the type, shape and dtype of one image."""
    if isinstance(value, Image.Image):
        _check_pil(value, where, max_pixels)
        return
    shape, is_float = _array_kind(value, where, _IMAGE_NEEDS)
    height_width = _plane(shape, is_float, 3, where, _IMAGE_NEEDS)
    _check_area(height_width, where, max_pixels)


def check_video(value: Any, where: str, max_pixels: int) -> None:
    """Raise `InvalidSampleError` unless `value` has the type, shape and dtype of one video."""
    if isinstance(value, list | tuple):
        _check_frames(value, where, max_pixels)
        return
    shape, is_float = _array_kind(value, where, _VIDEO_NEEDS)
    height_width = _plane(shape, is_float, 4, where, _VIDEO_NEEDS)
    if shape[0] == 0:
        raise InvalidSampleError(
            f"{where}: {_VIDEO_NEEDS}, found no frames, shape {shape}"
        )
    _check_area(height_width, where, max_pixels)


def _check_frames(frames: Sequence[Any], where: str, max_pixels: int) -> None:
    """Raise `InvalidSampleError` unless `frames` are images of one size, and at least one of them."""
    if not frames:
        raise InvalidSampleError(f"{where}: {_VIDEO_NEEDS}, found an empty list")
    for t, frame in enumerate(frames):
        check_image(frame, f"{where}[{t}]", max_pixels)
    sizes = {_frame_size(frame) for frame in frames}
    if len(sizes) > 1:
        raise InvalidSampleError(
            f"{where}: {_VIDEO_NEEDS}, found frames of sizes {sorted(sizes)}"
        )


def check_audio(value: Any, where: str) -> None:
    """Raise `InvalidSampleError` unless `value` is a float waveform `(T,)` or `(C, T)`."""
    needs = "needs a float waveform (T,) or (C, T)"
    shape, is_float = _array_kind(value, where, needs)
    if not is_float or len(shape) not in (1, 2) or 0 in shape:
        raise InvalidSampleError(f"{where}: {needs}, found {_describe(value)}")


def too_long_for(image_format: str, height: int, width: int) -> str | None:
    """Why an image of this size cannot be a file of a format, or None."""
    longest = LONGEST_EDGE.get(image_format)
    if longest is None or max(height, width) <= longest:
        return None
    return (
        f"an image of {height}x{width} (height x width) cannot be a {image_format.upper()}, whose edges are at most "
        f"{longest} pixels"
    )


def size_of(value: Any) -> tuple[int, int]:
    """Height and width of a checked image, or of the frames of a checked video."""
    if isinstance(value, list | tuple):
        return _frame_size(value[0])
    is_video = not isinstance(value, Image.Image) and len(value.shape) == 4
    return _frame_size(value[0] if is_video else value)


def _check_pil(image: Image.Image, where: str, max_pixels: int) -> None:
    if image.mode not in (*EXACT_PIL_MODES, "RGBA"):
        raise InvalidSampleError(
            f"{where}: a PIL image of mode {image.mode!r} has no one RGB; {_as_rgb(image.mode)}"
        )
    _check_area((image.height, image.width), where, max_pixels)


def _as_rgb(mode: str) -> str:
    """Advice for an image of a PIL mode that becomes RGB in more than one way."""
    if mode[-1:] in ("A", "a"):
        return "paste it on the background that it should be seen on, a new RGB image"
    if mode in ("I", "F") or mode.startswith("I;"):
        return "scale its levels to 0..255 and make it RGB: convert() alone cuts them off at 255"
    return 'convert it as it should look, image.convert("RGB")'


def _check_area(height_width: tuple[int, int], where: str, max_pixels: int) -> None:
    height, width = height_width
    if height * width == 0:
        raise InvalidSampleError(f"{where}: an empty image, {height}x{width}")
    if height * width > max_pixels:
        raise InvalidSampleError(
            f"{where}: {height}x{width} has {height * width} pixels, more than REWARDQ_MAX_PIXELS={max_pixels}"
        )


def _array_kind(value: Any, where: str, needs: str) -> tuple[tuple[int, ...], bool]:
    """Shape of an array or tensor and whether it is float (else uint8)."""
    if is_tensor(value):
        is_uint8 = value.dtype == sys.modules["torch"].uint8
    elif isinstance(value, np.ndarray):
        is_uint8 = value.dtype == np.uint8
    else:
        raise InvalidSampleError(
            f"{where}: {needs}, found {_describe(value)}{_as_array(value)}"
        )

    is_float = _is_float(value)
    if not (is_float or is_uint8):
        raise InvalidSampleError(f"{where}: {needs}, found {_describe(value)}")
    return tuple(value.shape), is_float


def _as_array(value: Any) -> str:
    """What to do with arrays of other libraries, whose axes and values nothing here knows."""
    if isinstance(value, list | tuple) or not hasattr(type(value), "__array__"):
        return ""
    return "; np.asarray(x) makes a numpy array of it"


def _plane(
    shape: tuple[int, ...], is_float: bool, num_axes: int, where: str, needs: str
) -> tuple[int, int]:
    """Height and width, after checking that the axes are where the dtype says they are."""
    if len(shape) == num_axes:
        if is_float:
            channels, height, width = shape[-3:]
        else:
            height, width, channels = shape[-3:]
        if channels == 3:
            return height, width
    kind = "float" if is_float else "uint8"
    raise InvalidSampleError(f"{where}: {needs}, found {kind} {shape}")


def _frame_size(frame: Any) -> tuple[int, int]:
    """Height and width of one checked frame."""
    if isinstance(frame, Image.Image):
        return frame.height, frame.width
    height, width = frame.shape[1:] if _is_float(frame) else frame.shape[:2]
    return height, width


def _is_float(array: Any) -> bool:
    """Whether an array or tensor is float; its channels then come first."""
    if is_tensor(array):
        return bool(array.is_floating_point())
    return bool(array.dtype.kind == "f")


def _describe(value: Any) -> str:
    if is_tensor(value) or isinstance(value, np.ndarray):
        return (
            f"{type(value).__module__.split('.')[0]} {value.dtype} {tuple(value.shape)}"
        )
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
