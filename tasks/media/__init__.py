"""Images and videos (PIL, numpy, torch) to checked uint8 pixels and back; the one place where layouts change.

An image is uint8 `(H, W, 3)` on the wire, a video `(T, H, W, 3)`, audio float32 `(C, T)`. Floats come in as
`(3, H, W)` in [0, 1] and are rounded to the nearest of 256 levels, as diffusers does when it makes PIL images; what
rounding put up to half a level outside is the level at that end.
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

PixelsHWC = npt.NDArray[np.uint8]
"""uint8 `(H, W, 3)`, RGB."""

PixelsTHWC = npt.NDArray[np.uint8]
"""uint8 `(T, H, W, 3)`, RGB."""

JPEG_QUALITY = 95
LONGEST_EDGE = {"jpeg": 65_500, "webp": 16_383}
"""Pixels of an edge that an image file of a format can have, as Pillow's libraries write it; PNG has no bound."""

EXACT_PIL_MODES = ("RGB", "L", "1", "P")
"""PIL modes that become RGB without a choice to make; RGBA too where it is opaque."""

HALF_A_LEVEL = 1 / 510
"""A float image may leave [0, 1] by less than this, of rounding: it is nearest to level 0 or 255 there too."""

NEAR_A_BOUND = 0.1
"""What leaves [0, 1] by no more than this was meant to be in it, and was not clamped."""

LEAST_OF_LEVELS = 2.0
"""An image whose floats reach this is not in [0, 1] by any rounding: its scale is another."""

_IMAGE_NEEDS = "needs a PIL image, uint8 (H, W, 3), or float (3, H, W) in [0, 1]"
_VIDEO_NEEDS = "needs a list of images of one size, uint8 (T, H, W, 3), or float (T, 3, H, W) in [0, 1]"


@dataclass(frozen=True, slots=True)
class Held:
    """A reference to the caller's media, with what is needed to notice a change before it is encoded.

    `version` is a torch tensor's `_version` at submit (None of one made in inference mode, which keeps none), `event` a
    CUDA event after which its data are there.
    """

    value: Any
    version: int | None = None
    event: Any = None


def is_tensor(value: Any) -> bool:
    """Whether `value` is a torch tensor; torch is never imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


# --- what submit() looks at: types, shapes, dtypes; no pass over the pixels ---------------------


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
        if not value:
            raise InvalidSampleError(f"{where}: {_VIDEO_NEEDS}, found an empty list")
        for t, frame in enumerate(value):
            check_image(frame, f"{where}[{t}]", max_pixels)
        sizes = {_frame_size(frame) for frame in value}
        if len(sizes) > 1:
            raise InvalidSampleError(
                f"{where}: {_VIDEO_NEEDS}, found frames of sizes {sorted(sizes)}"
            )
        return
    shape, is_float = _array_kind(value, where, _VIDEO_NEEDS)
    height_width = _plane(shape, is_float, 4, where, _VIDEO_NEEDS)
    if shape[0] == 0:
        raise InvalidSampleError(
            f"{where}: {_VIDEO_NEEDS}, found no frames, shape {shape}"
        )
    _check_area(height_width, where, max_pixels)


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


# --- what a sender's thread does: one pass over the pixels --------------------------------------


def encode_image(held: Held, where: str) -> PixelsHWC:
    """The checked pixels of one image, uint8 `(H, W, 3)`, C-contiguous; shares memory with an array that is so already.

    Raises:
        InvalidSampleError: A float is NaN or more than half a level outside [0, 1], a file is truncated, an alpha
            channel is not opaque, a tensor was changed in place after `submit()`, or its values are not here
            (distributed, sparse, meta).
    """
    if isinstance(held.value, Image.Image):
        return _encode_pil(held.value, where)
    array = _to_numpy(held, where)
    pixels = array if array.dtype == np.uint8 else _to_uint8(array, where)
    pixels = np.ascontiguousarray(pixels)
    _check_unchanged(held, where)
    return pixels


def encode_video(held: Held, where: str) -> PixelsTHWC:
    """The checked pixels of one video, uint8 `(T, H, W, 3)`, C-contiguous. Raises as `encode_image`."""
    if isinstance(held.value, tuple):
        return np.stack(
            [encode_image(frame, f"{where}[{t}]") for t, frame in enumerate(held.value)]
        )
    array = _to_numpy(held, where)
    pixels = array if array.dtype == np.uint8 else _to_uint8(array, where)
    pixels = np.ascontiguousarray(pixels)
    _check_unchanged(held, where)
    return pixels


def encode_audio(held: Held, where: str) -> npt.NDArray[np.float32]:
    """The waveform as float32 `(C, T)`. Raises `InvalidSampleError` where it is not finite."""
    with np.errstate(
        over="ignore"
    ):  # what float32 cannot hold becomes infinite, and is refused as that
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


# --- what a worker does -------------------------------------------------------------------------


def from_jpeg(data: bytes) -> PixelsHWC:
    """Pixels of JPEG bytes that `to_jpeg` made."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def split_frames(data: bytes) -> list[bytes]:
    """The files that `join_frames` put together."""
    frames, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        frames.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return frames


def to_pil(pixels_HWC: PixelsHWC) -> Image.Image:
    """A PIL image of the same pixels."""
    return Image.fromarray(pixels_HWC)


