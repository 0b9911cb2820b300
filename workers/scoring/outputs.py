"""What a reward model returned or raised, as outcomes: a finite reward or a reason, never between, in plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tasks import media
from tasks.errors import BusyError
from tasks.messages import Failure, Outcome
from workers.base import Unscored
from workers.loading.tracebacks import words_of

MAX_MESSAGE_CHARS = 2000
"""A reason longer than this is cut; a model's traceback or a server's page is not a message."""

MAX_INFO_DEPTH = 16
"""Information nested deeper than this is cut to its `repr`."""

LARGEST_REWARD = float(np.finfo(np.float32).max)
"""The trainer's arrays are float32."""

Scored = Outcome | BusyError
"""What became of a sample: an outcome, or that its model cannot be asked now."""


def outcomes_of(output: Any, num_samples: int) -> list[Scored]:
    """Outcomes of what a model returned for `num_samples` samples.

    A tensor, an array or a list of `num_samples` finite numbers are rewards. Any other length or shape is a reason for
    all, a NaN, an infinity, None or no number a reason for its sample. A `BusyError` in a list stays what it is.
    """
    rewards, extra = _read(output)
    values = _listed(rewards)
    if values is None or len(values) != num_samples:
        found = f"{len(values)}" if values is not None else _shape_of(rewards)
        reason = Failure(
            kind="failed",
            message=f"the model returned {found} rewards for {num_samples} samples",
        )
        return [Outcome(failure=reason)] * num_samples
    return [
        v if isinstance(v, BusyError) else _outcome(v, _info_of(extra, i, num_samples))
        for i, v in enumerate(values)
    ]


def outcome_of(error: BaseException, place: str = "") -> Outcome:
    """The reason in what a model raised, and where in the user's code it did."""
    if isinstance(error, Unscored):
        return Outcome(
            failure=Failure(kind=error.kind, message=cut(error.message)),
            info=_plain(error.info),
        )
    kind = "timeout" if isinstance(error, TimeoutError) else "failed"
    return failed(
        cut(words_of(error), MAX_MESSAGE_CHARS - 200 - len(place)) + place, kind
    )


def failed(
    message: str, kind: Any = "failed", info: Mapping[str, Any] | None = None
) -> Outcome:
    """A failure with this reason."""
    return Outcome(
        failure=Failure(kind=kind, message=cut(message)), info=dict(info or {})
    )


def cut(text: str, most: int = MAX_MESSAGE_CHARS) -> str:
    """Text that can be encoded, of so many characters at most."""
    text = _text(text)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _read(output: Any) -> tuple[Any, Any]:
    """Rewards and information of an output, ours or another library's: by its attributes, as Flow-Factory does."""
    if hasattr(output, "rewards"):
        return output.rewards, getattr(output, "extra_info", None)
    return output, None


def _listed(rewards: Any) -> list[Any] | None:
    """Rewards as a list, or None if they are not one-dimensional."""
    if media.is_tensor(rewards):
        return list(rewards.detach().cpu().tolist()) if rewards.ndim == 1 else None
    if isinstance(rewards, np.ndarray):
        return rewards.tolist() if rewards.ndim == 1 else None
    return list(rewards) if isinstance(rewards, list | tuple) else None


def _shape_of(rewards: Any) -> str:
    shape = getattr(rewards, "shape", None)
    return (
        f"shape {tuple(shape)}"
        if shape is not None
        else f"a {type(rewards).__name__} of"
    )


def _outcome(value: Any, info: dict[str, Any]) -> Outcome:
    if isinstance(value, Unscored):
        return outcome_of(value)
    if media.is_tensor(value) or isinstance(value, np.generic | np.ndarray):
        found = (
            np.asarray(value.detach().cpu().tolist())
            if media.is_tensor(value)
            else np.asarray(value)
        )
        if found.size != 1:
            return failed(
                f"the model returned shape {found.shape} where a number is needed",
                info=info,
            )
        value = found.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return failed(
            f"the model returned {type(value).__name__} where a number is needed",
            info=info,
        )
    if not -LARGEST_REWARD <= value <= LARGEST_REWARD:
        words = (
            ""
            if isinstance(value, float) and not math.isfinite(value)
            else ", more than float32 holds"
        )
        return failed(f"the model returned {_short(value)}{words}", info=info)
    return Outcome(reward=float(value), info=info)


def _info_of(extra: Any, i: int, num_samples: int) -> dict[str, Any]:
    """What `extra_info` says of sample `i`."""
    if not isinstance(extra, Mapping):
        return {} if extra is None else {"extra_info": _plain(extra)}
    return {
        _text(name): _plain(_of_sample(values, i, num_samples))
        for name, values in extra.items()
    }


def _of_sample(values: Any, i: int, num_samples: int) -> Any:
    """The value of sample `i` where there is one for each."""
    num_values = (
        len(values)
        if isinstance(values, list | tuple)
        else (getattr(values, "shape", None) or (-1,))[0]
    )
    return values[i] if num_values == num_samples else values


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` as msgpack carries it."""
    if value is None or isinstance(value, bool | bytes | float):
        return float(value) if isinstance(value, float) else value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else _short(value)
    if depth < MAX_INFO_DEPTH:
        if isinstance(value, Mapping):
            return {_text(k): _plain(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [_plain(v, depth + 1) for v in value]
        if media.is_tensor(value) or isinstance(value, np.generic | np.ndarray):
            return _plain(value.tolist(), depth + 1)
    return _short(value)


def _text(value: Any) -> str:
    """Text that can be encoded; lone surrogates are replaced."""
    return str(value).encode("utf-8", "replace").decode()


def _short(value: Any) -> str:
    try:
        return cut(repr(value))
    except Exception:  # a model's object is the user's code; an integer of thousands of digits raises too
        return f"a {type(value).__name__}"
