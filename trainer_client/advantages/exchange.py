"""What ranks send each other: plain data through one `gather`, and an error of one rank raised on all of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar

Gather = Callable[[Any], Sequence[Any]]
"""Takes this rank's object, returns the objects of all ranks in the same order on each rank.

The object is a list of plain data: text, numbers, bytes, lists, mappings by text, None.
"""


class RankData(Protocol):
    """What one rank contributes to an exchange."""

    def to_plain(self) -> list[Any]:
        """As it goes to other ranks."""

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> Self:
        """As it comes from other ranks."""


RankDataT = TypeVar("RankDataT", bound=RankData)


def exchange(
    data_type: type[RankDataT],
    make: Callable[[], RankDataT],
    gather: Gather | None,
) -> tuple[list[RankDataT], int]:
    """What `make` returns on each rank, and the index of this rank in it.

    `gather` and the errors are those of `exchange_plain`; without `gather` this rank is the only one.
    """
    if gather is None:
        return [make()], 0
    everyone, own_index = exchange_plain(lambda: make().to_plain(), gather)
    return [data_type.of_plain(plain) for plain in everyone], own_index


def exchange_plain(
    make: Callable[[], list[Any]], gather: Gather
) -> tuple[list[list[Any]], int]:
    """What `make` returns on each rank, and the index of this rank in it.

    `gather` is called exactly once, also where `make` raises: then all ranks raise. Were the error raised before
    `gather`, the other ranks would wait in theirs for a rank that has left.

    Raises:
        ValueError: `make` raised on a rank; names each such rank by its index, and why.
    """
    # `gather` does not say which of the objects is ours, so each rank marks its own.
    token = uuid.uuid4().hex
    made: list[Any] | None = None
    problem, cause = None, None
    try:
        made = make()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        problem, cause = _problem_text(error), error

    answers = list(gather([token, problem, made]))
    tokens = [answer[0] for answer in answers]
    if token not in tokens:
        raise ValueError(
            "gather returned no object of this rank; it must return those of all ranks"
        )

    problems = []
    for i, (_, problem_there, _) in enumerate(answers):
        if problem_there is not None:
            problems.append(f"rank {i} of those gathered: {problem_there}")
    if problems:
        raise ValueError("; ".join(problems)) from cause

    return [answer[2] for answer in answers], tokens.index(token)


def _problem_text(error: Exception) -> str:
    """The error as other ranks read it; a ValueError's text stands by itself."""
    if isinstance(error, ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}"