def to_tensor(pixels: npt.NDArray[np.uint8]) -> Any:
    """A float32 torch tensor in [0, 1]: `(3, H, W)` of an image, `(T, 3, H, W)` of a video."""
    import torch

    channels_first = np.moveaxis(pixels, -1, -3)
    return torch.from_numpy(np.array(channels_first, order="C")).float().div_(255.0)


def to_waveform(audio: npt.NDArray[np.float32]) -> Any:
    """A float32 torch tensor `(C, T)` of its own."""
    import torch

    return torch.from_numpy(audio.copy())


# --- private -------------------------------------------------------------------------------------


def _check_pil(image: Image.Image, where: str, max_pixels: int) -> None:
    if image.mode not in (*EXACT_PIL_MODES, "RGBA"):
        raise InvalidSampleError(
            f"{where}: a PIL image of mode {image.mode!r} has no one RGB; {_as_rgb(image.mode)}"
        )
    _check_area((image.height, image.width), where, max_pixels)


def _as_rgb(mode: str) -> str:
    """What to do with an image of a PIL mode that has no one RGB."""
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
        torch = sys.modules["torch"]
        is_float, is_uint8 = value.is_floating_point(), value.dtype == torch.uint8
    elif isinstance(value, np.ndarray):
        is_float, is_uint8 = value.dtype.kind == "f", value.dtype == np.uint8
    else:
        raise InvalidSampleError(f"{where}: {needs}, found {_describe(value)}")
    if not (is_float or is_uint8):
        raise InvalidSampleError(f"{where}: {needs}, found {_describe(value)}")
    return tuple(value.shape), is_float


def _plane(
    shape: tuple[int, ...], is_float: bool, num_axes: int, where: str, needs: str
) -> tuple[int, int]:
    """Height and width, after checking that the axes are where the dtype says they are."""
    kind = "float" if is_float else "uint8"
    channels = shape[-3] if is_float and len(shape) >= 3 else shape[-1] if shape else 0
    if len(shape) != num_axes or channels != 3:
        raise InvalidSampleError(f"{where}: {needs}, found {kind} {shape}")
    return (shape[-2], shape[-1]) if is_float else (shape[-3], shape[-2])


def _frame_size(frame: Any) -> tuple[int, int]:
    """Height and width of one checked frame."""
    if isinstance(frame, Image.Image):
        return frame.height, frame.width
    is_float = (
        frame.is_floating_point() if is_tensor(frame) else frame.dtype.kind == "f"
    )
    shape = tuple(frame.shape)
    return (shape[1], shape[2]) if is_float else (shape[0], shape[1])


def _describe(value: Any) -> str:
    if is_tensor(value) or isinstance(value, np.ndarray):
        return (
            f"{type(value).__module__.split('.')[0]} {value.dtype} {tuple(value.shape)}"
        )
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


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
    if not is_tensor(held.value):
        array = np.asarray(held.value)
        return (
            array.astype(np.float32) if array.dtype == np.float16 else array
        )  # 255 x needs more than 11 bits
    torch = sys.modules["torch"]
    try:
        tensor = (held.value if held.event is None else _from_cuda(held)).detach()
        if tensor.is_floating_point() and tensor.dtype not in (
            torch.float32,
            torch.float64,
        ):
            tensor = tensor.float()
        return np.asarray(tensor.cpu().numpy())
    except (
        RuntimeError,
        TypeError,
    ) as error:  # of a kind of tensor that is taken for a plain one by its shape
        kind = f"{type(held.value).__name__} on {held.value.device}"
        raise InvalidSampleError(
            f"{where}: a {kind} that cannot be read as a plain tensor: {error}"
        ) from None


def _to_uint8(array: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
    """`round(255 x)` with the channels last, `(..., 3, H, W)` to `(..., H, W, 3)`, after a check of the range.

    What is less than half a level outside has a nearest level, black or white, as every other value has one.
    """
    low, high = float(array.min()), float(array.max())
    if not (
        low >= -HALF_A_LEVEL and high <= 1.0 + HALF_A_LEVEL
    ):  # NaN fails both comparisons
        num_nans = int(np.isnan(array).sum())
        found = (
            f"{num_nans} values are NaN"
            if num_nans
            else f"values in [{low:.4g}, {high:.4g}]"
        )
        hint = (
            "" if num_nans else _likely_cause(low, high)
        )  # four digits show what is half a level outside
        raise InvalidSampleError(
            f"{where}: floats must be in [0, 1], found {found}{hint}"
        )
    clamp = low < 0.0 or high > 1.0
    pixels = np.empty((*array.shape[:-3], *array.shape[-2:], 3), np.uint8)
    for *frame, channel in np.ndindex(
        array.shape[:-2]
    ):  # by planes: in one piece it takes three times as long
        plane = array[(*frame, channel)]
        pixels[(*frame, ..., channel)] = np.rint(
            (plane.clip(0.0, 1.0) if clamp else plane) * 255.0
        )
    return pixels


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
"""PIL reads a file at the first use of its pixels; two threads that do so at once get pieces of each other's image."""


def _read_in_a_child() -> None:
    """A forked child has not the thread that may have held the lock."""
    global _reading_files
    _reading_files = threading.Lock()


os.register_at_fork(after_in_child=_read_in_a_child)


def _encode_pil(image: Image.Image, where: str) -> PixelsHWC:
    try:
        with _reading_files:
            image.load()
    except (
        Exception
    ) as error:  # decoders of files raise anything, AssertionError for a closed file
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
