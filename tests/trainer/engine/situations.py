"""Samples that have come so far and no further: each function makes an engine, and leaves a sample of it there."""

from __future__ import annotations

from tests.trainer.engine.by_hand import (
    BOTH,
    HELD,
    POINT,
    RANKED,
    SINGLE,
    EngineByHand,
)
from trainer_client.engine import actions as do
from trainer_client.engine.model import Awaited, Slot
from trainer_client.engine.states import State

Transition = tuple[State | None, State]


class Recorded(EngineByHand):
    """Knows which transitions were made."""

    def __init__(self, *rewards, is_shared=False):
        super().__init__(rewards, is_shared=is_shared)
        self.moved: dict[Awaited, None] = {}
        self.transitions: set[Transition] = set()
        self.slots: list[Slot] = []
        core = self.state.core
        move = core.move

        def record(awaited, state):
            self.moved[awaited] = None
            self.transitions.add((awaited.state, state))
            move(awaited, state)

        core.move = record

    def submit(self, *args, **kwargs):
        slot = super().submit(*args, **kwargs)
        self.slots.append(slot)
        return slot

    def all_transitions(self) -> set[Transition]:
        """Also those of outcomes that were made in the state in which they are."""
        made_as_they_are = set()
        for slot in self.slots:
            made_as_they_are |= {(None, a.state) for a in slot.awaited.values() if a not in self.moved}
        return self.transitions | made_as_they_are


def looking_up(*rewards):
    engine = Recorded(*(rewards or (POINT,)))
    slot = engine.submit(1)
    engine.run(but=[do.LookUp])
    return engine, slot


def storing(*rewards):
    engine = Recorded(*(rewards or (POINT,)))
    slot = engine.submit(1)
    engine.run(but=[do.Store])
    return engine, slot


def with_group():
    engine = Recorded(*BOTH)
    slot = engine.submit(1, "g", size=2)
    engine.run()
    return engine, slot


def held():
    engine = Recorded(HELD)
    slot = engine.submit(1)
    engine.run()
    return engine, slot


def lingering():
    engine = Recorded(POINT)
    slot = engine.submit(1)
    engine.run()
    return engine, slot


def publishing():
    engine = Recorded(*SINGLE)
    slot = engine.submit(1)
    engine.run(but=[do.Publish])
    return engine, slot


def in_flight():
    engine = Recorded(*SINGLE)
    slot = engine.submit(1)
    engine.run()
    return engine, slot


def group_in_flight():
    """Two samples whose group's message carries their own outcomes."""
    engine = Recorded(*BOTH)
    slot = engine.submit(1, "g", size=2)
    engine.submit(2, "g", size=2)
    engine.wait(1.0)
    return engine, slot


def throttled():
    engine, slot = in_flight()
    engine.note(slot, "busy")
    return engine, slot


def restoring():
    engine, slot = in_flight()
    engine.note(slot, "gone")
    return engine, slot


def group_looking_up(*rewards, is_shared=False):
    engine = Recorded(*(rewards or (RANKED,)), is_shared=is_shared)
    engine.submit(1, "g", size=2)
    slot = engine.submit(2, "g", size=2)
    engine.run(but=[do.LookUpGroup])
    return engine, slot
