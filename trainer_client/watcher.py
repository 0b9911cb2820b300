"""The thread that polls outcomes, sends again what is missing, and frees what nobody needs any more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from kombu.exceptions import ChannelError

from tasks.catalog import VLM
from tasks.messages import WIRE_VERSION, Failure, Heartbeat, Note, Outcome
from tasks.outcomes import Outcomes
from tasks.payloads import PayloadStore
from tasks.settings import Settings
from trainer_client.board import Board, Chunk, Entry
from trainer_client.sender import AWAY, MAX_PAUSE_S, Sender

log = logging.getLogger(__name__)

FASTEST_S, SLOWEST_S = 0.005, 0.1
"""Pace of polling while someone waits in `collect()`: fast while outcomes come, slower while none do."""

IDLE_PACE_S = 0.5
"""Pace while nobody waits: enough to free payloads and to notice losses."""

POLL_SHARE = 5
"""Between two polls at least so many times the time that one takes, so that polling is no load for Redis."""


class Watcher:
    """Asks for all awaited outcomes in one round trip at an adaptive pace, and looks after lost messages."""

    def __init__(
        self, app: Any, settings: Settings, store: PayloadStore, results: Outcomes, board: Board, sender: Sender
    ) -> None:
        self._app, self._settings, self._store = app, settings, store
        self._outcomes, self._board, self._sender = results, board, sender
        self._connection: Any = None
        self._num_waiting = 0
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._pace_s = FASTEST_S
        now = time.monotonic()
        self._look_at, self._renew_at = now + settings.reconcile_s, now + self._renew_every_s
        self._warned: set[str] = set()
        self.warn_of_idle_queues = False
        """Set by whoever has waited for long enough to wonder whether there are workers."""
        self._thread = threading.Thread(target=self._run, name="rewardq-watch", daemon=True)
        self._thread.start()

    def hurry(self, *, is_waiting: bool) -> None:
        """Someone starts to wait in `collect()`, or has stopped."""
        with self._board.lock:
            self._num_waiting += 1 if is_waiting else -1
        self._pace_s = FASTEST_S
        self._wake.set()

    def idle_queues(self, queues: Iterable[str]) -> str | None:
        """Which of these queues no worker serves that could read our messages, and what to start; None if all are."""
        try:
            workers = self._outcomes.workers()
            store = self._store.identity()
        except AWAY as error:
            return f"Redis is away: {error}"
        reasons = [r for r in (_why_idle(queue, workers, store) for queue in sorted(queues)) if r]
        return "; ".join(reasons) or None

    def close(self) -> None:
        """End the thread; free what can be freed."""
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout=5.0)

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                pause_s = self._round()
                if self._wake.wait(pause_s):
                    self._wake.clear()
            self._round()
        except BaseException as error:  # a bug of ours must end every wait, not only this thread
            log.exception("the watcher ended")
            self._board.break_with(error)
        finally:
            self._disconnect()

    def _round(self) -> float:
        """Poll once, do what is due, and return how long to pause."""
        started = time.monotonic()
        is_first_trouble = self._board.trouble is None
        try:
            num_new = self._poll()
            if started >= self._look_at:
                self._reconcile()
                self._look_at = time.monotonic() + self._settings.reconcile_s
            if started >= self._renew_at:
                self._renew()
                self._renew_at = time.monotonic() + self._renew_every_s
            self._free()
        except AWAY as error:
            self._disconnect()
            if is_first_trouble:
                log.warning("polling waits for redis error=%s", type(error).__name__)
            self._board.trouble = f"polling waits for Redis: {error}"
            self._polling_failed = True
            return 1.0
        if self._polling_failed:
            self._polling_failed, self._board.trouble = False, None
        if not self._num_waiting:
            return IDLE_PACE_S
        self._pace_s = FASTEST_S if num_new else min(1.5 * self._pace_s, SLOWEST_S)
        return max(self._pace_s, POLL_SHARE * (time.monotonic() - started))

    _polling_failed = False

    def _poll(self) -> int:
        """Ask for everything awaited; returns how many outcomes were new."""
        waiting = self._board.waiting()
        if not waiting:
            return 0
        found = self._outcomes.look_up([e.address for e in waiting])
        new = {e: o for e, o in zip(waiting, found, strict=True) if o is not None and _answers(o, e)}
        if new:
            self._board.answer(new)
        self._read_notes()
        return len(new)

    def _read_notes(self) -> None:
        chunks = self._board.chunks()
        for chunk, note in zip(chunks, self._outcomes.notes([c.request for c in chunks]), strict=True):
            if note is not None:
                self._act_on(chunk, note)

    def _act_on(self, chunk: Chunk, note: Note) -> None:
        """A worker could not read a request: say so once, and send it again."""
        self._outcomes.drop_notes([chunk.request])
        if note.reason != "gone":
            words = f"worker {note.worker} on queue {chunk.spec.queue}: {note.detail}"
            self._board.trouble = words
            self._warn_once(words)
        if note.reason == "gone" and chunk.is_adopted:
            self._give_up(list(chunk.entries))
        elif note.reason == "gone":
            self._send_again(chunk, chunk.entries)
        else:  # another worker of this queue may do better; not at once, or the two play ball
            chunk.is_missed = True
            chunk.look_at = time.monotonic() + chunk.pause_s

    def _warn_once(self, words: str | None) -> None:
        if words and words not in self._warned:
            self._warned.add(words)
            log.warning("%s", words)

    def _reconcile(self) -> None:
        """Send again what is neither answered, claimed, queued, nor waiting for its model to load."""
        now = time.monotonic()
        if self.warn_of_idle_queues:
            self.warn_of_idle_queues = False
            self._warn_once(self.idle_queues({c.spec.queue for c in self._board.chunks()}))
        due = [c for c in self._board.chunks() if c.look_at <= now]
        if not due:
            return
        queues = {c.spec.queue: None for c in due}
        states = {q: self._outcomes.queue_state(q, self._num_in_queue(q)) for q in queues}
        loading = {(q, f) for w in self._outcomes.workers() for q in w.queues for f in w.loading}
        for chunk in due:
            entries = list(chunk.entries)
            claimed = self._outcomes.claimed([e.address for e in entries])
            lost = [e for e, is_claimed in zip(entries, claimed, strict=True) if not is_claimed]
            queue = chunk.spec.queue
            if not lost or states[queue].holds(chunk.number) or (queue, chunk.spec.fingerprint) in loading:
                chunk.is_missed = False
                chunk.look_at = now + self._settings.reconcile_s
            elif not chunk.is_missed:  # it may be between its queue and its claim: look once more
                chunk.is_missed = True
                chunk.look_at = now + self._settings.reconcile_s
            else:
                log.info("sent again queue=%s num_samples=%d request=%s", queue, len(lost), chunk.request)
                self._send_again(chunk, lost)

    def _send_again(self, chunk: Chunk, entries: Sequence[Entry]) -> None:
        chunk.is_missed = False
        chunk.pause_s = min(2 * chunk.pause_s, MAX_PAUSE_S)
        chunk.look_at = time.monotonic() + chunk.pause_s
        if not chunk.is_adopted:
            self._sender.send_again(list(entries))
        elif self._store.renew([chunk.request], self._settings.payload_ttl_s):
            self._give_up(entries)
        else:
            self._sender.send_same(chunk)

    def _give_up(self, entries: Sequence[Entry]) -> None:
        """Media that another process submitted are gone."""
        failure = Failure(kind="failed", message="its media left the payload store with the process that held them")
        self._board.answer({e: Outcome(failure=failure, attempt=e.attempt) for e in entries})

    def _num_in_queue(self, queue: str) -> int:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
        try:
            declared = self._connection.default_channel.queue_declare(queue, passive=True)
        except ChannelError:  # no such list in Redis: the queue is empty
            return 0
        return int(declared.message_count)

    # --- payloads --------------------------------------------------------------------------------

    @property
    def _renew_every_s(self) -> float:
        return min(60.0, self._settings.payload_ttl_s / 4)

    def _renew(self) -> None:
        """Let what is still needed live on. What is gone is brought back when its message is sent again."""
        self._store.renew(self._board.names_in_use(), self._settings.payload_ttl_s)

    def _free(self) -> None:
        names = self._board.take_to_free()
        try:
            self._store.free(names)
        except AWAY:
            self._board.free_later(names)
            raise

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.release()
            self._connection = None


def _answers(outcome: Outcome, entry: Entry) -> bool:
    return outcome.reward is not None or outcome.attempt >= entry.attempt


def _why_idle(queue: str, workers: Sequence[Heartbeat], store: str) -> str | None:
    """Why a queue gets nowhere, or None if some worker serves it."""
    own = [w for w in workers if queue in w.queues]
    start = f"celery -A tasks worker -Q {queue}" + (" --concurrency 32" if queue == VLM else "")
    if not own:
        return f"queue {queue!r} has no worker; start one: {start}"
    if all(w.wire != WIRE_VERSION for w in own):
        versions = ", ".join(f"{w.node} speaks wire version {w.wire}" for w in own)
        return f"queue {queue!r} has no worker that understands this client (wire version {WIRE_VERSION}): {versions}"
    if all(w.store != store for w in own):
        nodes = ", ".join(w.node for w in own)
        return f"no worker of queue {queue!r} uses this client's payload store ({nodes}); set REWARDQ_PAYLOAD_URL alike"
    return None
