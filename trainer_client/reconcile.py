"""Polls the outcomes that are awaited, and sends again what is missing: the client's half of delivery."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tasks.catalog import VLM
from tasks.messages import WIRE_VERSION, Failure, Heartbeat, Note, Outcome
from tasks.outcomes import USUAL_STARTS, ClientOutcomes, QueueState
from tasks.payloads import PayloadStore
from tasks.rewards import RewardSpec
from tasks.servers.connections import FULL, is_nearly_full, why_away
from tasks.settings import Settings
from trainer_client.board import ELSEWHERE, Board, Chunk, Entry
from trainer_client.busy import BusyMessages
from trainer_client.groups import Groups
from trainer_client.outgoing import num_in_queue
from trainer_client.patience import AWAY
from trainer_client.sender import Sender

log = logging.getLogger(__name__)

MAX_PAUSE_S = 30.0
"""A message that was sent several times is looked after at least this often."""


class Reconciler:
    """Compares what is awaited with what is in Redis. Used by one thread."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        store: PayloadStore,
        results: ClientOutcomes,
        board: Board,
        sender: Sender,
        groups: Groups,
    ) -> None:
        self._app, self._settings, self._store = app, settings, store
        self._outcomes, self._board, self._sender, self._groups = (
            results,
            board,
            sender,
            groups,
        )
        self._connection: Any = None
        self._warned: set[str] = set()
        self._ended: dict[str, Note] = {}
        """By queue, what the last worker said that ended since its code was outdated."""
        self._busy = BusyMessages(sender.send_same)

    def poll(self, *, everything: bool) -> int:
        """Ask for the outcomes of what has left its queue (or for everything awaited); returns how many were new."""
        chunks = self._board.chunks() if everything else self._taken()
        num_new = self._look_up([e for c in chunks for e in list(c.entries)])
        self._busy.send_some(self._settings.reconcile_s)
        return num_new

    def poll_groups(self, *, register: bool) -> None:
        """Send, or look after, the groups that this or another rank has completed; `register` puts our members into
        their slots again, should Redis have been emptied."""
        if register:
            self._groups.put_back_answered(self._outcomes)
        sealed = self._groups.poll(register=register)
        if sealed:
            self._sender.send_sealed(sealed)

    def read_notes(self) -> None:
        """Act on what workers say of requests that they could not read."""
        requests = [
            (c, r) for c in self._taken() for r in (c.request, *c.more_requests)
        ]
        for (chunk, request), note in zip(
            requests, self._outcomes.notes([r for _, r in requests]), strict=True
        ):
            if note is not None:
                self._outcomes.drop_notes([request])
                self._act_on(chunk, request, note)

    def send_missing(self) -> None:
        """Send again what is neither answered, claimed, queued, nor waiting for its model to load.

        What was claimed at an earlier look and is no more goes at once: its worker died, or gave it back.
        """
        now = time.monotonic()
        due = [c for c in self._board.chunks() if c.look_at <= now]
        missing = self._missing(due)
        self._look_up(
            [e for lost in missing.values() for e in lost]
        )  # an answer may have ended its claim meanwhile
        for chunk in due:
            lost = [e for e in missing.get(chunk, ()) if e.outcome is None]
            is_due = chunk.is_missed and now >= chunk.sent_at + chunk.pause_s
            if lost and (is_due or chunk.was_claimed):
                self._send_again(chunk, lost)
            else:
                chunk.is_missed = bool(
                    lost
                )  # it may be between its queue and its claim: look once more
                chunk.look_at = now + self._settings.reconcile_s

    def idle_queues(self, queues: Iterable[str]) -> str | None:
        """Which of these queues no worker serves that could read our messages, and what to start; None if all are."""
        try:
            self._outcomes.check_room()  # where a worker cannot write, its heartbeat is missing too
            workers = self._outcomes.workers()
            store = self._store.identity()
            reasons = [
                r
                for queue in sorted(queues)
                if (r := _why_idle(queue, workers, store, self._ended.get(queue)))
            ]
            if reasons and is_nearly_full(
                self._outcomes.redis
            ):  # it may have refused the heartbeats alone
                reasons.insert(0, FULL)
        except AWAY as error:
            return why_away(error)
        return "; ".join(reasons) or None

    def suspects(self, entries: Sequence[Entry]) -> str | None:
        """What is said of entries that were begun again and again without an answer; None if none was."""
        addresses = list(dict.fromkeys(a for e in entries for a in _in_hand_with(e)))
        num = sum(
            starts > USUAL_STARTS for starts in self._outcomes.num_starts(addresses)
        )
        if not num:
            return None
        return (
            f"{num} were begun more than {USUAL_STARTS} times and never answered: they, or what they need, may be what "
            "ends their worker (its log may tell); one that does is given up once its reward's timeout_s has passed"
        )

    def loads(self, entries: Iterable[Entry]) -> str | None:
        """Which workers still load the models that these entries wait for; None if none does."""
        specs = {e.spec.fingerprint: e.spec for e in entries}.values()
        workers = self._outcomes.workers()
        words = [
            f"{node} is still loading {spec.part.reward_model}"
            for spec in specs
            for node in _loaders(spec, workers)
        ]
        return "; ".join(words) or None

    def warn_of_idle_queues(self) -> None:
        """Log once which queue of what is under way has no worker."""
        self._warn_once(self.idle_queues({c.spec.queue for c in self._board.chunks()}))

    def disconnect(self) -> None:
        """Give back the broker's connection; the next call makes a new one."""
        if self._connection is not None:
            self._connection.release()
            self._connection = None

    # --- private ---------------------------------------------------------------------------------

    def _missing(self, due: Sequence[Chunk]) -> dict[Chunk, list[Entry]]:
        """Of these chunks, the entries that no task, queue or loading worker has in hand."""
        states = {
            queue: self._queue_state(queue) for queue in {c.spec.queue for c in due}
        }
        unqueued = [c for c in due if not states[c.spec.queue].holds(c.number)]
        if not unqueued:
            return {}
        workers = self._outcomes.workers()
        unqueued = [c for c in unqueued if not _loaders(c.spec, workers)]
        pairs = [
            (c, e, a)
            for c in unqueued
            for e in list(c.entries)
            for a in _in_hand_with(e)
        ]
        claimed = self._outcomes.claimed([a for _, _, a in pairs])
        in_hand = {
            e
            for (_, e, _), is_claimed in zip(pairs, claimed, strict=True)
            if is_claimed
        }
        missing: dict[Chunk, list[Entry]] = {}
        for chunk in unqueued:
            entries = list(chunk.entries)
            lost = [e for e in entries if e not in in_hand]
            if len(lost) < len(entries) and chunk.spec.how in (
                "each",
                "model",
            ):  # a group's parts come and go
                chunk.was_claimed = True
            if lost:
                missing[chunk] = lost
        return missing

    def _taken(self) -> list[Chunk]:
        """Messages under way that have left their queue, as far as the numbers say: workers may have answered them."""
        chunks = self._board.chunks()
        states = {
            q: self._outcomes.queue_state(q, num_waiting=1)
            for q in {c.spec.queue for c in chunks}
        }
        return [c for c in chunks if not states[c.spec.queue].holds(c.number)]

    def _look_up(self, entries: Sequence[Entry]) -> int:
        """Ask for these outcomes; returns how many were new."""
        if not entries:
            return 0
        found = self._outcomes.look_up([e.address for e in entries])
        new = {
            e: o
            for e, o in zip(entries, found, strict=True)
            if o is not None and _answers(o, e)
        }
        if new:
            self._board.answer(new)
            self._busy.count_answers(new)
        return len(new)

    def _act_on(self, chunk: Chunk, request: str, note: Note) -> None:
        # A worker that has our store, but not the identity it had before it was emptied: gone as well.
        is_gone = note.reason == "gone" or (
            note.reason == "store" and note.store == self._store.identity()
        )
        if is_gone and chunk.is_adopted:
            self._give_up(list(chunk.entries))
        elif is_gone:
            self._send_again(chunk, list(chunk.entries))
        elif note.reason == "busy":
            self._board.trouble = note.detail
            self._busy.add(chunk, request)
        elif note.reason == "stale":  # that worker takes no more
            words = f"{note.worker} ended: {note.detail}"
            self._ended[chunk.spec.queue] = note
            self._board.trouble = words
            self._warn_once(f"{words}; its samples are sent again")
            self._sender.send_same(chunk, request)
        else:  # another worker of this queue may do better; not at once, or the two play ball
            words = f"worker {note.worker} on queue {chunk.spec.queue}: {note.detail}"
            self._board.trouble = words
            self._warn_once(words)
            chunk.is_missed = True
            chunk.look_at = time.monotonic() + chunk.pause_s

    def _send_again(self, chunk: Chunk, entries: list[Entry]) -> None:
        if chunk.is_adopted and chunk.request.startswith(ELSEWHERE):
            chunk.look_at = time.monotonic() + self._settings.reconcile_s
            return  # its rank sends it again, or who adopts that one's ticket
        log.info(
            "sent again queue=%s num_samples=%d request=%s",
            chunk.spec.queue,
            len(entries),
            chunk.request,
        )
        # Pauses grow where messages lead nowhere; where a worker took one and died, the next is looked after as soon.
        chunk.pause_s = (
            self._settings.reconcile_s
            if chunk.was_claimed
            else min(2 * chunk.pause_s, MAX_PAUSE_S)
        )
        chunk.is_missed = chunk.was_claimed = False
        chunk.sent_at = time.monotonic()
        chunk.look_at = chunk.sent_at + self._settings.reconcile_s
        if not chunk.is_adopted:
            self._sender.send_again(entries)
        elif self._store.renew([chunk.request], self._settings.payload_ttl_s):
            self._give_up(entries)
        else:
            self._sender.send_same(chunk, chunk.request)

    def _give_up(self, entries: Sequence[Entry]) -> None:
        """Media that another process submitted are gone."""
        failure = Failure(
            kind="failed",
            message="its media left the payload store with the process that held them",
        )
        self._board.answer(
            {e: Outcome(failure=failure, attempt=e.attempt) for e in entries}
        )

    def _queue_state(self, queue: str) -> QueueState:
        return self._outcomes.queue_state(queue, self._num_in_queue(queue))

    def _num_in_queue(self, queue: str) -> int:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
        return num_in_queue(self._connection, queue)

    def _warn_once(self, words: str | None) -> None:
        if words and words not in self._warned:
            self._warned.add(words)
            log.warning("%s", words)


