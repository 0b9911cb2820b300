"""Background threads that encode samples, store their media, and send chunks, so that the trainer is not slowed."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kombu.exceptions import OperationalError

from tasks import media, outcomes
from tasks.celery_app import SCORE
from tasks.connections import LOST
from tasks.errors import InvalidSampleError
from tasks.messages import (
    WIRE_VERSION,
    Failure,
    MediaRef,
    Outcome,
    RewardCall,
    SampleRequest,
    ScoreRequest,
    pack,
)
from tasks.outcomes import Outcomes
from tasks.payloads import PayloadStore
from tasks.rewards import JPEG, RAW, RewardSpec
from tasks.samples import Sample, sample_key
from tasks.settings import Settings
from trainer_client.board import Board, Chunk, Entry, Slot

log = logging.getLogger(__name__)

IDLE_S = 0.2
"""A chunk that is not full goes after this long without a new sample."""

MESSAGES_A_BATCH = 200
"""Messages handed to Redis in one transaction."""

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0
"""Pauses between tries while a server is away."""

STORE_LOOK_S = 0.2
"""How often senders look at the bytes in the store while they wait for room."""

AWAY = (*LOST, OperationalError)
"""A server that is away or full: wait and try again."""

T = TypeVar("T")
Refs = MediaRef | tuple[MediaRef, ...]


@dataclass(slots=True)
class Times:
    """Seconds spent by the sender's threads, summed over threads."""

    encode_s: float = 0.0
    store_s: float = 0.0
    send_s: float = 0.0


@dataclass(slots=True)
class _Encoded:
    """One media field of a sample as checked arrays, with the digest of each."""

    arrays: list[Any]
    is_list: bool
    digests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.digests = [media.digest(a) for a in self.arrays]

    def identity(self) -> list[Any]:
        """What of it goes into the sample's key."""
        return [[list(a.shape), d] for a, d in zip(self.arrays, self.digests, strict=True)]


