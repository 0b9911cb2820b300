"""The states of an awaited outcome, and the one table of how it goes from one to the next.

Two more enums are beside it: how far a submitted sample is, and where a payload is. Nothing else in the engine says
by an empty field or a special number what something waits for.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """What an awaited outcome waits for."""

    # Members are hashed with each transition; the hash of `Enum` runs in Python.
    __hash__ = object.__hash__

    LOOKING_UP = "looking up"
    """Redis is being asked whether the outcome is there already. In `Lookups`, or in the `LookUp` under way."""
    STORING = "storing"
    """Its media wait for room in the payload store, or are on their way there. Among the users of its payloads."""
    WITH_GROUP = "with its group"
    """A ranked group's message will carry it. In `carried` of a member of that group, or of the group's outcome."""
    HELD = "held"
    """`async_reward: false`: until somebody collects its step. In the accumulator."""
    LINGERING = "lingering"
    """Until its chunk is full, or nothing more comes. In the accumulator."""
    PUBLISHING = "publishing"
    """Its request and its message are on their way into Redis. In a delivery."""
    IN_FLIGHT = "in flight"
    """Its message was sent; a worker is to answer. In a delivery."""
    THROTTLED = "throttled"
    """A judge had no permit left: part of its message waits to be sent again. In a delivery."""
    RESTORING = "restoring"
    """Its message was lost; what is gone of its media is being stored again. In the `Restore` under way."""
    ANSWERED = "answered"
    """It has its outcome. In its slots only."""
    GIVEN_UP = "given up"
    """Nobody wants it any more. Nowhere."""


S = State

TRANSITIONS: dict[State | None, frozenset[State]] = {
    # A sample was encoded, or a group sealed, whose outcome nobody here awaits yet; of an
    # earlier process's ticket what was sent is in flight at once.
    None: frozenset({S.LOOKING_UP, S.IN_FLIGHT, S.ANSWERED}),
    # No outcome is there, or a failure that may be tried again. A group has its media stored:
    # its members had to, before it could be sealed. What another rank has sent is in flight.
    S.LOOKING_UP: frozenset(
        {S.STORING, S.HELD, S.LINGERING, S.IN_FLIGHT, S.ANSWERED, S.GIVEN_UP}
    ),
    # All its payloads are stored.
    S.STORING: frozenset({S.WITH_GROUP, S.HELD, S.LINGERING, S.ANSWERED, S.GIVEN_UP}),
    # Its group goes; or the group does not get full, while somebody waits.
    S.WITH_GROUP: frozenset({S.PUBLISHING, S.LINGERING, S.ANSWERED, S.GIVEN_UP}),
    S.HELD: frozenset({S.PUBLISHING, S.ANSWERED, S.GIVEN_UP}),
    S.LINGERING: frozenset({S.PUBLISHING, S.ANSWERED, S.GIVEN_UP}),
    # A worker may answer before the publisher has heard that the message went.
    S.PUBLISHING: frozenset({S.IN_FLIGHT, S.ANSWERED, S.GIVEN_UP}),
    # Lost: neither answered, claimed nor queued. What goes with a group waits for it again.
    S.IN_FLIGHT: frozenset(
        {S.THROTTLED, S.RESTORING, S.WITH_GROUP, S.ANSWERED, S.GIVEN_UP}
    ),
    S.THROTTLED: frozenset(
        {S.IN_FLIGHT, S.RESTORING, S.WITH_GROUP, S.ANSWERED, S.GIVEN_UP}
    ),
    # Its media are there (again): it is sent once more, in a new message.
    S.RESTORING: frozenset({S.HELD, S.LINGERING, S.ANSWERED, S.GIVEN_UP}),
    S.ANSWERED: frozenset(),
    S.GIVEN_UP: frozenset(),
}
"""From each state, those that may follow."""

ENDED = frozenset({State.ANSWERED, State.GIVEN_UP})

IN_DELIVERY = frozenset({State.PUBLISHING, State.IN_FLIGHT, State.THROTTLED})
"""Those in which a delivery has it."""


class SlotStage(Enum):
    """How far a submitted sample is on its way out."""

    QUEUED = "queued"
    """It waits for an encoder."""
    ENCODING = "encoding"
    LOOKING_UP = "looking up"
    """It is encoded; its outcomes may be there."""
    STORING = "storing"
    """Its media are on their way into the store: they must not be changed."""
    SETTLED = "settled"
    """Everything of it is stored, and in its groups. Its outcomes may still be awaited."""


class PayloadStage(Enum):
    """Where the bytes of a payload are."""

    WAITING = "waiting for room"
    STORING = "storing"
    STORED = "stored"


class SentBy(Enum):
    """Whose message a delivery is; says what can be done if it is lost."""

    US = "us"
    """This process, which can send it again, with its media."""
    OTHER_RANK = "another rank"
    """Of a group that another rank completed. This rank can send the group too."""
    EARLIER_PROCESS = "an earlier process"
    """Its ticket was resumed. The message can be sent again as it was, while its request is in the store."""
    OTHER_RANK_EARLIER = "another rank, for an earlier process"
    """Only watched: this process has neither the media nor the request."""
