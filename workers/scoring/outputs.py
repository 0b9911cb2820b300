"""Turns what a reward model returned or raised into outcomes: each is a finite reward or a reason, in plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from tasks import media
from tasks.errors import BusyError
from tasks.masking import SECRETS, masked
from tasks.messages import Failure, Outcome
from workers.base import Unscored
from workers.loading.tracebacks import words_of
from workers.texts import cut, encodable

MAX_MESSAGE_CHARS = 2000
"""A reason longer than this is cut; a model's traceback or a server's page is not a message."""

MAX_INFO_DEPTH = 16
"""Information that is nested deeper than this is replaced by its `repr`."""

MAX_INFO_BYTES = 2**20
"""What a model says beside one reward travels to the trainer and stays in Redis as long as the reward."""

LARGEST_REWARD = float(np.finfo(np.float32).max)
"""The trainer's arrays are float32."""

Scored = Outcome | BusyError
"""What became of a sample: an outcome, or an error that says that its model cannot be called now."""


def outcomes_of(output: Any, num_samples: int) -> list[Scored]:
    """Outcomes of what a model returned for `num_samples` samples.

    A tensor, an array or a list of `num_samples` finite numbers holds rewards. If the length or shape is another, all
    samples fail. A value that is not a finite number is recorded as a failure of its sample. A `BusyError` in a list
    is returned as it is.
    """
    rewards, extra = _read(output)
    values = _listed(rewards)
    if values is None or len(values) != num_samples:
        found = _shape_of(rewards) if values is None else str(len(values))
        message = f"the model returned {found} rewards for {num_samples} samples"
        reason = Failure(kind="failed", message=message)
        return [Outcome(failure=reason)] * num_samples

    outcomes: list[Scored] = []
    for i, value in enumerate(values):
        if isinstance(value, BusyError):
            outcomes.append(value)
        else:
            outcomes.append(_outcome(value, _info_of(extra, i, num_samples)))
    return outcomes


def outcome_of(error: BaseException, line: str = "") -> Outcome:
    """The reason in what a model raised, and the line of the user's code that raised it."""
    if isinstance(error, Unscored):
        return failed(error.message, error.kind, _bounded(_plain(error.info)))
    kind = "timeout" if isinstance(error, TimeoutError) else "failed"
    words = cut(words_of(error), MAX_MESSAGE_CHARS - len(line))
    return failed(words + line, kind)


def failed(
    message: str, kind: Any = "failed", info: Mapping[str, Any] | None = None
) -> Outcome:
    """A failure with this reason, in which no secret is shown."""
    failure = Failure(kind=kind, message=cut(masked(message), MAX_MESSAGE_CHARS))
    return Outcome(failure=failure, info=dict(info or {}))


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
    if shape is None:
        return f"a {type(rewards).__name__} of"
    return f"shape {tuple(shape)}"


def _outcome(value: Any, info: dict[str, Any]) -> Outcome:
    """The outcome of a value that stands for a reward."""
    if isinstance(value, Unscored):
        return outcome_of(value)
    array = _as_array(value)
    if array is not None:
        if array.size != 1:
            found = f"shape {array.shape}"
            return failed(_not_a_number(found), info=info)
        value = array.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return failed(_not_a_number(type(value).__name__), info=info)
    if not -LARGEST_REWARD <= value <= LARGEST_REWARD:
        is_finite = isinstance(value, int) or math.isfinite(value)
        why = ", more than float32 holds" if is_finite else ""
        return failed(f"the model returned {_short(value)}{why}", info=info)
    return Outcome(reward=float(value), info=info)


def _as_array(value: Any) -> np.ndarray[Any, Any] | None:
    """A tensor, an array or a number of numpy's as an array; None for anything else."""
    if media.is_tensor(value):
        return np.asarray(value.detach().cpu().tolist())
    if isinstance(value, np.generic | np.ndarray):
        return np.asarray(value)
    return None


def _not_a_number(found: str) -> str:
    return f"the model returned {found} where a number is needed"


def _info_of(extra: Any, i: int, num_samples: int) -> dict[str, Any]:
    """What `extra_info` says of sample `i`."""
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        return _bounded({"extra_info": _plain(extra)})
    info = {}
    for name, values in extra.items():
        info[encodable(name)] = _plain(_of_sample(values, i, num_samples))
    return _bounded(info)


def _bounded(info: dict[str, Any]) -> dict[str, Any]:
    """Information of a sample; of more than `MAX_INFO_BYTES` only how large it was, and what was in it."""
    num_bytes = len(msgpack.packb(info))
    if num_bytes <= MAX_INFO_BYTES:
        return info
    names = cut(", ".join(map(str, info)), MAX_MESSAGE_CHARS)
    return {
        "too_large": f"{num_bytes} bytes of information, at most {MAX_INFO_BYTES} are kept; it had {names}"
    }


def _of_sample(values: Any, i: int, num_samples: int) -> Any:
    """The value of sample `i` where there is one for each sample; else what is for all."""
    if isinstance(values, list | tuple):
        num_values = len(values)
    else:
        shape = getattr(values, "shape", None) or (-1,)
        num_values = shape[0]
    return values[i] if num_values == num_samples else values


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` as msgpack carries it."""
    if value is None or isinstance(value, bool | bytes):
        return value
    if isinstance(value, float):
        return float(value)  # of a subclass, such as numpy's
    if isinstance(value, str):
        return SECRETS.masked(encodable(value))  # a judge may repeat the key
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else _short(value)
    if depth < MAX_INFO_DEPTH:
        return _plain_container(value, depth + 1)
    return _short(value)


def _plain_container(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        plain = {}
        for name, one in value.items():
            plain[SECRETS.masked(encodable(name))] = _plain(one, depth)
        return plain
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one, depth) for one in value]
    if media.is_tensor(value) or isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist(), depth)
    return _short(value)


def _short(value: Any) -> str:
    try:
        return cut(repr(value), MAX_MESSAGE_CHARS)
    except Exception:  # a model's object is the user's code; an integer of thousands of digits raises too
        return f"a {type(value).__name__}"
