"""Group ids: any hashable object on one rank; between ranks, plain data that makes equal ids on each of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from trainer_client.advantages.arrays import Ints

_WIRE_INTEGERS = range(-(2**63), 2**64)
"""Integers that msgpack carries; others travel as text."""


def hashable_ids(groups: Any) -> tuple[Hashable, ...]:
    """The ids in a list, an array or a tensor as plain objects; numpy's scalars and tensors without axes by value.

    Raises:
        ValueError: An id is not hashable; says at which index.
    """
    listed = groups.tolist() if hasattr(groups, "tolist") else groups
    found = []
    for i, group in enumerate(listed):
        is_scalar = isinstance(group, np.generic) or hasattr(group, "detach")
        group_id = group.item() if is_scalar else group
        try:
            hash(group_id)
        except TypeError:
            raise ValueError(
                f"group ids must be hashable, found a {type(group_id).__name__} at {i}"
            ) from None
        found.append(group_id)
    return tuple(found)


def number_groups(ids: Iterable[Hashable]) -> tuple[Ints, int]:
    """Each id as the number of its group, from 0 in order of first sight; and how many groups there are."""
    numbers: dict[Hashable, int] = {}
    numbered = [numbers.setdefault(group_id, len(numbers)) for group_id in ids]
    return np.array(numbered, dtype=np.intp), len(numbers)


def ids_to_plain(ids: Iterable[Hashable]) -> list[Any]:
    """Ids as plain data, of which `ids_of_plain` makes equal ids on another rank.

    Raises:
        ValueError: An id has a type whose equality does not survive the way to another rank; says at which index.
    """
    plain = []
    for i, group_id in enumerate(ids):
        try:
            plain.append(_to_plain(group_id))
        except TypeError as error:
            raise ValueError(
                "group ids that several ranks compare must be text, bytes, integers, floats, None, or tuples and "
                f"frozensets of these; found a {error} at {i}"
            ) from None
    return plain


def ids_of_plain(plain: Iterable[Any]) -> tuple[Hashable, ...]:
    """Ids as another rank has sent them."""
    return tuple(map(_of_plain, plain))


def _to_plain(group_id: Any) -> Any:
    """A scalar as it is; what msgpack has no type for as `[tag, ...]`. Raises TypeError with the name of its type."""
    if isinstance(group_id, np.generic):
        group_id = group_id.item()

    match group_id:
        case None | bool() | bytes():
            return group_id
        case int():
            is_carried = group_id in _WIRE_INTEGERS
            return int(group_id) if is_carried else ["integer", hex(group_id)]
        case float():
            return float(group_id)
        case str():
            return _text_to_plain(str.__str__(group_id))
        case tuple():
            return ["tuple", *map(_to_plain, group_id)]
        case frozenset():
            return ["frozenset", *map(_to_plain, group_id)]
    raise TypeError(type(group_id).__name__)


def _text_to_plain(text: str) -> Any:
    """Text as it is; with a lone surrogate, which msgpack refuses, as bytes under a tag."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return ["text", text.encode(errors="surrogatepass")]
    return text


def _of_plain(plain: Any) -> Hashable:
    if not isinstance(plain, list | tuple):
        scalar: Hashable = plain
        return scalar

    tag, *rest = plain
    if tag == "integer":
        return int(rest[0], 16)
    if tag == "text":
        return bytes(rest[0]).decode(errors="surrogatepass")
    collection = tuple if tag == "tuple" else frozenset
    return collection(map(_of_plain, rest))
