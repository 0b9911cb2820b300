"""Ids of groups: values that are equal on every rank, and in a pickled ticket, to what they were at `submit()`."""

from __future__ import annotations

import pickle
from typing import Any

from tasks.errors import InvalidSampleError
from trainer_client.steps.plain_data import NotPlainError, plain_text, value_of

_NEEDS = "a number, a text, or a tuple of them"


def plain_id(group: Any, where: str) -> Any:
    """The id of a group as a value: that of a numpy scalar or of a tensor without axes is its number.

    Args:
        group: None stands for no id.
        where: Begins the error's text.

    Raises:
        InvalidSampleError: The id does not equal itself (NaN), equals nothing but the very object (`object()`, a tensor
            with axes), or cannot be pickled. Such an id would put each sample into a group of its own.
    """
    group = value_of(group)
    if group is None or type(group) in (int, bool):
        return group
    if isinstance(group, str):
        return _text(group, where)
    if isinstance(group, int):
        return int.__int__(group)
    if isinstance(group, tuple):
        return tuple(plain_id(one, where) for one in group)
    if isinstance(group, frozenset):
        return frozenset(plain_id(one, where) for one in group)
    _check_is_value(group, where)
    return float.__float__(group) if isinstance(group, float) else group


def _text(group: str, where: str) -> str:
    try:
        return plain_text(group)
    except NotPlainError as error:
        raise InvalidSampleError(f"{where}: group {error.problem}") from None


def _check_is_value(group: Any, where: str) -> None:
    """Raise `InvalidSampleError` unless an id equals itself, and its pickled copy."""
    kind = type(group).__name__
    _check_hash(group, where)
    if group != group:
        raise InvalidSampleError(
            f"{where}: group is NaN, which equals nothing; None groups by the prompt"
        )
    try:
        copy = pickle.loads(pickle.dumps(group))
    except Exception as error:
        # Whatever classes of the user's raise while they are pickled.
        raise InvalidSampleError(
            f"{where}: group must be {_NEEDS}, found a {kind}, which cannot be pickled with its ticket: {error}"
        ) from None
    if copy != group or hash(copy) != hash(group):
        raise InvalidSampleError(
            f"{where}: group must be {_NEEDS}, found a {kind} that does not equal its pickled copy"
        )


def _check_hash(group: Any, where: str) -> None:
    """Raise `InvalidSampleError` for an id that no dict takes, or that equals nothing but the very object."""
    kind = type(group)
    what = f"{where}: group must be {_NEEDS}, found a {kind.__name__}"
    if kind.__module__.partition(".")[0] in ("torch", "numpy"):
        axes = tuple(getattr(group, "shape", ()))
        raise InvalidSampleError(
            f"{what} of shape {axes}; give the number of the sample's own group: group=ids[i]"
        )
    has_identity_hash: bool = vars(object)["__hash__"] is kind.__hash__
    if has_identity_hash:
        raise InvalidSampleError(
            f"{what}, which equals nothing but this very object: no other rank and no pickled ticket could name it"
        )
    try:
        hash(group)
    except TypeError:
        raise InvalidSampleError(f"{what}, which is not hashable") from None
