"""Images, videos and audio (PIL, numpy, torch) to checked arrays and bytes: one pass over the values.

`submit()` keeps media by reference (`held.hold`); a background thread of the client encodes them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tasks.errors import InvalidSampleError
from tasks.media.arrays import PixelsHWC, PixelsTHWC, is_tensor
from tasks.media.held import Held, check_unchanged
from tasks.media.pil import encode_pil

JPEG_QUALITY = 95

HALF_A_LEVEL = 1 / 510
"""A float image may leave [0, 1] by less than this, by rounding: its nearest level is 0 or 255 there too."""

NEAR_A_BOUND = 0.1
"""Values that leave [0, 1] by no more than this were meant to be in it, and were not clamped."""

LEAST_OF_LEVELS = 2.0
"""An image whose floats reach this is not in [0, 1] by any rounding: its scale is another."""


def encode_image(held: Held, where: str) -> PixelsHWC:
    """The checked pixels of one image, uint8 `(H, W, 3)`, C-contiguous; shares memory with an array that is so already.

    Raises:
        InvalidSampleError: A float is NaN or more than half a level outside [0, 1], a file is truncated, an alpha
            channel is not opaque, the image was changed after `submit()` (as far as `held` can tell), or a tensor's
            values are not here (distributed, sparse, meta).
    """
    if isinstance(held.value, Image.Image):
        return encode_pil(held, where)
    return _encode_array(held, where)


def encode_video(held: Held, where: str) -> PixelsTHWC:
    """The checked pixels of one video, uint8 `(T, H, W, 3)`, C-contiguous. Raises as `encode_image`."""
    if not isinstance(held.value, tuple):
        return _encode_array(held, where)
    first = encode_image(held.value[0], f"{where}[0]")
    # Frame by frame into their places: a list of all would be the video a second time.
    video = np.empty((len(held.value), *first.shape), np.uint8)
    for t, frame in enumerate(held.value):
        pixels = encode_image(frame, f"{where}[{t}]") if t else first
        if pixels.shape != first.shape:
            raise InvalidSampleError(
                f"{where}[{t}]: a frame of {pixels.shape[0]}x{pixels.shape[1]} (height x width) in a video of "
                f"{first.shape[0]}x{first.shape[1]}; was it changed after submit()?"
            )
        video[t] = pixels
    return video


def encode_audio(held: Held, where: str) -> npt.NDArray[np.float32]:
    """The waveform as float32 `(C, T)`. Raises `InvalidSampleError` where it is not finite."""
    # A value that float32 cannot hold becomes infinite, and is refused below as every infinite value is.
    with np.errstate(over="ignore"):
        array = np.atleast_2d(_to_numpy(held, where).astype(np.float32))
    check_unchanged(held, where)

    if not np.isfinite(array).all():
        raise InvalidSampleError(
            f"{where}: the waveform has values that are NaN or infinite"
        )
    return np.ascontiguousarray(array)


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
    check_unchanged(held, where)
    return pixels


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
    """The values of an array or tensor, after checking that it is still what was submitted."""
    check_unchanged(held, where)
    if is_tensor(held.value):
        return _tensor_to_numpy(held, where)
    if np.ma.isMaskedArray(held.value):
        _check_unmasked(held.value, where)
    array = np.asarray(held.value)
    # 255 times a value needs more than the 11 bits that float16 has, of either byte order.
    is_half = array.dtype.kind == "f" and array.dtype.itemsize == 2
    return array.astype(np.float32) if is_half else array


def _check_unmasked(array: Any, where: str) -> None:
    num_masked = int(np.ma.getmaskarray(array).sum())
    if num_masked:
        raise InvalidSampleError(
            f"{where}: {num_masked} values of the array are masked, and have no level; "
            "fill them as the image should look: array.filled(...)"
        )


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
            f"{where}: a {kind} that cannot be read as a plain tensor: {type(error).__name__}: {error}"
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
