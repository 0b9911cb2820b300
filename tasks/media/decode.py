"""Stored media back to arrays, PIL images and tensors, as a worker gives them to a reward model."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tasks.media.arrays import PixelsHWC


def from_jpeg(data: bytes, size_HW: tuple[int, int] | None = None) -> PixelsHWC:
    """Pixels of JPEG bytes that `to_jpeg` made.

    Args:
        size_HW: The height and width that the file must have: a few bytes may declare gigabytes of pixels.

    Raises:
        ValueError: The file has another size.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        width, height = image.size
        if size_HW is not None and (height, width) != size_HW:
            raise ValueError(
                f"a JPEG of {height}x{width} pixels where {size_HW[0]}x{size_HW[1]} are declared"
            )
        return np.asarray(image.convert("RGB"))


def split_frames(data: bytes | bytearray) -> list[bytes]:
    """The files that `join_frames` put together."""
    frames, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        frames.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    return frames


def to_pil(pixels_HWC: PixelsHWC) -> Image.Image:
    """A PIL image of the same pixels."""
    return Image.fromarray(pixels_HWC)


def to_tensor(pixels: npt.NDArray[np.uint8]) -> Any:
    """A float32 torch tensor in [0, 1]: `(3, H, W)` of an image, `(T, 3, H, W)` of a video."""
    import torch

    # torch warns of an array that cannot be written to: a payload in `bytes`, which is a small one.
    writable = pixels if pixels.flags.writeable else pixels.copy()
    channels_first = torch.from_numpy(writable).movedim(-1, -3)
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(
        255.0
    )


def to_waveform(audio: npt.NDArray[np.float32]) -> Any:
    """A float32 torch tensor `(C, T)` of its own."""
    import torch

    return torch.from_numpy(audio.copy())
