"""The samples of all ranks as one table: groups as numbers, rewards as columns, NaN where a reward does not vote."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

Gather = Callable[[Any], Sequence[Any]]
"""Takes this rank's object, returns those of all ranks in the same order on each.

The object is a list of plain data: text, numbers, bytes, lists, mappings by text, None.
"""

LARGEST = float(np.finfo(np.float32).max)
"""Rewards travel as float32; what is beyond it counts as infinite."""

_WIRE_INTEGERS = range(-(2**63), 2**64)
"""Integers that msgpack carries; others travel as text."""


class Brought(Protocol):
    """What a rank brings to an exchange."""

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> Self:
        """As it comes from other ranks."""


Kind = TypeVar("Kind", bound=Brought)


@dataclass(frozen=True, slots=True)
class Columns:
    """What one rank brings; rewards with a weight of 0 are left out."""

    names: tuple[str, ...]
    """Of the `K` rewards, sorted."""
    weights: tuple[float, ...]
    groups: tuple[Hashable, ...]
    rewards: Floats
    """`(N, K)`."""

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""
        return [
            list(self.names),
            list(self.weights),
            plain_of_ids(self.groups),
            self.rewards.tobytes(),
        ]

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> Columns:
        """As it comes from other ranks."""
        names, weights, groups, rewards = plain
        values = floats_of(rewards).reshape(len(groups), len(names))
        return cls(tuple(names), tuple(weights), ids_of(groups), values)


@dataclass(frozen=True, slots=True)
class Table:
    """The samples of all ranks."""

    weights: tuple[float, ...]
    rewards: Floats
    """`(N, K)`."""
    groups: Ints
    """`(N,)`, in `range(num_groups)`."""
    num_groups: int
    mine: slice
    """Which samples are this rank's."""

    def __len__(self) -> int:
        return len(self.groups)

    def sum_in_groups(self, values: Any) -> Floats:
        """`(num_groups,)` sums of `(N,)` values."""
        return np.asarray(
            np.bincount(self.groups, weights=values, minlength=self.num_groups),
            dtype=np.float64,
        )


def tabulate(
    rewards: Mapping[str, Any],
    groups: Sequence[Hashable],
    weights: Mapping[str, float],
    valid: Mapping[str, Any] | None,
    gather: Gather | None,
) -> Table:
    """The samples of all ranks; arguments are those of `advantages.weighted_sum`."""
    everyone, mine = exchange(
        Columns, lambda: _columns(rewards, groups, weights, valid), gather
    )
    first = everyone[0]
    for columns in everyone:
        if (columns.names, columns.weights) != (first.names, first.weights):
            raise ValueError(
                "ranks must have the same rewards and weights, found "
                f"{dict(zip(first.names, first.weights, strict=True))} and "
                f"{dict(zip(columns.names, columns.weights, strict=True))}"
            )
    group_numbers, num_groups = number(
        group for columns in everyone for group in columns.groups
    )
    start = sum(len(columns.groups) for columns in everyone[:mine])
    return Table(
        weights=first.weights,
        rewards=np.concatenate([columns.rewards for columns in everyone]),
        groups=group_numbers,
        num_groups=num_groups,
        mine=slice(start, start + len(everyone[mine].groups)),
    )


def exchange(
    kind: type[Kind], make: Callable[[], Kind], gather: Gather | None
) -> tuple[list[Kind], int]:
    """What `make` gives on each rank, and which is ours; `gather` and errors are those of `exchange_plain`."""
    if gather is None:
        return [make()], 0
    plain, mine = exchange_plain(lambda: make().to_plain(), gather)
    return [kind.of_plain(one) for one in plain], mine


def exchange_plain(
    make: Callable[[], list[Any]], gather: Gather
) -> tuple[list[list[Any]], int]:
    """What `make` gives on each rank, and which is ours.

    `gather` is called exactly once, also where `make` raises: then all ranks raise, and none waits for one that has
    left.

    Raises:
        ValueError: `make` raised on a rank; names each, and why.
    """
    token = uuid.uuid4().hex
    made: list[Any] | None = None
    problem, cause = None, None
    try:
        made = make()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        problem = (
            str(error)
            if isinstance(error, ValueError)
            else f"{type(error).__name__}: {error}"
        )
        cause = error
    answers = list(gather([token, problem, made]))
    tokens = [answer[0] for answer in answers]
    if token not in tokens:
        raise ValueError(
            "gather must return the objects of all ranks, this one's among them"
        )
    problems = [
        f"rank {i} of those gathered: {answer[1]}"
        for i, answer in enumerate(answers)
        if answer[1] is not None
    ]
    if problems:
        raise ValueError("; ".join(problems)) from cause
    return [answer[2] for answer in answers], tokens.index(token)


