"""The arrays that advantages and metrics compute with, all in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]


def to_float64(values: Any) -> Floats:
    """An array, a tensor on any device or a list (None becomes NaN) as float64."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def floats_of_bytes(data: bytes) -> Floats:
    """The float64 values whose `tobytes()` is `data`."""
    return np.frombuffer(data, dtype=np.float64)
