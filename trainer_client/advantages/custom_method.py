"""An advantage method of the user: what it is called with, and how its error on one rank is raised on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer_client.advantages.arrays import to_float64
from trainer_client.advantages.exchange import Gather, exchange_plain
from trainer_client.results import RewardBatch


class Aggregation(Protocol):
    """A method of the user: called as `weighted_sum` and `gdpo` are, returns `(N,)` finite numbers."""

    def __call__(
        self,
        rewards: Mapping[str, Any],
        groups: Sequence[Hashable],
        weights: Mapping[str, float],
        *,
        gather: Gather | None = None,
    ) -> Any:
        """The advantages of this rank's samples."""


def apply_custom(
    method: Aggregation,
    batch: RewardBatch,
    weights: Mapping[str, float],
    gather: Gather | None,
) -> npt.NDArray[np.float32]:
    """The advantages of a batch by a method of the user; errors are those of `formulas.advantages_of`."""
    if gather is None:
        values = method(batch.rewards, batch.groups, weights, gather=None)
        return _checked(method, values, len(batch))

    own_gather = _MethodGather(gather)
    found, failed = np.zeros(0, np.float32), None
    try:
        values = method(batch.rewards, batch.groups, weights, gather=own_gather)
        found = _checked(method, values, len(batch))
    except Exception as error:  # a user's function may raise anything, and the other ranks must hear of it
        failed = error
    own_gather.end(failed)
    return found


def _checked(
    method: Aggregation, values: Any, num_samples: int
) -> npt.NDArray[np.float32]:
    found = to_float64(values).astype(np.float32)
    if found.shape != (num_samples,):
        raise ValueError(
            f"{method!r} must return ({num_samples},) advantages, found the shape {found.shape}"
        )
    num_unfit = int((~np.isfinite(found)).sum())
    if num_unfit:
        raise ValueError(
            f"{method!r} returned {num_unfit} advantages that are NaN or infinite"
        )
    return found


class _MethodGather:
    """The `gather` that a method of the user is given.

    A method may gather any number of times, and may raise on one rank while the others gather. So ranks tell each
    other in each round whether their call of the method has ended. The first round in which a call has ended is the
    last round for all ranks: either all calls have ended well in it, or all ranks raise.
    """

    def __init__(self, gather: Gather) -> None:
        self._gather = gather
        self._error: Exception | None = None
        """Raised by a round, which was then the last."""

    def __call__(self, mine: Any) -> list[Any]:
        """What the method gathers."""
        return self._round(lambda: [False, mine])

    def end(self, failed: Exception | None) -> None:
        """The method has returned, or raised `failed`.

        Raises:
            ValueError: The method failed on a rank, or called `gather` more often on one rank than on another; on all
                ranks.
        """
        if self._error is not None:
            raise self._error

        def last_words() -> list[Any]:
            if failed is not None:
                raise failed
            return [True, None]

        self._round(last_words)

    def _round(self, make: Callable[[], list[Any]]) -> list[Any]:
        try:
            answers, _ = exchange_plain(make, self._gather)
            ends = {bool(has_ended) for has_ended, _ in answers}
            if len(ends) > 1:
                raise ValueError(
                    "an advantage method must call gather equally often on all ranks"
                )
        except Exception as error:  # to be raised again even if the method catches it
            self._error = error
            raise
        return [gathered for _, gathered in answers]
