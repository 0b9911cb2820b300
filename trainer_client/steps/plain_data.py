"""Plain copies of what a caller gives: texts, numbers, dicts and lists of Python's own types, which nobody else holds.

What is copied cannot change after `submit()`, and can always be packed, pickled and compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tasks import media

MAX_DEPTH = 64
"""Mappings and lists may be nested so deep."""

MAX_VALUES = 1_000_000
"""Of one sample's metadata. A list that is in a list many times over, and so on, has more values than bytes."""

_NUMPY_VALUES = (np.generic, np.ndarray)


class NotPlainError(ValueError):
    """A value has no plain copy.

    Args:
        problem: What is wrong with it.
        path: Where it is within what was to be copied, `['a'][1]`.
    """

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem, path)
        self.problem, self.path = problem, path


def value_of(given: Any) -> Any:
    """The value of a numpy scalar, or of an array or tensor without axes; whatever else is given is returned as it is.

    A tensor on a GPU is waited for.
    """
    is_array = isinstance(given, _NUMPY_VALUES) or media.is_tensor(given)
    if is_array and not np.ma.isMaskedArray(given) and tuple(given.shape) == ():
        return given.item()
    return given


def plain_copy(given: Any) -> Any:
    """A copy of nested mappings, lists and tuples with plain texts, numbers, booleans and None: dicts and lists.

    Raises:
        NotPlainError: Something in it is of another kind, is nested too deep, or cannot be encoded.
    """
    return _Copy().of(given)


def plain_text(given: str) -> str:
    """The text of a `str` or of an object of a subclass. Raises `NotPlainError` for a lone surrogate."""
    text = str.__str__(given)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise NotPlainError(
                f"is no valid Unicode: {error.reason} at {error.start}"
            ) from None
    return text


class _Copy:
    """One copy in the making."""

    def __init__(self) -> None:
        self._num_values = 0

    def of(self, given: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise NotPlainError(f"is nested more than {MAX_DEPTH} deep")
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise NotPlainError(f"has more than {MAX_VALUES} values")
        if isinstance(given, Mapping):
            return self._of_mapping(given, depth)
        if isinstance(given, list | tuple):
            return self._of_list(given, depth)
        return _plain_scalar(value_of(given))

    def _of_mapping(self, given: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        copied = {}
        for key, value in given.items():
            copied[_plain_key(key)] = self._of_item(value, key, depth)
        return copied

    def _of_list(self, given: Iterable[Any], depth: int) -> list[Any]:
        copied = []
        for i, value in enumerate(given):
            copied.append(self._of_item(value, i, depth))
        return copied

    def _of_item(self, value: Any, key: Any, depth: int) -> Any:
        try:
            return self.of(value, depth + 1)
        except NotPlainError as error:
            path = f"[{key!r}]{error.path}"
            raise NotPlainError(error.problem, path) from None


def _plain_key(key: Any) -> str:
    if not isinstance(key, str):
        raise NotPlainError(f"has the key {key!r}")
    try:
        return plain_text(key)
    except NotPlainError:
        raise NotPlainError(f"has the key {key!r} of no valid Unicode") from None


def _plain_scalar(value: Any) -> Any:
    if isinstance(value, str):
        return plain_text(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int.__int__(value)
        if not -(2**63) <= number < 2**64:
            raise NotPlainError("is an integer of more than 64 bits")
        return number
    if isinstance(value, float):
        return float.__float__(value)
    raise NotPlainError(f"is a {type(value).__name__}")
