"""Images, videos and audio (PIL, numpy, torch) to checked arrays and bytes: one pass over the values.

`submit()` keeps media by reference (`hold`); a background thread of the client encodes them.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tasks.errors import InvalidSampleError
from tasks.media.arrays import PixelsHWC, PixelsTHWC, is_tensor

JPEG_QUALITY = 95

HALF_A_LEVEL = 1 / 510
"""A float image may leave [0, 1] by less than this, by rounding: its nearest level is 0 or 255 there too."""

NEAR_A_BOUND = 0.1
"""Values that leave [0, 1] by no more than this were meant to be in it, and were not clamped."""

LEAST_OF_LEVELS = 2.0
"""An image whose floats reach this is not in [0, 1] by any rounding: its scale is another."""


@dataclass(frozen=True, slots=True)
class Held:
    """A reference to the caller's media, with what is needed to notice a change before they are encoded."""

    value: Any
    version: int | None = None
    """A torch tensor's `_version` at `submit()`; None for a tensor made in inference mode, which has no version."""
    event: Any = None
    """A CUDA event after which a tensor's data are there."""


def hold(value: Any) -> Held:
    """Keep `value` by reference until a sender's thread encodes it; nothing is copied."""
    if isinstance(value, list | tuple):
        return Held(tuple(hold(v) for v in value))
    if not is_tensor(value):
        return Held(value)

    event = None
    if value.is_cuda:
        torch = sys.modules["torch"]
        event = torch.cuda.current_stream(value.device).record_event()
    return Held(
        value, version=None if value.is_inference() else value._version, event=event
    )


def encode_image(held: Held, where: str) -> PixelsHWC:
    """The checked pixels of one image, uint8 `(H, W, 3)`, C-contiguous; shares memory with an array that is so already.

    Raises:
        InvalidSampleError: A float is NaN or more than half a level outside [0, 1], a file is truncated, an alpha
            channel is not opaque, a tensor was changed in place after `submit()`, or its values are not here
            (distributed, sparse, meta).
    """
    if isinstance(held.value, Image.Image):
        return _encode_pil(held.value, where)
    return _encode_array(held, where)


def encode_video(held: Held, where: str) -> PixelsTHWC:
    """The checked pixels of one video, uint8 `(T, H, W, 3)`, C-contiguous. Raises as `encode_image`."""
    if not isinstance(held.value, tuple):
        return _encode_array(held, where)
    frames = [
        encode_image(frame, f"{where}[{t}]") for t, frame in enumerate(held.value)
    ]
    return np.stack(frames)


def encode_audio(held: Held, where: str) -> npt.NDArray[np.float32]:
    """The waveform as float32 `(C, T)`. Raises `InvalidSampleError` where it is not finite."""
    # A value that float32 cannot hold becomes infinite, and is refused below as every infinite value is.
    with np.errstate(over="ignore"):
        array = np.atleast_2d(_to_numpy(held, where).astype(np.float32))
    _check_unchanged(held, where)

    if not np.isfinite(array).all():
        raise InvalidSampleError(
            f"{where}: the waveform has values that are NaN or infinite"
        )
    return np.ascontiguousarray(array)


def digest(data: Any) -> str:
    """32 hex digits of SHA-256 over contiguous bytes (1.9 ms for 1024x1024 where the processor has SHA)."""
    return hashlib.sha256(data).hexdigest()[:32]