def number(groups: Any) -> tuple[Ints, int]:
    """Group ids as numbers from 0 in order of first sight, and how many there are."""
    numbers: dict[Hashable, int] = {}
    return np.array(
        [numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp
    ), len(numbers)


def ids(groups: Any) -> tuple[Hashable, ...]:
    """Group ids as plain objects; those in arrays or tensors, and numpy's numbers, by value.

    Raises:
        ValueError: One is not hashable; says where.
    """
    listed = groups.tolist() if hasattr(groups, "tolist") else groups
    found = tuple(
        one.item() if isinstance(one, np.generic) or hasattr(one, "detach") else one
        for one in listed
    )
    for i, group in enumerate(found):
        try:
            hash(group)
        except TypeError:
            raise ValueError(
                f"group ids must be hashable, found a {type(group).__name__} at {i}"
            ) from None
    return found


def plain_of_ids(groups: Iterable[Hashable]) -> list[Any]:
    """Group ids as plain data, of which `ids_of` makes equal ids on another rank.

    Raises:
        ValueError: One is of a type of which that is not known; says where.
    """
    plain = []
    for i, group in enumerate(groups):
        try:
            plain.append(_plain_of_id(group))
        except TypeError as error:
            raise ValueError(
                "group ids that several ranks compare must be text, bytes, integers, floats, None, or tuples and "
                f"frozensets of these; found a {error} at {i}"
            ) from None
    return plain


def ids_of(plain: Iterable[Any]) -> tuple[Hashable, ...]:
    """Group ids as they come from other ranks."""
    return tuple(_id_of(one) for one in plain)


def floats_of(data: bytes) -> Floats:
    """Float64 values of their bytes."""
    return np.frombuffer(data, dtype=np.float64)


def to_float64(values: Any) -> Floats:
    """An array, a tensor on any device or a list (None becomes NaN) as float64."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _columns(
    rewards: Mapping[str, Any],
    groups: Sequence[Hashable],
    weights: Mapping[str, float],
    valid: Mapping[str, Any] | None,
) -> Columns:
    group_ids = ids(groups)
    counting = _check_weights(rewards, weights)
    unknown = sorted(set(valid or ()) - set(rewards))
    if unknown:
        raise ValueError(
            f"valid has {', '.join(unknown)}, rewards are {', '.join(sorted(rewards))}"
        )
    columns = np.full((len(group_ids), len(counting)), np.nan)
    for k, name in enumerate(counting):
        columns[:, k] = _votes(
            name, rewards[name], (valid or {}).get(name), len(group_ids)
        )
    return Columns(tuple(counting), tuple(counting.values()), group_ids, columns)


def _check_weights(
    rewards: Mapping[str, Any], weights: Mapping[str, float]
) -> dict[str, float]:
    """The weights that count (other than 0), sorted by name."""
    if set(rewards) != set(weights):
        raise ValueError(
            f"each reward needs its weight: rewards are {', '.join(sorted(rewards)) or 'none'}, "
            f"weights are for {', '.join(sorted(weights)) or 'none'}"
        )
    for name, weight in weights.items():
        if not abs(weight) <= LARGEST:
            raise ValueError(
                f"the weight of {name!r} must be a finite number, found {weight}"
            )
    return {
        name: float(weights[name]) for name in sorted(weights) if weights[name] != 0
    }


def _votes(name: str, values: Any, valid: Any, num_samples: int) -> Floats:
    """One reward as `(N,)`, NaN where it does not vote."""
    column = to_float64(values)
    if column.shape != (num_samples,):
        raise ValueError(
            f"the reward {name!r} must have the shape ({num_samples},), found {column.shape}"
        )
    votes = np.abs(column) <= LARGEST  # False for NaN
    if valid is not None:
        mask = np.asarray(valid.detach().cpu() if hasattr(valid, "detach") else valid)
        if mask.shape != column.shape or (mask.size and mask.dtype != np.bool_):
            raise ValueError(
                f"valid[{name!r}] must be bool ({num_samples},), found {mask.dtype} {mask.shape}"
            )
        votes &= mask.astype(bool)
    return np.where(votes, column, np.nan)


def _plain_of_id(one: Any) -> Any:
    """A scalar as it is; what msgpack has no type for as `[tag, ...]`. Raises TypeError with the name of its type."""
    if isinstance(one, np.generic):
        one = one.item()
    if one is None or isinstance(one, bool | bytes):
        return one
    if isinstance(one, int):
        return int(one) if one in _WIRE_INTEGERS else ["integer", hex(one)]
    if isinstance(one, float):
        return float(one)
    if isinstance(one, str):
        text = str.__str__(one)
        try:
            text.encode()
        except UnicodeEncodeError:
            return ["text", text.encode(errors="surrogatepass")]
        return text
    if isinstance(one, tuple):
        return ["tuple", *map(_plain_of_id, one)]
    if isinstance(one, frozenset):
        return ["frozenset", *map(_plain_of_id, one)]
    raise TypeError(type(one).__name__)


def _id_of(plain: Any) -> Hashable:
    if not isinstance(plain, list | tuple):
        one: Hashable = plain
        return one
    tag, *rest = plain
    if tag == "integer":
        return int(rest[0], 16)
    if tag == "text":
        return bytes(rest[0]).decode(errors="surrogatepass")
    return (tuple if tag == "tuple" else frozenset)(map(_id_of, rest))