class Sender:
    """Takes slots from `submit()` to messages under way.

    `sender_threads` threads encode and store; one more fills chunks and sends them. A server that is away or full is
    waited for; the reason is on the board.
    """

    def __init__(
        self,
        app: Any,
        settings: Settings,
        store: PayloadStore,
        results: Outcomes,
        board: Board,
        run: str,
        rank: int,
    ) -> None:
        self._app, self._settings, self._store, self._outcomes, self._board = app, settings, store, results, board
        self._run, self._rank = run, rank
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[list[Entry] | None] = queue.SimpleQueue()
        self._filling: dict[tuple[Any, ...], list[Entry]] = {}
        self._publishing = threading.Lock()
        self._hurrying = threading.Lock()
        self._num_hurries = self._num_releases = self._num_jobs = 0
        self._ended = threading.Event()
        self._connection: Any = None
        self.times = Times()
        self._threads = [
            threading.Thread(target=self._guard, args=(self._encode_loop,), name=f"rewardq-encode-{i}", daemon=True)
            for i in range(settings.sender_threads)
        ]
        self._threads.append(
            threading.Thread(target=self._guard, args=(self._send_loop,), name="rewardq-send", daemon=True)
        )
        for thread in self._threads:
            thread.start()

    def submit(self, slots: Sequence[Slot]) -> None:
        """Encode and send these slots in the background."""
        self._board.count_unsent(len(slots))
        for slot in slots:
            self._do(functools.partial(self._encode_slot, slot))

    def send_again(self, entries: Sequence[Entry]) -> None:
        """Send entries whose message was lost, after storing what is gone of their media."""
        self._do(functools.partial(self._restore, entries))

    def send_same(self, chunk: Chunk) -> None:
        """Send the message of a chunk again as it was, for a successor that does not hold its media."""
        self._do(functools.partial(self._patiently, functools.partial(self._send_same, chunk)))

    @contextlib.contextmanager
    def hurry(self, *, held: bool) -> Iterator[None]:
        """Meanwhile chunks go although they are not full; with `held`, those of `async_reward: false` too."""
        with self._hurrying:
            self._num_hurries += 1
            self._num_releases += held
        self._ready.put([])
        try:
            yield
        finally:
            with self._hurrying:
                self._num_hurries -= 1
                self._num_releases -= held

    def close(self) -> None:
        """End the threads; what is not sent stays unsent."""
        self._ended.set()
        for _ in self._threads[:-1]:
            self._jobs.put(None)
        self._ready.put(None)
        for thread in self._threads:
            thread.join(timeout=5.0)

    # --- encoding threads ------------------------------------------------------------------------

    def _encode_loop(self) -> None:
        while (job := self._jobs.get()) is not None and not self._ended.is_set():
            job()
            with self._hurrying:
                self._num_jobs -= 1
            self._ready.put([])

    def _do(self, job: Callable[[], Any]) -> None:
        with self._hurrying:
            self._num_jobs += 1
        self._jobs.put(job)

    def _encode_slot(self, slot: Slot) -> None:
        """Encode a sample, find what is answered already, store its media for the rest, and pass that on."""
        new: list[Entry] = []
        sample = slot.sample
        if sample is not None:  # else abandoned meanwhile
            started = time.perf_counter()
            try:
                encoded = encode(slot)
            except InvalidSampleError as error:
                self._board.fail(slot, Failure(kind="invalid", message=str(error)))
            else:
                new = self._board.join(slot, sample, self._wanted(slot, sample, encoded))
                self.times.encode_s += time.perf_counter() - started
                new = self._without_answered(new)
                self._store_media(encoded, new)
        self._board.count_unsent(len(new) - 1)
        self._ready.put(new)

    def _wanted(self, slot: Slot, sample: Sample, encoded: Mapping[str, _Encoded]) -> dict[str, tuple[RewardSpec, str]]:
        """The address of this sample's outcome for each reward."""
        digests = {name: e.identity() for name, e in encoded.items()}
        key = sample_key(sample.prompt, digests, sample.metadata)
        place = (slot.split, slot.step, self._rank, slot.index)
        wanted = {}
        for spec in slot.rewards:
            own = sample_key(sample.prompt, digests, sample.metadata, place) if spec.counts_slot else key
            wanted[spec.name] = (spec, outcomes.address(self._run, spec.fingerprint, own))
        return wanted

    def _without_answered(self, entries: Sequence[Entry]) -> list[Entry]:
        """Take the rewards that are there already; ask for another attempt where a failure is."""
        found = self._patiently(lambda: self._outcomes.look_up([e.address for e in entries]))
        hits = {e: o for e, o in zip(entries, found, strict=True) if o is not None and o.reward is not None}
        for entry, outcome in zip(entries, found, strict=True):
            if outcome is not None and outcome.reward is None:
                entry.attempt = outcome.attempt + 1
        self._board.answer(hits, is_hit=True)
        return [e for e in entries if e not in hits]

    def _store_media(self, encoded: Mapping[str, _Encoded], entries: Sequence[Entry]) -> None:
        """Store what these entries need and is not in the store yet, and tell each where its media are."""
        started = time.perf_counter()
        for name, one in encoded.items():
            for transport in (RAW, JPEG):
                users = [e for e in entries if name in e.spec.fields and transport_of(e.spec) == transport]
                if users:
                    refs = [self._store_one(array, name, transport, users) for array in one.arrays]
                    for entry in users:
                        entry.media[name] = tuple(refs) if one.is_list else refs[0]
        self.times.store_s += time.perf_counter() - started

    def _store_one(self, array: Any, name: str, transport: str, users: Sequence[Entry]) -> MediaRef:
        data, format_ = as_payload(array, name, transport)
        digest = media.digest(data)
        payload, is_new = self._board.use(digest, users)
        if is_new:
            self._put({payload.name: data})
            payload.stored.set()
        while not payload.stored.wait(0.1):
            if self._ended.is_set():
                raise _EndedError
        return MediaRef(name=payload.name, digest=digest, shape=array.shape, format=format_)

    def _put(self, payloads: Mapping[str, Any]) -> None:
        """Store payloads once there is room for them."""
        num_bytes = sum(memoryview(p).nbytes for p in payloads.values())
        while True:
            in_use = self._patiently(self._store.bytes_in_use)
            if not in_use or in_use + num_bytes <= self._settings.max_store_bytes:
                break
            self._board.trouble = (
                f"the payload store holds {in_use} bytes of all clients, REWARDQ_MAX_STORE_BYTES is "
                f"{self._settings.max_store_bytes}; sending waits for workers to score what is there"
            )
            if self._ended.wait(STORE_LOOK_S):
                raise _EndedError
        if self._board.trouble is not None:
            self._board.trouble = None
        self._patiently(lambda: self._store.put(payloads, self._settings.payload_ttl_s))

    def _restore(self, entries: Sequence[Entry]) -> None:
        """Bring back what is gone of the media of entries that are to be sent again."""
        entries = [e for e in entries if self._board.is_wanted(e)]
        names = list(dict.fromkeys(p.name for e in entries for p in e.payloads))
        gone = set(self._patiently(lambda: self._store.renew(names, self._settings.payload_ttl_s)))
        ready = [e for e in entries if self._bring_back(e, {p.digest: p.name for p in e.payloads if p.name in gone})]
        self._board.count_unsent(len(ready))
        self._ready.put(ready)

    def _bring_back(self, entry: Entry, gone: dict[str, str]) -> bool:
        """Encode and store again what is gone (digest to name) of one entry; whether it can be sent."""
        if not gone:
            return True
        holder = next((s for s in entry.slots if s.sample is not None), None)
        try:
            if holder is None:
                raise LookupError("its media left the payload store, and this process does not hold them")
            again = {
                media.digest(data): data
                for name, one in encode(holder).items()
                for data, _ in (as_payload(a, name, transport_of(entry.spec)) for a in one.arrays)
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
                    new = self._ready.get(timeout=IDLE_S if self._filling else None)
                except queue.Empty:
                    self._send(self._take_chunks(all_of_them=True))
                    continue
                if new is None or self._ended.is_set():
                    return
                self._fill(new)
                self._send(self._take_chunks(all_of_them=self._may_hurry()))
        finally:
            self._disconnect()

    def _may_hurry(self) -> bool:
        """Whether someone waits, and nothing is being encoded that could still fill a chunk."""
        with self._hurrying:
            return self._num_hurries > 0 and self._num_jobs == 0 and self._ready.empty()

    def _fill(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            slot = entry.slots[0] if entry.slots else None
            if slot is None:  # abandoned
                self._board.count_unsent(-1)
                continue
            key = (entry.spec.fingerprint, slot.split, slot.step, entry.spec.async_reward)
            self._filling.setdefault(key, []).append(entry)
            if not entry.spec.async_reward:
                self._board.count_unsent(-1)  # held until collect(), which nobody waits for before

    def _take_chunks(self, *, all_of_them: bool) -> list[list[Entry]]:
        """Full chunks, and the others too if `all_of_them`; what `async_reward: false` holds goes at a release."""
        taken = []
        released = self._num_releases > 0
        for key, entries in list(self._filling.items()):
            is_held = not key[-1]
            size = entries[0].spec.batch_size
            if is_held and not released:
                continue
            while len(entries) >= size or (entries and all_of_them):
                taken.append(entries[:size])
                del entries[:size]
            if not entries:
                del self._filling[key]
        return taken

    def _send(self, groups: Sequence[list[Entry]]) -> None:
        if not groups:
            return
        started = time.perf_counter()
        self._patiently(lambda: self._send_once([g for g in groups if g]))
        num_counted = sum(e.spec.async_reward for g in groups for e in g)
        self._board.count_unsent(-num_counted)
        self.times.send_s += time.perf_counter() - started

    def _send_once(self, groups: Sequence[Sequence[Entry]]) -> None:
        """One try at sending: reserve numbers, store the requests, register them, publish."""
        now_ms = self._outcomes.now_ms()
        deadline_ms = now_ms + round(1000 * self._settings.result_ttl_s)
        chunks = [self._chunk(entries) for entries in groups]
        for queue_name in {c.spec.queue for c in chunks}:
            own = [c for c in chunks if c.spec.queue == queue_name]
            first = self._outcomes.number(queue_name, len(own))
            for number, chunk in enumerate(own, first):
                chunk.number = number
        requests = {c.request: pack(self._request(c, now_ms, deadline_ms)) for c in chunks}
        self._store.put(requests, self._settings.payload_ttl_s)
        self._board.send(chunks)
        self._publish([(c.label, c.request, c.spec.queue, c.number) for c in chunks])

    def _chunk(self, entries: Sequence[Entry]) -> Chunk:
        spec, slot = entries[0].spec, entries[0].slots[0] if entries[0].slots else None
        place = f", run {self._run} step {slot.step}" if slot is not None else f", run {self._run}"
        now = time.monotonic()
        # One that is sent again keeps its grown pause.
        pause_s = max((e.chunk.pause_s for e in entries if e.chunk), default=self._settings.reconcile_s)
        return Chunk(
            request=self._board.new_name(f"request-{uuid.uuid4().hex[:8]}"),
            label=f"{spec.reward_model.rpartition('.')[2]} x {len(entries)}{place}",
            spec=spec,
            number=0,
            entries=list(entries),
            sent_at=now,
            look_at=now + pause_s,
            pause_s=pause_s,
        )

    def _request(self, chunk: Chunk, now_ms: int, deadline_ms: int) -> ScoreRequest:
        return ScoreRequest(
            id=chunk.request,
            run=self._run,
            label=chunk.label,
            sent_ms=now_ms,
            deadline_ms=deadline_ms,
            reward=call_of(chunk.spec),
            samples=tuple(_sample_request(e) for e in chunk.entries),
        )

    def _publish(self, messages: Sequence[tuple[str, str, str, int]]) -> None:
        store_id = self._store.identity()
        with self._publishing:
            try:
                producer = self._producer()
                with producer.batch(MESSAGES_A_BATCH):
                    for label, request, queue_name, number in messages:
                        self._app.send_task(
                            SCORE,
                            args=[label, request, WIRE_VERSION, number, store_id],
                            queue=queue_name,
                            producer=producer,
                            argsrepr=label,
                            kwargsrepr="",
                            ignore_result=True,
                            retry=False,
                        )
            except AWAY:
                self._disconnect()
                raise

    def _send_same(self, chunk: Chunk) -> None:
        chunk.number = self._outcomes.number(chunk.spec.queue, 1)
        self._publish([(chunk.label, chunk.request, chunk.spec.queue, chunk.number)])

    def _producer(self) -> Any:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
        return self._app.amqp.Producer(self._connection, auto_declare=False)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.release()
            self._connection = None

    # --- both ------------------------------------------------------------------------------------

    def _patiently(self, call: Callable[[], T]) -> T:
        """`call()`, again and again with growing pauses while a server is away or full."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = call()
            except AWAY as error:
                self._board.trouble = f"sending waits for Redis: {error}"
                log.warning("sending waits for redis error=%s", type(error).__name__)
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

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except _EndedError:
            return
        except BaseException as error:  # a bug of ours must end every wait, not only this thread
            log.exception("a sender's thread ended")
            self._board.break_with(error)


class _EndedError(Exception):
    """The sender was closed while a thread waited."""


def encode(slot: Slot) -> dict[str, _Encoded]:
    """The media of a slot's sample that travel, as checked arrays. Raises `InvalidSampleError`."""
    encoders = {"image": media.encode_image, "video": media.encode_video, "audio": media.encode_audio}
    encoded = {}
    for name, held in slot.held.items():
        where = f"sample {slot.index}: {name}"
        single = encoders.get(name)
        if single is not None:
            encoded[name] = _Encoded([single(held, where)], is_list=False)
            continue
        one = media.encode_image if name == "condition_images" else media.encode_video
        encoded[name] = _Encoded([one(h, f"{where}[{i}]") for i, h in enumerate(held.value)], is_list=True)
    return encoded


def transport_of(spec: RewardSpec) -> str:
    """How pixels travel for a reward: raw, or JPEG where a local reward says so. (A judge's format is the worker's.)"""
    return JPEG if spec.image_format == JPEG and not spec.is_judge else RAW


def as_payload(array: Any, name: str, transport: str) -> tuple[Any, Any]:
    """The bytes of an array as they travel, and their format."""
    if name == "audio":
        return memoryview(array).cast("B"), "float32"
    if transport == RAW:
        return memoryview(array).cast("B"), "raw"
    frames = array if array.ndim == 4 else array[None]
    return media.join_frames([media.to_jpeg(frame) for frame in frames]), "jpeg"


def call_of(spec: RewardSpec) -> RewardCall:
    """The computation of a reward as workers are told it."""
    return RewardCall(
        name=spec.name,
        model=spec.reward_model,
        fingerprint=spec.fingerprint,
        version=spec.model_version,
        dtype=spec.dtype,
        batch_size=spec.batch_size,
        timeout_s=spec.timeout_s,
        image_format=spec.image_format,
        options=spec.options,
    )


def _sample_request(entry: Entry) -> SampleRequest:
    return SampleRequest(
        address=entry.address,
        prompt=entry.prompt,
        media=entry.media,
        metadata=entry.metadata,
        attempt=entry.attempt,
    )