def to_jpeg(pixels_HWC: PixelsHWC, quality: int = JPEG_QUALITY) -> bytes:
    """JPEG bytes at Pillow's default subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def join_frames(frames: Sequence[bytes]) -> bytes:
    """Files behind one another, each behind its length as 4 bytes, most significant first."""
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def _encode_array(held: Held, where: str) -> npt.NDArray[np.uint8]:
    """The checked pixels of an array or tensor, of an image or a video."""
    array = _to_numpy(held, where)
    pixels = array if array.dtype == np.uint8 else _to_uint8(array, where)
    pixels = np.ascontiguousarray(pixels)
    _check_unchanged(held, where)
    return pixels


def _check_unchanged(held: Held, where: str) -> None:
    if held.version is not None and held.value._version != held.version:
        raise InvalidSampleError(
            f"{where}: the tensor was changed in place after submit() and before it was sent; "
            "submit a clone, or call flush() before you reuse it"
        )


def _from_cuda(held: Held) -> Any:
    """A CPU copy made on a stream of its own once the tensor's data are there; the trainer's streams do not wait."""
    torch = sys.modules["torch"]
    stream = torch.cuda.Stream(held.value.device)
    with torch.cuda.stream(stream):
        stream.wait_event(held.event)
        copy = held.value.detach().to("cpu", non_blocking=False)
        held.value.record_stream(stream)
    stream.synchronize()
    return copy


def _to_numpy(held: Held, where: str) -> npt.NDArray[Any]:
    """The values of an array or tensor, after checking that the tensor is still what was submitted."""
    _check_unchanged(held, where)
    if is_tensor(held.value):
        return _tensor_to_numpy(held, where)
    array = np.asarray(held.value)
    # 255 times a value needs more than the 11 bits that float16 has.
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _tensor_to_numpy(held: Held, where: str) -> npt.NDArray[Any]:
    torch = sys.modules["torch"]
    try:
        tensor = (held.value if held.event is None else _from_cuda(held)).detach()
        is_narrow = tensor.dtype not in (torch.float32, torch.float64)
        if tensor.is_floating_point() and is_narrow:
            tensor = tensor.float()
        return np.asarray(tensor.cpu().numpy())
    except (RuntimeError, TypeError) as error:
        # Distributed, sparse and meta tensors have the shape of a plain tensor, and fail only here.
        kind = f"{type(held.value).__name__} on {held.value.device}"
        raise InvalidSampleError(
            f"{where}: a {kind} that cannot be read as a plain tensor: {error}"
        ) from None


def _to_uint8(array: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
    """`round(255 x)` with the channels last, `(..., 3, H, W)` to `(..., H, W, 3)`, after a check of the range.

    A value that is less than half a level outside of [0, 1] has a nearest level, black or white, as any other value.
    """
    low, high = float(array.min()), float(array.max())
    is_in_range = low >= -HALF_A_LEVEL and high <= 1.0 + HALF_A_LEVEL  # false with NaN
    if not is_in_range:
        raise InvalidSampleError(
            f"{where}: floats must be in [0, 1], found {_out_of_range(array)}"
        )

    needs_clip = low < 0.0 or high > 1.0
    pixels = np.empty((*array.shape[:-3], *array.shape[-2:], 3), np.uint8)
    # Plane by plane: the whole array at once takes three times as long.
    for *frame, channel in np.ndindex(array.shape[:-2]):
        plane = array[(*frame, channel)]
        if needs_clip:
            plane = plane.clip(0.0, 1.0)
        pixels[(*frame, ..., channel)] = np.rint(plane * 255.0)
    return pixels


def _out_of_range(array: npt.NDArray[Any]) -> str:
    """What is wrong with floats that are not in [0, 1], and the likely cause."""
    num_nans = int(np.isnan(array).sum())
    if num_nans:
        return f"{num_nans} values are NaN"
    low, high = float(array.min()), float(array.max())
    # Four digits are enough to show a value that is half a level outside.
    return f"values in [{low:.4g}, {high:.4g}]{_likely_cause(low, high)}"


def _likely_cause(low: float, high: float) -> str:
    """What to do about values in `[low, high]`, where their range tells."""
    is_near_zero, is_near_one = low >= -NEAR_A_BOUND, high <= 1.0 + NEAR_A_BOUND
    if is_near_zero and is_near_one:
        return "; values that leave [0, 1] by a little, as a decoder's do, are x.clamp(0, 1)"
    if is_near_one and low >= -1.0 - NEAR_A_BOUND:
        return "; an image in [-1, 1] is (x + 1) / 2, then .clamp(0, 1)"
    if is_near_zero and LEAST_OF_LEVELS < high <= 255.0 + 255.0 * NEAR_A_BOUND:
        return "; an image in 0..255 is x / 255, then .clamp(0, 1)"
    return "; bring them into [0, 1] as the image should look"


_reading_files = threading.Lock()
"""PIL reads a file at the first use of its pixels. Two threads that read one file at once get pieces of each other's
image."""


def _read_in_a_child() -> None:
    """A new lock: the thread that may hold the old one does not exist in a forked child."""
    global _reading_files
    _reading_files = threading.Lock()


os.register_at_fork(after_in_child=_read_in_a_child)


def _encode_pil(image: Image.Image, where: str) -> PixelsHWC:
    try:
        with _reading_files:
            image.load()
    except Exception as error:
        # The decoders of image files raise anything, for a closed file an AssertionError.
        reason = str(error) or f"{type(error).__name__}; was its file closed?"
        raise InvalidSampleError(
            f"{where}: the image cannot be read: {reason}"
        ) from None

    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        lowest_alpha = np.asarray(rgba)[..., 3].min()
        if lowest_alpha < 255:
            raise InvalidSampleError(
                f"{where}: the image is transparent (alpha down to {lowest_alpha}); flatten it"
            )
        image = rgba

    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.ascontiguousarray(np.asarray(image))
