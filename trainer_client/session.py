"""What a client has in one process: connections, threads and the board, and how the trainer waits for them."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis

from tasks.celery_app import client_outcomes
from tasks.errors import CollectTimeoutError, RedisRefusalError, RewardError
from tasks.groups import GroupSlots
from tasks.messages import Failure
from tasks.outcomes import ClientOutcomes
from tasks.payloads import PayloadStore, open_store
from tasks.rewards import RewardConfig
from tasks.servers.connections import LOST, why_away
from tasks.servers.needs import check_servers
from tasks.settings import Settings
from trainer_client.board import Board, Slot
from trainer_client.groups import Groups
from trainer_client.outgoing import Outgoing
from trainer_client.patience import AWAY
from trainer_client.progress import bars
from trainer_client.ranks.rank_lock import KEEP_EVERY_S, Lease
from trainer_client.reconcile import Reconciler
from trainer_client.runs.answerers import Answerers
from trainer_client.runs.known import Run
from trainer_client.sender import Sender
from trainer_client.steps.step_log import Waiting
from trainer_client.watcher import Watcher

log = logging.getLogger(__name__)

NO_WORKER_AFTER_S = 2.0
"""Heartbeats are asked for when `collect()` has waited for this long, to say early that a queue has no worker."""

ASK_S = 2.0
"""Redis is asked why something is late for so long at most: the deadline has passed then, or is near."""

SAY_EVERY_S = 60.0
"""How often the log says that `submit()` waits, and why."""

LOOK_EVERY_S = 0.25
"""How often a wait in `collect()` looks at the clock, and shows how far it is."""


def check_stores(settings: Settings, queues: Sequence[str]) -> None:
    """Raises `RedisUnreachableError` or `EvictionError` unless every server and folder of `settings` can be used."""
    check_servers(settings, "trainer", queues)
    if settings.payloads.startswith("file:"):
        with contextlib.closing(open_store(settings)) as store:
            store.check()


class Session:
    """A client in one process. A forked child gets its own.

    Args:
        app: Celery's; `app.settings` says where the servers are.
        lease: The place of this rank, kept while the session lives.
        config: The rewards, which Redis is told.
    """

    def __init__(
        self,
        app: Any,
        run: str,
        launch: str,
        rank: int,
        world_size: int,
        lease: Lease,
        config: RewardConfig,
    ) -> None:
        settings: Settings = app.settings
        with contextlib.suppress(*LOST):  # else the watcher takes it once Redis is back
            lease.take()
        self.pid = os.getpid()
        self.outcomes: ClientOutcomes = client_outcomes(app)
        self.store: PayloadStore = open_store(settings)
        self.board = Board(client_id=uuid.uuid4().hex[:12])
        slots = (
            GroupSlots(self.outcomes.redis, run, launch, settings.result_ttl_s)
            if world_size > 1
            else None
        )
        self.groups = Groups(self.board, run, rank, slots)
        outgoing = Outgoing(app, settings, self.store, self.outcomes, self.board, run)
        self.sender = Sender(
            settings,
            self.store,
            self.outcomes,
            self.board,
            run,
            rank,
            groups=self.groups,
            outgoing=outgoing,
        )
        self.reconciler = Reconciler(
            app,
            settings,
            self.store,
            self.outcomes,
            self.board,
            self.sender,
            groups=self.groups,
        )
        self.lease = lease
        answerers = Answerers(run)
        self.board.on_answer = answerers.see
        known = Run(self.outcomes.redis, run, settings.result_ttl_s)
        self.watcher = Watcher(
            settings,
            self.store,
            self.board,
            self.reconciler,
            lease.keep,
            KEEP_EVERY_S,
            tell_run=lambda: known.tell(config),
            compare_codes=lambda: answerers.compare(known),
        )

    def close(self) -> None:
        """End the threads and give back the connections."""
        self.sender.close()
        self.watcher.close()
        self.store.close()

    def raise_if_broken(self) -> None:
        """Raise what ended a background thread."""
        broken = self.board.broken
        if isinstance(
            broken, RewardError
        ):  # none of ours: another process took this rank
            raise broken
        if isinstance(broken, redis.ResponseError):
            raise RedisRefusalError(
                f"a Redis refuses what it allowed when this client was made: {broken}; look at the rights of its user "
                "(`ACL GETUSER`) and at its configuration, then make a new client"
            ) from broken
        if broken is not None:
            raise RewardError(
                f"a background thread ended by a bug: {broken!r}"
            ) from broken

    def wait_for_backlog(self, max_backlog: int, timeout_s: float) -> None:
        """Wait while more than `max_backlog` samples are accepted and not yet sent. Raises `CollectTimeoutError`."""
        board = self.board
        if self._is_below(max_backlog, 0.0):
            return
        ends_at, say_at = time.monotonic() + timeout_s, time.monotonic() + SAY_EVERY_S
        with self.sender.hurry():
            while not self._is_below(
                max_backlog, min(say_at, ends_at) - time.monotonic()
            ):
                why = self.why_unsent()
                if time.monotonic() >= ends_at:
                    raise CollectTimeoutError(
                        f"nothing was queued: {board.num_unsent} samples submitted before, more than "
                        f"REWARDQ_MAX_BACKLOG={max_backlog}, were not sent within {timeout_s:g} s{_because(why)}",
                        None,
                    )
                log.warning(
                    "submit waits num_unsent=%d%s", board.num_unsent, _because(why)
                )
                say_at += SAY_EVERY_S

    def flush(self, timeout_s: float) -> None:
        """Wait until everything submitted has been encoded and sent. Raises `CollectTimeoutError`."""
        with self.sender.hurry():
            is_sent = self._is_below(0, timeout_s)
        if not is_sent:
            raise CollectTimeoutError(
                f"{self.board.num_unsent} samples were not sent within {timeout_s:g} s{_because(self.why_unsent())}",
                None,
            )

    def wait(
        self,
        slots: Sequence[Slot],
        deadline: float,
        progress: bool | None,
        waiting: Waiting | None = None,
    ) -> bool:
        """Wait until all slots are done or the deadline (monotonic); whether they are.

        `waiting` tells the log meanwhile what is waited for.
        """
        board = self.board
        names = tuple(
            dict.fromkeys(spec.name for slot in slots for spec in slot.rewards)
        )
        left = list(slots)
        look_for_workers_at = time.monotonic() + NO_WORKER_AFTER_S
        releases = {slot.place for slot in slots}
        with (
            self.sender.hurry(releases),
            self._watching(),
            bars(names, len(slots), progress) as report,
        ):
            while True:
                with board.changed:
                    left_s = deadline - time.monotonic()
                    board.changed.wait_for(
                        lambda: _are_done(left) or board.broken,
                        max(0.0, min(left_s, LOOK_EVERY_S)),
                    )
                    is_complete = not left
                if report is not None:
                    report({name: _count(slots, name) for name in names})
                if is_complete or board.broken is not None or left_s <= 0:
                    break
                if waiting is not None:
                    waiting.tell(lambda: self.what_is_missing(slots))
                if time.monotonic() > look_for_workers_at:
                    look_for_workers_at = float("inf")
                    self.watcher.ask_about_workers()
        self.raise_if_broken()
        return is_complete

    def why_late(self, slots: Sequence[Slot], timeout_s: float) -> Failure:
        """The client's own reason for what is missing at the deadline; never stored."""
        late = sum(not slot.is_done for slot in slots)
        why = self._why_missing(slots)
        return Failure(
            kind="timeout",
            message=f"{late} of {len(slots)} samples had no answer after {timeout_s:g} s{_because(why)}",
        )

    def what_is_missing(self, slots: Sequence[Slot]) -> str:
        """Which rewards have no answer yet, of how many samples, and why as far as is known."""
        names = dict.fromkeys(spec.name for slot in slots for spec in slot.rewards)
        num_left = {
            name: sum(not slot.is_done_for(name) for slot in slots) for name in names
        }
        left = ", ".join(
            f"{name} ({num} of {len(slots)} samples)"
            for name, num in num_left.items()
            if num
        )
        return f"{left}{_because(self._why_missing(slots))}"

    def _why_missing(self, slots: Sequence[Slot]) -> str | None:
        queues = {
            spec.queue
            for slot in slots
            for spec in slot.rewards
            if not slot.is_done_for(spec.name)
        }
        awaited = [e for slot in slots for e in slot.known_entries if e.outcome is None]

        def ask() -> str | None:
            self.groups.look_at_slots()
            reconciler = self.reconciler
            return (
                reconciler.idle_queues(queues)
                or reconciler.loads(awaited)
                or reconciler.suspects(awaited)
            )

        return _ask(ask) or self.board.trouble

    def why_unsent(self) -> str | None:
        """What keeps samples from being sent: a Redis that is away, a full store and a queue without a worker."""
        queues = {chunk.spec.queue for chunk in self.board.chunks()}
        idle = _ask(lambda: self.reconciler.idle_queues(queues))
        return "; ".join(filter(None, (self.board.trouble, idle))) or None

    def give_up(self, slots: Sequence[Slot]) -> None:
        """Wait for these slots no more."""
        self.board.abandon(slots)
        self.groups.forget(slots)

    def _is_below(self, num_unsent: int, timeout_s: float) -> bool:
        """Whether at most so many samples are accepted and not yet sent, within `timeout_s`."""
        board = self.board
        with board.changed:
            is_below = board.changed.wait_for(
                lambda: board.broken or board.num_unsent <= num_unsent,
                max(0.0, timeout_s),
            )
        self.raise_if_broken()
        return bool(is_below)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        self.watcher.hurry(is_waiting=True)
        try:
            yield
        finally:
            self.watcher.hurry(is_waiting=False)


def _ask(question: Callable[[], str | None]) -> str | None:
    """What Redis says, or that it is away: within `ASK_S`, whatever its sockets would wait for."""
    answers: list[str | None] = []

    def ask() -> None:
        try:
            answers.append(question())
        except AWAY as error:
            answers.append(why_away(error))

    thread = threading.Thread(target=ask, name="rewardq-ask", daemon=True)
    thread.start()
    thread.join(ASK_S)
    return (
        answers[0] if answers else f"Redis is away: it has not answered for {ASK_S:g} s"
    )


def _are_done(left: list[Slot]) -> bool:
    """Whether every slot has its outcomes; takes those from the end that have, so that no slot is looked at in vain.

    The board changes with every sample: to look at all of them each time would take the square of their number.
    """
    while left and left[-1].is_done:
        left.pop()
    return not left


def _count(slots: Sequence[Slot], name: str) -> tuple[int, int]:
    """How many slots have their outcome for a reward, and how many of these have failed."""
    return sum(slot.is_done_for(name) for slot in slots), sum(
        slot.has_failed_for(name) for slot in slots
    )


def _because(why: str | None) -> str:
    return f": {why}" if why else ""