def _in_hand_with(entry: Entry) -> list[str]:
    """Addresses of which a claim says that an entry is being scored: a group's is while one of its parts is."""
    return [
        entry.address,
        *(p.address for p in (entry.comparisons or entry.members) if p.address),
    ]


def _loaders(spec: RewardSpec, workers: Sequence[Heartbeat]) -> list[str]:
    """Which workers load the model of a reward that waits for them; none does where another worker has it: a load that
    hangs is no reason to wait where somebody else could score."""
    own = [w for w in workers if spec.queue in w.queues]
    if any(spec.part.fingerprint in w.loaded for w in own):
        return []
    return [w.node for w in own if spec.part.fingerprint in w.loading]


def _answers(outcome: Outcome, entry: Entry) -> bool:
    return outcome.is_final or outcome.attempt >= entry.attempt


def _why_idle(
    queue: str, workers: Sequence[Heartbeat], store: str, ended: Note | None
) -> str | None:
    """Why a queue gets nowhere, or None if some worker serves it.

    Args:
        ended: What a worker of it said that ended since its code was outdated.
    """
    own = [w for w in workers if queue in w.queues]
    start = f"celery -A tasks worker -Q {queue}" + (
        " --concurrency 32" if queue == VLM else ""
    )
    if not own and ended:
        supervised = "start it again, unless its supervisor does"
        return f"queue {queue!r} has no worker: {ended.worker} ended: {ended.detail}; {supervised}: {start}"
    if not own:
        return f"queue {queue!r} has no worker; start one: {start}"
    if all(w.wire != WIRE_VERSION for w in own):
        versions = ", ".join(f"{w.node} speaks wire version {w.wire}" for w in own)
        nobody = f"queue {queue!r} has no worker that understands this client"
        return f"{nobody} (wire version {WIRE_VERSION}): {versions}; install the same rewardq on both and restart them"
    if all(w.store != store for w in own):
        nodes = ", ".join(w.node for w in own)
        return f"no worker of queue {queue!r} uses this client's payload store ({nodes}); set REWARDQ_PAYLOAD_URL alike"
    return None
