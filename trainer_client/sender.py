"""Background threads that encode samples, store their media, and send chunks, so that the trainer is not slowed."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from kombu.exceptions import BatchPublishError, OperationalError

from tasks import outcomes
from tasks.connections import LOST, why_away
from tasks.errors import InvalidSampleError
from tasks.messages import (
    Failure,
    MediaRef,
    Outcome,
    SampleRequest,
)
from tasks.outcomes import Outcomes
from tasks.payloads import PayloadStore
from tasks.rewards import JPEG, RAW, RewardSpec
from tasks.samples import Sample, sample_key
from tasks.settings import Settings
from trainer_client.board import Board, Chunk, Entry, Place, Slot
from trainer_client.encoding import Content, Encoded, encode, transport_of
from trainer_client.groups import Groups, Member
from trainer_client.outgoing import Outgoing

log = logging.getLogger(__name__)

IDLE_S = 0.2
"""A chunk that is not full goes after this long without a new sample."""

MESSAGES_A_BATCH = 200
"""Messages handed to Redis in one transaction."""

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0
"""Pauses between tries while a server is away."""

SAY_EVERY_S = 60.0
"""How often the log says that senders wait."""

STORE_LOOK_S = 0.2
"""How often senders look at the bytes in the store."""

STUCK_S = 5.0
"""A store that is full, and that nothing has left for so long, may be full of incomplete groups."""

AWAY = (*LOST, OperationalError, BatchPublishError)
"""A server that is away or full: wait and try again."""

T = TypeVar("T")
Refs = MediaRef | tuple[MediaRef, ...]


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


class Sender:
    """Takes slots from `submit()` to messages under way.

    `sender_threads` threads encode and store, and wait while the payload store is full. One fills chunks and sends
    them. One does what makes room there, and so must not wait for it: it sends again what was lost, and passes on
    groups that were completed. A server that is away is waited for; the reason is on the board.
    """

    def __init__(
        self,
        settings: Settings,
        store: PayloadStore,
        results: Outcomes,
        board: Board,
        run: str,
        rank: int,
        groups: Groups,
        outgoing: Outgoing,
    ) -> None:
        self._settings, self._store, self._outcomes, self._board = settings, store, results, board
        self._run, self._rank = run, rank
        self._groups, self._outgoing = groups, outgoing
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._repairs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[list[Entry] | None] = queue.SimpleQueue()
        self._filling: dict[tuple[Any, ...], list[Entry]] = {}
        self._looking = threading.Lock()
        self._in_use, self._look_at = 0, 0.0
        """Bytes in the payload store, and when to ask it again (monotonic)."""
        self._last_seen, self._left_at = 0, 0.0
        """Bytes that it said last to be in it, and when it last said less than before."""
        self._hurrying = threading.Lock()
        self._num_hurries = self._num_jobs = 0
        self._releases: Counter[Place] = Counter()
        """Steps that someone waits for in `collect()`."""
        self._say_at = 0.0
        self._ended = threading.Event()
        self.times = Times()
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=f"rewardq-{name}", daemon=True)
            for name, loop in (
                *((f"encode-{i}", functools.partial(self._work, self._jobs)) for i in range(settings.sender_threads)),
                ("repair", functools.partial(self._work, self._repairs)),
                ("send", self._send_loop),
            )
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, slots: Sequence[Slot]) -> None:
        """Encode and send these slots in the background."""
        self._board.count_unsent(len(slots))
        for slot in slots:
            self._do(self._jobs, functools.partial(self._encode_slot, slot))

    def send_again(self, entries: Sequence[Entry]) -> None:
        """Send entries whose message was lost, after storing what is gone of their media."""
        self._do(self._repairs, functools.partial(self._restore, entries))

    def send_same(self, chunk: Chunk, request: str) -> None:
        """Send the message of one of a chunk's requests again as it was."""
        self.soon(functools.partial(self._outgoing.send_same, chunk, request))

    def soon(self, call: Callable[[], None]) -> None:
        """Run `call`, which may run again, in the background; a server that is away is waited for."""
        self._do(self._repairs, functools.partial(self._patiently, call))

    def send_sealed(self, entries: Sequence[Entry]) -> None:
        """Send groups that this or another rank has completed, unless they are answered or another rank sent them."""
        self._do(self._repairs, functools.partial(self._pass_on_sealed, entries))

    @contextlib.contextmanager
    def hurry(self, releases: Iterable[Place] = ()) -> Iterator[None]:
        """Meanwhile chunks go although they are not full; of the steps in `releases` also what `async_reward: false`
        holds, and groups of unknown size."""
        releases = list(releases)
        with self._hurrying:
            self._num_hurries += 1
            self._releases.update(releases)
        self._ready.put([])
        try:
            yield
        finally:
            with self._hurrying:
                self._num_hurries -= 1
                self._releases -= Counter(releases)

    def close(self) -> None:
        """End the threads; what is not sent stays unsent."""
        self._ended.set()
        for _ in range(self._settings.sender_threads):
            self._jobs.put(None)
        self._repairs.put(None)
        self._ready.put(None)
        for thread in self._threads:
            thread.join(timeout=5.0)

    # --- encoding threads ------------------------------------------------------------------------

    def _work(self, jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := jobs.get()) is not None and not self._ended.is_set():
            job()
            with self._hurrying:
                self._num_jobs -= 1
            self._ready.put([])

    def _do(self, jobs: queue.SimpleQueue[Callable[[], None] | None], job: Callable[[], Any]) -> None:
        with self._hurrying:
            self._num_jobs += 1
        jobs.put(job)

    def _encode_slot(self, slot: Slot) -> None:
        """Encode a sample, find what is answered already, store its media for the rest, and pass that on."""
        new: list[Entry] = []
        sample = slot.sample
        if sample is not None:  # else abandoned meanwhile
            started = time.perf_counter()
            try:
                encoded = encode(slot)
            except InvalidSampleError as error:
                failure = Failure(kind="invalid", message=str(error))
                self._board.fail(slot, failure)
                self._join_groups(slot, sample, {}, [], failure)
            else:
                new = self._board.join(slot, sample, self._wanted(slot, sample, encoded))
                self.times.add("encode_s", started)
                new = self._without_answered(new)
                self._store_media(slot, encoded, new)
                carried = self._join_groups(slot, sample, encoded, new, None)
                new = [e for e in new if e not in carried]
        self._pass_on(new, num_encoded=1)

    def _pass_on(self, new: list[Entry], num_encoded: int = 0) -> None:
        """To the sending thread."""
        self._board.count_unsent(len(new) - num_encoded)
        self._ready.put(new)

    def _join_groups(
        self,
        slot: Slot,
        sample: Sample,
        encoded: Mapping[str, Encoded],
        new: Sequence[Entry],
        failure: Failure | None,
    ) -> set[Entry]:
        """Put a sample into the groups of its groupwise rewards; returns those of its new entries that they carry."""
        carried: set[Entry] = set()
        for spec in (s for s in slot.rewards if s.is_groupwise):
            key, address = self._key_and_address(slot, sample, encoded, spec.part, is_fit=failure is None)
            holder = Entry(address="", spec=spec.part)
            self._store_media(slot, encoded, [holder])
            own = [e for e in new if e.address == address] if self._groups.may_carry and spec.how == "rank" else []
            own = [e for e in own if e not in carried and e.spec.async_reward]
            carried.update(own)
            request = SampleRequest(
                address=address,
                prompt=sample.prompt,
                media=holder.media,
                metadata=dict(sample.metadata) if "metadata" in spec.fields else {},
                failure=failure,
            )
            self._pass_on_sealed(
                self._patiently(functools.partial(self._groups.add, spec, Member(slot, key, request, holder, own)))
            )
        return carried

    def _pass_on_sealed(self, entries: Sequence[Entry]) -> None:
        """Groups that are complete go on, unless their outcome is there or another rank sent them."""
        if entries:
            left = self._without_answered(entries)
            for entry in left:
                self._ask_for_next_attempts(entry)
            self._board.watch([e for e in left if e.sent_number], self._settings.reconcile_s)
            self._pass_on([e for e in left if not e.sent_number])

    def _ask_for_next_attempts(self, group: Entry) -> None:
        """Parts that failed before are tried again with the group."""
        for name in ("members", "comparisons"):
            parts = getattr(group, name)
            found = self._patiently(functools.partial(self._outcomes.look_up, [p.address for p in parts]))
            setattr(
                group,
                name,
                tuple(
                    p.model_copy(update={"attempt": o.attempt + 1}) if o is not None and not o.is_final else p
                    for p, o in zip(parts, found, strict=True)
                ),
            )

    def _key_and_address(
        self, slot: Slot, sample: Sample, encoded: Mapping[str, Encoded], spec: RewardSpec, *, is_fit: bool = True
    ) -> tuple[str, str]:
        """The key of a sample for a reward, and where its outcome goes. One that is not fit is like no other."""
        digests = {name: e.identity() for name, e in encoded.items()}
        place = (slot.split, slot.step, self._rank, slot.index) if spec.counts_slot or not is_fit else ()
        key = sample_key(sample.prompt, digests, sample.metadata, place)
        return key, outcomes.address(self._run, spec.fingerprint, key)

    def _wanted(self, slot: Slot, sample: Sample, encoded: Mapping[str, Encoded]) -> dict[str, tuple[RewardSpec, str]]:
        """The address of this sample's outcome for each pointwise reward."""
        return {
            spec.name: (spec, self._key_and_address(slot, sample, encoded, spec)[1])
            for spec in slot.rewards
            if not spec.is_groupwise
        }

    def _without_answered(self, entries: Sequence[Entry]) -> list[Entry]:
        """Take the rewards that are there already; ask for another attempt where a failure is."""
        found = self._patiently(lambda: self._outcomes.look_up([e.address for e in entries]))
        hits = {e: o for e, o in zip(entries, found, strict=True) if o is not None and o.is_final}
        for entry, outcome in zip(entries, found, strict=True):
            if outcome is not None and not outcome.is_final:
                entry.attempt = outcome.attempt + 1
        self._board.answer(hits, is_hit=True)
        return [e for e in entries if e not in hits]

    def _store_media(self, slot: Slot, encoded: Mapping[str, Encoded], entries: Sequence[Entry]) -> None:
        """Store what these entries need and is not in the store yet, and tell each where its media are."""
        started = time.perf_counter()
        for name, one in encoded.items():
            for transport in (RAW, JPEG):
                users = [e for e in entries if name in e.spec.fields and transport_of(e.spec) == transport]
                if users:
                    payloads = one.as_payloads(name, transport)
                    refs = [self._store_one(slot, payload, users) for payload in payloads]
                    for entry in users:
                        entry.media[name] = tuple(refs) if one.is_list else refs[0]
        self.times.add("store_s", started)

    def _store_one(self, slot: Slot, content: Content, users: Sequence[Entry]) -> MediaRef:
        payload, is_new = self._board.use(content.digest, users)
        if is_new:
            if self._await_room(slot, memoryview(content.data).nbytes, lambda: payload.num_users > 0):
                self._put({payload.name: content.data})
            self._board.has_stored(payload)
        while payload.num_users and not payload.stored.wait(0.1):
            if self._ended.is_set():
                raise _EndedError
        return MediaRef(name=payload.name, digest=content.digest, shape=content.shape, format=content.format)

    def _put(self, payloads: Mapping[str, Any]) -> None:
        self._patiently(lambda: self._store.put(payloads, self._settings.payload_ttl_s))

    def _await_room(self, slot: Slot, num_bytes: int, is_needed: Callable[[], bool]) -> bool:
        """Wait until there is room for so many bytes of a slot, or they are not needed any more; whether they are."""
        while not self._has_room(num_bytes) and not self._may_exceed(slot, num_bytes):
            self._board.trouble = (
                f"the payload store holds {self._in_use} bytes of all clients, REWARDQ_MAX_STORE_BYTES is "
                f"{self._settings.max_store_bytes}; sending waits for workers to score what is there"
            )
            if self._ended.wait(STORE_LOOK_S):
                raise _EndedError
            if not is_needed():
                self._board.trouble = None
                return False
        if self._board.trouble is not None:
            self._board.trouble = None
        return True

    def _has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes may be stored, and if so count them.

        The store is asked every `STORE_LOOK_S`; what this process stores meanwhile is added, what others do is not.
        """
        with self._looking:
            if time.monotonic() >= self._look_at:
                self._in_use = self._patiently(self._store.bytes_in_use)
                self._look_at = time.monotonic() + STORE_LOOK_S
                if self._in_use < self._last_seen or not self._left_at:
                    self._left_at = time.monotonic()
                self._last_seen = self._in_use
            if self._in_use and self._in_use + num_bytes > self._settings.max_store_bytes:
                return False
            self._in_use += num_bytes
            return True

    def _may_exceed(self, slot: Slot, num_bytes: int) -> bool:
        """Whether a full store waits for this sample rather than for workers: nothing leaves it, nothing is queued, so
        what it holds are groups that lack members, of this rank or others. If so count the bytes."""
        queues = {spec.queue for spec in slot.rewards if spec.is_groupwise}
        if not queues or time.monotonic() < self._left_at + STUCK_S:
            return False
        if any(self._patiently(functools.partial(self._outgoing.num_waiting, queue)) for queue in queues):
            return False
        with self._looking:
            self._in_use += num_bytes
        return True

    def _restore(self, entries: Sequence[Entry]) -> None:
        """Bring back what is gone of the media of entries that are to be sent again."""
        entries = [e for e in entries if self._board.is_wanted(e)]
        names = list(dict.fromkeys(p.name for e in entries for p in e.payloads))
        gone = set(self._patiently(lambda: self._store.renew(names, self._settings.payload_ttl_s)))
        self._pass_on(
            [e for e in entries if self._bring_back(e, {p.digest: p.name for p in e.payloads if p.name in gone})]
        )

    def _bring_back(self, entry: Entry, gone: dict[str, str]) -> bool:
        """Encode and store again what is gone (digest to name) of one entry; whether it can be sent."""
        if not gone:
            return True
        holders = [s for s in entry.slots if s.sample is not None]
        try:
            if not holders:
                raise LookupError("its media left the payload store, and this process does not hold them")
            again = {
                content.digest: content.data
                for holder in holders
                for name, one in encode(holder).items()
                for content in one.as_payloads(name, transport_of(entry.spec))
                if content.digest in gone
            }
            if not gone.keys() <= again.keys():
                raise InvalidSampleError("its media were changed after submit(), and had to be sent a second time")
        except (LookupError, InvalidSampleError) as error:
            kind: Any = "failed" if isinstance(error, LookupError) else "invalid"
            failure = Failure(kind=kind, message=str(error))
            self._board.answer({entry: Outcome(failure=failure, attempt=entry.attempt)})
            return False
        self._put({name: again[digest] for digest, name in gone.items()})
        return True

    # --- the sending thread ----------------------------------------------------------------------

    def _send_loop(self) -> None:
        try:
            while True:
                try:
                    new = self._ready.get(timeout=IDLE_S if self._filling or self._releases else None)
                except queue.Empty:
                    new = []
                    is_idle = True
                else:
                    is_idle = False
                if new is None or self._ended.is_set():
                    return
                self._fill(new)
                may_hurry, released = self._may_hurry()
                if may_hurry and released:
                    self._release_groups(released)
                self._send(self._take_chunks(released, all_of_them=is_idle or may_hurry))
        finally:
            self._outgoing.disconnect()

    def _may_hurry(self) -> tuple[bool, set[Place]]:
        """Whether someone waits, and nothing is being encoded that could still fill a chunk; and the steps released."""
        with self._hurrying:
            return self._num_hurries > 0 and self._num_jobs == 0 and self._ready.empty(), set(self._releases)

    def _release_groups(self, released: set[Place]) -> None:
        """Someone waits in `collect()`: seal groups of unknown size; let go what waits for one that does not fill."""
        self._pass_on_sealed(self._groups.release(released))
        overdue = self._groups.take_overdue()
        if overdue:
            self._pass_on(overdue)

    def _fill(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            slot = entry.slots[0] if entry.slots else None
            if slot is None:  # abandoned
                self._board.count_unsent(-1)
                continue
            by_itself = id(entry) if entry.members else 0
            key = (entry.spec.fingerprint, slot.split, slot.step, by_itself, entry.spec.async_reward)
            self._filling.setdefault(key, []).append(entry)
            if not entry.spec.async_reward:
                self._board.count_unsent(-1)  # held until collect(), which nobody waits for before

    def _take_chunks(self, released: set[Place], *, all_of_them: bool) -> list[list[Entry]]:
        """Full chunks, and the others too if `all_of_them`; what `async_reward: false` holds goes once its step, or
        that of another slot that needs the same, is released."""
        taken = []
        for key, filled in list(self._filling.items()):
            is_held = not key[-1]
            if is_held and not released:
                continue
            wanted = [e for e in filled if self._board.is_wanted(e)]
            if not is_held and len(wanted) < len(filled):
                self._board.count_unsent(len(wanted) - len(filled))
            due = [e for e in wanted if not is_held or any(s.place in released for s in list(e.slots))]
            left = _without(wanted, due)
            size = 1 if not due or due[0].members else due[0].spec.batch_size
            while len(due) >= size or (due and all_of_them):
                taken.append(due[:size])
                del due[:size]
            self._filling[key] = left + due
            if not self._filling[key]:
                del self._filling[key]
        return taken

    def _send(self, chunks: Sequence[list[Entry]]) -> None:
        if not chunks:
            return
        started = time.perf_counter()
        num_counted = sum(e.spec.async_reward for c in chunks for e in c)
        with_carried = [[*c, *(e for e in c[0].carried if self._board.is_wanted(e))] for c in chunks if c]
        self._patiently(lambda: self._send_once(with_carried))
        self._board.count_unsent(-num_counted)
        self.times.add("send_s", started)

    def _send_once(self, chunks: Sequence[Sequence[Entry]]) -> None:
        for chunk in self._outgoing.send(chunks):
            self._groups.tell_number(chunk)

    # --- both ------------------------------------------------------------------------------------

    def _patiently(self, call: Callable[[], T]) -> T:
        """`call()`, again and again with growing pauses while a server is away or full."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = call()
            except AWAY as error:
                self._board.trouble = f"sending waits: {why_away(error)}"
                self._say_that_it_waits(error)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._board.trouble = f"sending waits for room in the payload store: {error}"
            else:
                if pause_s > FIRST_PAUSE_S:
                    self._board.trouble = None
                return result
            if self._ended.wait(pause_s):
                raise _EndedError
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _say_that_it_waits(self, error: BaseException) -> None:
        """In the log, now and then: a Redis that is nearly full refuses some calls and takes others."""
        if time.monotonic() >= self._say_at:
            log.warning("sending waits for redis error=%s", type(error).__name__)
            self._say_at = time.monotonic() + SAY_EVERY_S

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except _EndedError:
            return
        except BaseException as error:  # a bug of ours must end every wait, not only this thread
            log.exception("a sender's thread ended")
            self._board.break_with(error)


def _without(entries: Sequence[Entry], taken: Sequence[Entry]) -> list[Entry]:
    gone = set(taken)
    return [e for e in entries if e not in gone]


class _EndedError(Exception):
    """The sender was closed while a thread waited."""
