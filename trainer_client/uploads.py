"""Media on their way into the payload store: what is stored, when there is room for it, and what is brought back."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.errors import InvalidSampleError
from tasks.messages import Failure, MediaRef, Outcome
from tasks.payloads import PayloadStore
from tasks.rewards import JPEG, RAW
from tasks.settings import Settings
from trainer_client.board import Board, Entry, Slot
from trainer_client.encoding import Content, Encoded, encode, transport_of
from trainer_client.outgoing import Outgoing
from trainer_client.patience import Patience

STORE_LOOK_S = 0.2
"""How often senders look at the bytes in the store."""

STUCK_S = 5.0
"""A store that is full, and that nothing has left for so long, may be full of incomplete groups."""


class Times:
    """Seconds spent by the sender's threads, summed over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent: dict[str, float] = defaultdict(float)

    def add(self, name: str, started: float) -> None:
        """Count what has passed since `started` (`time.perf_counter()`) as `encode_s`, `store_s` or `send_s`."""
        with self._lock:
            self._spent[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """By name, what was spent since this was asked last."""
        with self._lock:
            spent, self._spent = self._spent, defaultdict(float)
        return {name: spent[name] for name in ("encode_s", "store_s", "send_s")}


class Uploads:
    """Stores the media of a client's samples, each content once, within REWARDQ_MAX_STORE_BYTES of all clients."""

    def __init__(
        self,
        settings: Settings,
        store: PayloadStore,
        board: Board,
        outgoing: Outgoing,
        patience: Patience,
        times: Times,
    ) -> None:
        self._settings, self._store, self._board, self._outgoing = (
            settings,
            store,
            board,
            outgoing,
        )
        self._patience, self._times = patience, times
        self._looking = threading.Lock()
        self._in_use, self._look_at = 0, 0.0
        """Bytes in the payload store, and when to ask it again (monotonic)."""
        self._last_seen, self._left_at = 0, 0.0
        """Bytes that it said last to be in it, and when it last said less than before."""

    def store(
        self, slot: Slot, encoded: Mapping[str, Encoded], entries: Sequence[Entry]
    ) -> None:
        """Store what these entries need and is not in the store yet, and tell each where its media are."""
        started = time.perf_counter()
        for name, one in encoded.items():
            for transport in (RAW, JPEG):
                users = [
                    e
                    for e in entries
                    if name in e.spec.fields and transport_of(e.spec) == transport
                ]
                if users:
                    payloads = one.as_payloads(name, transport)
                    refs = [
                        self._store_one(slot, payload, users) for payload in payloads
                    ]
                    for entry in users:
                        entry.media[name] = tuple(refs) if one.is_list else refs[0]
        self._times.add("store_s", started)

    def bring_back(self, entry: Entry, gone: dict[str, str]) -> bool:
        """Encode and store again what is gone (digest to name) of one entry; whether it can be sent."""
        if not gone:
            return True
        holders = [s for s in entry.slots if s.sample is not None]
        try:
            if not holders:
                raise LookupError(
                    "its media left the payload store, and this process does not hold them"
                )
            again = {
                content.digest: content.data
                for holder in holders
                for name, one in encode(holder).items()
                for content in one.as_payloads(name, transport_of(entry.spec))
                if content.digest in gone
            }
            if not gone.keys() <= again.keys():
                raise InvalidSampleError(
                    "its media were changed after submit(), and had to be sent a second time"
                )
        except (LookupError, InvalidSampleError) as error:
            kind: Any = "failed" if isinstance(error, LookupError) else "invalid"
            failure = Failure(kind=kind, message=str(error))
            self._board.answer({entry: Outcome(failure=failure, attempt=entry.attempt)})
            return False
        self._put({name: again[digest] for digest, name in gone.items()})
        return True

    # --- private ---------------------------------------------------------------------------------

    def _store_one(
        self, slot: Slot, content: Content, users: Sequence[Entry]
    ) -> MediaRef:
        payload, is_new = self._board.use(content.digest, users)
        if is_new:
            if self._await_room(
                slot, memoryview(content.data).nbytes, lambda: payload.num_users > 0
            ):
                self._put({payload.name: content.data})
            self._board.has_stored(payload)
        while payload.num_users and not payload.stored.wait(0.1):
            self._patience.pause(0.0)
        return MediaRef(
            name=payload.name,
            digest=content.digest,
            shape=content.shape,
            format=content.format,
        )

    def _put(self, payloads: Mapping[str, Any]) -> None:
        self._patience.insist(
            lambda: self._store.put(payloads, self._settings.payload_ttl_s)
        )

    def _await_room(
        self, slot: Slot, num_bytes: int, is_needed: Callable[[], bool]
    ) -> bool:
        """Wait until there is room for so many bytes of a slot, or they are not needed any more; whether they are."""
        while not self._has_room(num_bytes) and not self._may_exceed(slot, num_bytes):
            self._board.trouble = (
                f"the payload store holds {self._in_use} bytes of all clients, REWARDQ_MAX_STORE_BYTES is "
                f"{self._settings.max_store_bytes}; sending waits for workers to score what is there (what "
                "`async_reward: false` holds they score from collect() on)"
            )
            self._patience.pause(STORE_LOOK_S)
            if not is_needed():
                self._board.trouble = None
                return False
        self._board.trouble = None
        return True

    def _has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes may be stored, and if so count them.

        The store is asked every `STORE_LOOK_S`; what this process stores meanwhile is added, what others do is not.
        """
        with self._looking:
            if time.monotonic() >= self._look_at:
                self._in_use = self._patience.insist(self._store.bytes_in_use)
                self._look_at = time.monotonic() + STORE_LOOK_S
                if self._in_use < self._last_seen or not self._left_at:
                    self._left_at = time.monotonic()
                self._last_seen = self._in_use
            if (
                self._in_use
                and self._in_use + num_bytes > self._settings.max_store_bytes
            ):
                return False
            self._in_use += num_bytes
            return True

    def _may_exceed(self, slot: Slot, num_bytes: int) -> bool:
        """Whether a full store waits for this sample rather than for workers: nothing leaves it, nothing is queued, so
        what it holds are groups that lack members, of this rank or others. If so count the bytes."""
        queues = {spec.queue for spec in slot.rewards if spec.is_groupwise}
        if not queues or time.monotonic() < self._left_at + STUCK_S:
            return False
        if any(
            self._patience.insist(functools.partial(self._outgoing.num_waiting, queue))
            for queue in queues
        ):
            return False
        with self._looking:
            self._in_use += num_bytes
        return True
