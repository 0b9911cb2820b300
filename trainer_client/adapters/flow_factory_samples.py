"""Our samples of Flow-Factory's: their media, and the plain data in their `extra_kwargs` as metadata."""

from __future__ import annotations

import functools
import json
import logging
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tasks.samples import Sample

log = logging.getLogger(__name__)

_THEIRS = ("rewards", "advantage")
"""What their trainer itself leaves in a sample's `extra_kwargs`."""


def sample_of(theirs: Any) -> Sample:
    """Our sample of one of theirs: its group is the `unique_id`, its metadata is the plain data in `extra_kwargs`.

    `extra_kwargs["metadata"]` has the row of the data set as one JSON text (or a mapping). The columns of the row
    become keys of our metadata, and win over other keys of the same name.
    """
    return Sample(
        prompt=theirs.prompt or "",
        image=theirs.image,
        video=theirs.video,
        audio=getattr(theirs, "audio", None),
        condition_images=_listed(getattr(theirs, "condition_images", None)),
        condition_videos=_listed(getattr(theirs, "condition_videos", None)),
        group=theirs.unique_id,
        metadata=metadata_of(theirs.extra_kwargs),
        fps=_number(theirs, "frame_rate") or _number(theirs, "fps"),
        sample_rate=_number(theirs, "audio_sample_rate"),
    )


def _listed(values: Iterable[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def metadata_of(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data in their `extra_kwargs`, with the columns of the data set's row as keys."""
    row = _row_of(extra.get("metadata"))
    own = dict(extra)
    for key in _THEIRS:
        own.pop(key, None)
    found = _plain_of(own)
    if row is None:
        return found

    found.pop("metadata", None)
    columns = _plain_of({key: _without_numpy(value) for key, value in row.items()})
    for key in row.keys() - columns.keys():
        _warn_of_left_out(str(key), type(row[key]).__name__)
    return {**found, **columns}


def _plain_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain data among values by name; numpy's scalars as Python's."""
    found = {}
    for key, value in values.items():
        plain = value.item() if isinstance(value, np.generic) else value
        if isinstance(key, str) and _is_plain(plain):
            found[key] = plain
    return found


def _without_numpy(value: Any) -> Any:
    """A value of a row with its arrays as lists: a data set may give either."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _without_numpy(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_without_numpy, value))
    return value


@functools.cache
def _warn_of_left_out(key: str, kind: str) -> None:
    log.warning(
        "the data set's %r is a %s, which is not plain data: no reward is given it; make it text, numbers or lists",
        key, kind,
    )  # fmt: skip


def _row_of(metadata: Any) -> Mapping[str, Any] | None:
    """The row of the data set in what they call metadata; None if that is something else."""
    if isinstance(metadata, Mapping):
        return metadata
    if not isinstance(metadata, str):
        return None
    try:
        row = json.loads(metadata)
    except (ValueError, RecursionError):
        return None
    if row is None:  # a sample without a row
        return {}
    return row if isinstance(row, dict) else None


def _number(theirs: Any, name: str) -> float | None:
    """A number above 0 that one of their samples has as an attribute or in its `extra_kwargs`."""
    value = getattr(theirs, name, None)
    if value is None:
        value = theirs.extra_kwargs.get(name)
    if getattr(value, "ndim", None) == 0:  # a tensor or array of one number
        value = value.item()
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return value if is_number and 0 < value < math.inf else None  # type: ignore[return-value]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        has_text_keys = all(isinstance(key, str) for key in value)
        return has_text_keys and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
