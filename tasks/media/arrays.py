"""The arrays that media are on the wire: their types, and whether a value is a torch tensor."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

PixelsHWC = npt.NDArray[np.uint8]
"""uint8 `(H, W, 3)`, RGB."""

PixelsTHWC = npt.NDArray[np.uint8]
"""uint8 `(T, H, W, 3)`, RGB."""


def flat(data: Any) -> Any:
    """Contiguous bytes-like data, an array too, as plain bytes in a row."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else b""


def is_tensor(value: Any) -> bool:
    """Whether `value` is a torch tensor; torch is never imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
