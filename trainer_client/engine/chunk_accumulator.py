"""Batching: outcomes that wait until their chunk is full, or until nothing more comes for it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from trainer_client.engine.model import NEVER, Awaited, StepKey
from trainer_client.engine.states import State

LINGER_S = 0.2
"""A chunk that is not full goes after this long without a new sample. (Kafka's linger counts from the first sample: at
the pace of a diffusion sampler that would send chunks of one or two.)"""


@dataclass(slots=True)
class _Batch:
    is_held: bool
    size: int
    last_added: float = 0.0
    awaited: dict[Awaited, None] = field(default_factory=dict)


class Accumulator:
    """Fills chunks: one batch for each reward of each step, a group by itself."""

    def __init__(self) -> None:
        self._batches: dict[tuple[Any, ...], _Batch] = {}
        self._key_of: dict[Awaited, tuple[Any, ...]] = {}

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, awaited: Awaited) -> bool:
        return awaited in self._key_of

    def add(self, awaited: Awaited, now: float) -> State:
        """Take up an outcome whose media are stored; returns the state that it waits in."""
        slot, spec = awaited.slots[0], awaited.spec
        by_itself = awaited if awaited.group is not None else None
        is_held = not spec.async_reward
        key = (spec.fingerprint, slot.split, slot.step, by_itself, is_held)
        batch = self._batches.get(key)
        if batch is None:
            size = 1 if awaited.group is not None else spec.batch_size
            batch = self._batches[key] = _Batch(is_held, size)
        batch.awaited[awaited] = None
        batch.last_added = now
        self._key_of[awaited] = key
        return State.HELD if is_held else State.LINGERING

    def discard(self, awaited: Awaited) -> None:
        """Forget an outcome that is there, or that nobody wants any more."""
        key = self._key_of.pop(awaited, None)
        if key is None:
            return
        batch = self._batches[key]
        del batch.awaited[awaited]
        if not batch.awaited:
            del self._batches[key]

    def take(
        self, now: float, released: Set[StepKey], *, is_flushing: bool
    ) -> list[list[Awaited]]:
        """The chunks that go now; their outcomes are out of here.

        Args:
            released: Steps that somebody collects: what `async_reward: false` holds of them goes.
            is_flushing: Somebody waits, and nothing is on its way here that could still fill a chunk.
        """
        chunks: list[list[Awaited]] = []
        for batch in list(self._batches.values()):
            has_lingered = now >= batch.last_added + LINGER_S
            may_be_small = is_flushing or has_lingered
            if len(batch.awaited) < batch.size and not may_be_small:
                continue
            due = self._due(batch, released)
            while len(due) >= batch.size or (due and may_be_small):
                chunks.append(due[: batch.size])
                due = due[batch.size :]
        for chunk in chunks:
            for awaited in chunk:
                self.discard(awaited)
        return chunks

    def wake_at(self, released: Set[StepKey]) -> float:
        """When the next chunk has lingered for long enough."""
        times = [
            batch.last_added + LINGER_S
            for batch in self._batches.values()
            if not batch.is_held or self._due(batch, released)
        ]
        return min(times, default=NEVER)

    @staticmethod
    def _due(batch: _Batch, released: Set[StepKey]) -> list[Awaited]:
        if not batch.is_held:
            return list(batch.awaited)
        if not released:
            return []
        return [a for a in batch.awaited if _is_released(a, released)]


def _is_released(awaited: Awaited, released: Set[StepKey]) -> bool:
    return any(slot.step_key in released for slot in awaited.slots)
