"""The thread that keeps a client up to date: polls, reconciles, lets payloads live on, frees what nobody needs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tasks.errors import RankTakenError
from tasks.payloads import PayloadStore
from tasks.servers.connections import why_away
from tasks.settings import Settings
from trainer_client.board import Board
from trainer_client.patience import AWAY
from trainer_client.reconcile import Reconciler

log = logging.getLogger(__name__)

FASTEST_S, SLOWEST_S = 0.005, 0.1
"""Pace of polling while someone waits in `collect()`: fast while outcomes come, slower while none do."""

IDLE_PACE_S = 0.5
"""Pace while nobody waits: enough to free payloads and to notice losses."""

AWAY_PACE_S = 1.0
"""Pace while Redis is away."""

NOTES_EVERY_S = 0.5
"""How often workers' notes are read."""

EVERYTHING_EVERY = 5
"""Once in so many reconciliations outcomes are asked for whose message is still queued: another client may have
had the same scored."""

TELL_EVERY_S = 600.0
"""How often Redis is told what this run's rewards are, at most: it may have been emptied."""

POLL_SHARE = 5
"""Between two polls at least so many times the time that one takes, so that polling is no load for Redis."""

LONGEST_PAUSE_S = 1.0
"""But no longer: a poll may also have taken long since Redis could not be reached."""


class _Every:
    """Something due every so many seconds."""

    def __init__(
        self, period_s: float, call: Callable[[], object], *, is_due: bool = False
    ) -> None:
        self._period_s, self._call = period_s, call
        self._at = time.monotonic() + (0.0 if is_due else period_s)

    def run_if_due(self) -> Exception | None:
        """Run it if it is due; returns why its server could not be asked, after which it is due at once."""
        if time.monotonic() < self._at:
            return None
        try:
            self._call()
        except AWAY as error:
            return error
        self._at = time.monotonic() + self._period_s
        return None


class Watcher:
    """Runs a reconciler at an adaptive pace until it is closed."""

    def __init__(
        self,
        settings: Settings,
        store: PayloadStore,
        board: Board,
        reconciler: Reconciler,
        keep_lease: Callable[[], None],
        lease_every_s: float,
        tell_run: Callable[[], None],
        compare_codes: Callable[[], None],
    ) -> None:
        self._settings, self._store, self._board, self._reconciler = (
            settings,
            store,
            board,
            reconciler,
        )
        self._num_waiting = 0
        self._is_away = False
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._pace_s = FASTEST_S
        self._due = (
            _Every(lease_every_s, keep_lease),
            _Every(NOTES_EVERY_S, reconciler.read_notes),
            _Every(
                0.0, compare_codes
            ),  # it writes: a server that is full must not keep the rest from its turn
            _Every(settings.reconcile_s, self._reconcile),
            _Every(
                EVERYTHING_EVERY * settings.reconcile_s,
                lambda: reconciler.poll(everything=True),
            ),
            _Every(min(60.0, settings.payload_ttl_s / 4), self._renew),
            _Every(min(TELL_EVERY_S, settings.result_ttl_s / 4), tell_run, is_due=True),
        )
        self._is_asked_about_workers = False
        self._thread = threading.Thread(
            target=self._run, name="rewardq-watch", daemon=True
        )
        self._thread.start()

    def hurry(self, *, is_waiting: bool) -> None:
        """Someone starts to wait in `collect()`, or has stopped."""
        with self._board.lock:
            self._num_waiting += 1 if is_waiting else -1
        self._pace_s = FASTEST_S
        self._wake.set()

    def ask_about_workers(self) -> None:
        """Someone has waited for long enough to wonder whether there are workers: look, and warn."""
        self._is_asked_about_workers = True

    def close(self) -> None:
        """End the thread; free what can be freed."""
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                pause_s = self._round()
                if self._wake.wait(pause_s):
                    self._wake.clear()
            self._round()
        except RankTakenError as error:
            self._board.break_with(error)
        except (
            BaseException
        ) as error:  # a bug of ours must end every wait, not only this thread
            log.exception("the watcher ended")
            self._board.break_with(error)
        finally:
            self._reconciler.disconnect()

    def _round(self) -> float:
        """Poll once, do what is due, and return how long to pause."""
        started = time.monotonic()
        try:
            self._reconciler.poll_groups(register=False)
            num_new = self._reconciler.poll(everything=False)
            lost = [
                error for due in self._due if (error := due.run_if_due()) is not None
            ]
            self._free()
        except AWAY as error:
            return self._pause_away(error)
        if lost:  # of several servers one may be away: the others go on
            return self._pause_away(lost[0])
        if self._is_away:
            self._is_away, self._board.trouble = False, None
        if not self._num_waiting:
            return IDLE_PACE_S
        self._pace_s = FASTEST_S if num_new else min(1.5 * self._pace_s, SLOWEST_S)
        return max(
            self._pace_s,
            min(LONGEST_PAUSE_S, POLL_SHARE * (time.monotonic() - started)),
        )

    def _pause_away(self, error: BaseException) -> float:
        self._reconciler.disconnect()
        if not self._is_away:
            log.warning("polling waits for redis error=%s", type(error).__name__)
        self._is_away, self._board.trouble = True, f"polling waits: {why_away(error)}"
        return AWAY_PACE_S

    def _reconcile(self) -> None:
        self._reconciler.poll_groups(register=True)
        self._reconciler.send_missing()
        if self._is_asked_about_workers:
            self._is_asked_about_workers = False
            self._reconciler.warn_of_idle_queues()

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
