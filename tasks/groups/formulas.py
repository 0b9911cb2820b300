"""How the outcomes of a group's parts become the outcome of the group: ranks, or shares of comparisons won."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from tasks.messages import Failure, GroupRequest, Outcome, SampleRequest

Ties = Literal["mean", "ordinal"]


def ranks(scores: Sequence[float], ties: Ties = "mean") -> list[float]:
    """Ascending ranks of `n` scores divided by `n`, in [0, (n - 1) / n].

    Args:
        scores: `n` finite numbers.
        ties: `mean` gives equal scores the mean of their ranks; `ordinal` ranks them in their order, as the double
            argsort of Flow-Factory's PickScore_Rank does.
    """
    values = np.asarray(scores, np.float64)
    if ties == "ordinal":
        order = np.argsort(values, kind="stable")
        found = np.argsort(order, kind="stable").astype(np.float64)
    else:
        num_less = (values[None, :] < values[:, None]).sum(1)
        num_equal = (values[None, :] == values[:, None]).sum(1)
        found = num_less + (num_equal - 1) / 2
    return [float(rank) / len(values) for rank in found]


def draw_pairs(
    group_digest: str, num_members: int, opponents: Literal["all"] | int
) -> list[tuple[int, int]]:
    """Which members are compared with each other: pairs `(i, j)`, `i < j`, each once, in order.

    Args:
        group_digest: Seeds the draw, so that a repeated task compares the same pairs.
        opponents: `all`, or how many others each member is compared with; one member meets one more where that does
            not come out even. The members are shuffled onto a circle and meet their nearest there, for an odd number
            also the one opposite, so that no part of the group is cut off from the rest.
    """
    if opponents == "all" or opponents >= num_members - 1:
        return [(i, j) for i in range(num_members) for j in range(i + 1, num_members)]

    seed = int(group_digest[:16], 16)
    circle = np.random.default_rng(seed).permutation(num_members).tolist()

    pairs: set[tuple[int, int]] = set()
    for first, second in _meetings(num_members, opponents):
        i, j = sorted((circle[first], circle[second]))
        pairs.add((i, j))
    return sorted(pairs)


def _meetings(num_members: int, opponents: int) -> Iterator[tuple[int, int]]:
    """Which positions on the circle meet: the nearest, for an odd number of opponents also the one opposite."""
    for step in range(1, opponents // 2 + 1):
        for position in range(num_members):
            yield position, (position + step) % num_members

    if opponents % 2:
        half = num_members // 2
        for position in range(num_members - half):
            yield position, position + half


def combine(request: GroupRequest, found: Mapping[str, Outcome]) -> Outcome:
    """The outcome of a group from the outcomes of its parts, `found` by address. Every part has one."""
    members = _wins(request, found) if request.how == "wins" else _ranks(request, found)
    return Outcome(
        members=tuple(members),
        attempt=request.attempt,
        shared_key=request.shared_key,
    )


def _ranks(request: GroupRequest, found: Mapping[str, Outcome]) -> list[Outcome]:
    """The members with a score are ranked among themselves; each other member has the reason why it has none."""
    outcomes: list[Outcome] = []
    for member in request.members:
        if member.failure is None:
            outcomes.append(found[member.address])
        else:
            outcomes.append(Outcome(failure=member.failure))

    scores = [one.reward for one in outcomes if one.reward is not None]
    following_rank = iter(ranks(scores, request.ties))
    members: list[Outcome] = []
    for one in outcomes:
        if one.reward is None:
            members.append(_not_ranked(one))
        else:
            members.append(_ranked(one, next(following_rank)))
    return members


def _ranked(outcome: Outcome, rank: float) -> Outcome:
    """The outcome of a member with a rank; its score is kept beside it."""
    info = {**outcome.info, "score": outcome.reward}
    return Outcome(reward=rank, info=info, origin=outcome.origin)


def _not_ranked(outcome: Outcome) -> Outcome:
    assert outcome.failure is not None
    failure = Failure(
        kind=outcome.failure.kind, message=f"not ranked: {outcome.failure.message}"
    )
    return Outcome(failure=failure, info=outcome.info, origin=outcome.origin)


def _wins(request: GroupRequest, found: Mapping[str, Outcome]) -> list[Outcome]:
    """The share of its comparisons that each member won, a tie counts half; a member without an answer abstains."""
    points: list[list[float]] = [[] for _ in request.members]
    unanswered: Outcome | None = None
    for (first, second), comparison in zip(
        request.pairs, request.comparisons, strict=True
    ):
        outcome = found[comparison.address]
        if outcome.reward is None:
            unanswered = unanswered or outcome
            continue
        points[first].append(outcome.reward)
        points[second].append(1.0 - outcome.reward)

    return [
        _share(member, won, unanswered)
        for member, won in zip(request.members, points, strict=True)
    ]


def _share(
    member: SampleRequest, won: Sequence[float], unanswered: Outcome | None
) -> Outcome:
    """A member's outcome; `unanswered` is the first comparison without an answer, whose worker says why."""
    if member.failure is not None:
        return Outcome(failure=member.failure)
    if won:
        info = {"num_comparisons": len(won), "points": sum(won)}
        return Outcome(reward=sum(won) / len(won), info=info)
    if unanswered is None or unanswered.failure is None:
        return Outcome(failure=_abstained("it was compared with nobody"))
    return Outcome(
        failure=_abstained(unanswered.failure.message), origin=unanswered.origin
    )


def _abstained(reason: str) -> Failure:
    return Failure(
        kind="abstained", message=f"none of its comparisons has an answer: {reason}"
    )
