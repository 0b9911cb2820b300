"""The thread that owns the engine's state, and those that do its I/O.

Callers and lanes put events into one queue; the loop takes them, lets the state decide, hands the actions to the lanes
(`actions.Lane`), and wakes whoever waits. Nobody else touches the state: `lock` is held while it changes, for those who
read it.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from tasks.errors import RankTakenError, RedisRefusalError, RewardError
from tasks.servers.connections import why_away
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.backend import Backend
from trainer_client.engine.model import NEVER, StepKey
from trainer_client.engine.server_errors import AWAY, has_no_room
from trainer_client.engine.state import EngineState
from trainer_client.engine.why_late import Source

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0
"""Pauses between two tries of a call that must be made."""

MAX_DOUBLINGS = 10
"""Of a pause: an outage of a day has thousands of tries, and no float holds two to the power of that."""

LAST_POLL_PAUSE_S = 1.0
"""Longest pause between two tries of a call whose answer somebody may be waiting for."""

SAY_EVERY_S = 60.0
"""How often the log says that a lane waits for its server, or `submit()` for the backlog, and why."""

EVENTS_AT_ONCE = 256
"""So many events are taken up at most before those who wait are told."""

CLOSE_S = 5.0
"""How long the end waits for calls under way."""

MAX_WAIT_S = 5.0
"""The loop looks around at least this often."""

SENDS = frozenset({do.Lane.POOL, do.Lane.PUBLISH})
"""Lanes whose server holds up what is sent; the others hold up what is read."""

TIMED = {
    do.Encode: "encode_s",
    do.Store: "store_s",
    do.Restore: "store_s",
    do.Publish: "send_s",
}
"""Under which name the seconds of a call are summed."""


@dataclass(frozen=True, slots=True)
class _Failed:
    """A call could not be made."""

    call: _Call
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Done:
    """A call was made."""

    call: _Call
    event: ev.Event


@dataclass(slots=True, eq=False)
class _Call:
    """An action on its way."""

    action: Any
    num_failures: int = 0
    started: float = 0.0
    ended: float = 0.0

    @property
    def lane(self) -> do.Lane:
        """Whose threads perform it."""
        lane: do.Lane = self.action.lane
        return lane


@dataclass(slots=True)
class Chore:
    """Something that is done every so many seconds on the lane of the result backend, whatever is awaited."""

    period_s: float
    do_it: Callable[[], object]
    is_due_at_once: bool = False
    due_at: float = 0.0
    is_running: bool = False
    lane: do.Lane = do.Lane.POLL


class Loop:
    """One engine's threads.

    Args:
        announce: Told of each outcome that arrives, on the loop's thread.
        chores: What the client has done regularly.
    """

    def __init__(
        self,
        state: EngineState,
        backend: Backend,
        num_encoders: int,
        announce: Callable[[do.Announce], None],
        chores: Sequence[Chore] = (),
    ) -> None:
        self.state = state
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        """Notified whenever something has happened that somebody may wait for."""
        self.broken: BaseException | None = None
        """What ended a thread: a bug of ours, or another process that is this rank now. Every wait raises it."""
        self._backend, self._announce = backend, announce
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lanes: dict[do.Lane, queue.SimpleQueue[_Call | None]] = {}
        self._retries: list[tuple[float, int, _Call]] = []
        self._numbers = itertools.count()
        self._failing: dict[do.Lane, set[_Call]] = {lane: set() for lane in do.Lane}
        """By lane, the calls whose server is away."""
        self._say_at: dict[do.Lane, float] = {}
        self._warned: set[str] = set()
        self._seconds: dict[str, float] = defaultdict(float)
        self._chores = [_started(chore) for chore in chores]
        self._is_closing = threading.Event()
        self._workers: dict[do.Lane, list[threading.Thread]] = {}
        for lane in do.Lane:
            num_threads = num_encoders if lane is do.Lane.POOL else 1
            self._lanes[lane] = queue.SimpleQueue()
            self._workers[lane] = [
                self._thread_of(lane, number) for number in range(num_threads)
            ]
        self._owner = threading.Thread(
            target=self._run, name="rewardq-loop", daemon=True
        )
        self._threads = [self._owner, *itertools.chain(*self._workers.values())]
        for thread in self._threads:
            thread.start()

    def _thread_of(self, lane: do.Lane, number: int) -> threading.Thread:
        name = f"rewardq-{lane.value}" + (f"-{number}" if number else "")
        return threading.Thread(target=self._work, args=(lane,), name=name, daemon=True)

    # --- for callers -----------------------------------------------------------------

    def put(self, event: ev.Event) -> None:
        """Tell the state something. Returns at once."""
        self._inbox.put(event)

    @contextlib.contextmanager
    def waiting(self, steps: frozenset[StepKey] = frozenset()) -> Iterator[None]:
        """Somebody waits meanwhile, and collects these steps."""
        waiter = next(self._numbers)
        self.put(ev.WaitBegan(waiter, steps))
        try:
            yield
        finally:
            self.put(ev.WaitEnded(waiter))

    def wait_for(self, is_over: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until something is so, the loop is broken, or the time has passed; whether it is so."""
        with self.changed:
            self.changed.wait_for(
                lambda: is_over() or self.broken is not None, max(0.0, timeout_s)
            )
            return is_over()

    def raise_if_broken(self) -> None:
        """Raise what ended a background thread."""
        broken = self.broken
        if broken is None and not self.is_alive:
            raise RewardError("the engine's thread is gone: this client was closed")
        if isinstance(broken, RewardError):  # no bug: another process took this rank
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

    @property
    def is_alive(self) -> bool:
        """Whether events are still taken up."""
        return self._owner.is_alive()

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent by the lanes since this was asked last, summed over threads, by name."""
        with self.lock:
            seconds, self._seconds = self._seconds, defaultdict(float)
        return {name: seconds[name] for name in ("encode_s", "store_s", "send_s")}

    def do_once(self, lane: do.Lane, do_it: Callable[[], object]) -> None:
        """Have something done on a lane's thread; again and again while its server is away."""
        self._inbox.put(_Call(Chore(NEVER, do_it, lane=lane)))

    def close(self) -> None:
        """End the threads; what is not sent stays unsent, what nobody needs any more is freed."""
        self._is_closing.set()
        self._inbox.put(ev.Tick())
        ends_at = time.monotonic() + CLOSE_S
        self._owner.join(timeout=CLOSE_S)  # what it frees in its last turn comes first
        for lane, threads in self._workers.items():
            for _ in threads:
                self._lanes[lane].put(None)
        for thread in self._threads:
            thread.join(timeout=max(0.1, ends_at - time.monotonic()))
        if self.broken is None and not self.is_alive:
            self._take_up_the_rest()

    def _take_up_the_rest(self) -> None:
        """What was said before the end: samples that nobody waits for any more have payloads to free."""
        now = time.monotonic()
        names: list[str] = []
        while not self._inbox.empty():
            for action in self._take_up(self._inbox.get_nowait(), now):
                if isinstance(action, do.Free):
                    names += action.names
        self.state.core.payloads.free_kept()
        names += self.state.core.payloads.take_to_free()
        # While its lane still hangs the store does: the caller must not hang with it.
        is_hanging = any(one.is_alive() for one in self._workers[do.Free.lane])
        if names and not is_hanging:
            with contextlib.suppress(*AWAY, OSError):
                self._backend.perform(do.Free(names))

    # --- the loop's thread -----------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closing.is_set():
                self._turn()
        except BaseException as error:
            # A bug of ours must end every wait, not only this thread.
            log.exception("the engine's loop ended")
            self._break_with(error)

    def _turn(self) -> None:
        """Wait for something to happen, and take it up."""
        things = self._next_things()
        now = time.monotonic()
        actions: list[Any] = []
        with self.changed:
            for thing in things:
                actions += self._take_up(thing, now)
            if now >= self.state.wake_at:
                actions += self.state.apply(ev.Tick(), now)
            if self.state.core.has_changed:
                self.state.core.has_changed = False
                self.changed.notify_all()
        for action in actions:
            self._start(action)
        self._try_again(now)
        self._start_chores(now)

    def _next_things(self) -> list[Any]:
        """What has happened since, or nothing if the time for something has come."""
        wake_at = min(
            self.state.wake_at,
            self._retries[0][0] if self._retries else MAX_WAIT_S + time.monotonic(),
            *(chore.due_at for chore in self._chores if not chore.is_running),
        )
        pause_s = min(MAX_WAIT_S, wake_at - time.monotonic())
        things = []
        try:
            if pause_s > 0:
                things.append(self._inbox.get(timeout=pause_s))
            while len(things) < EVENTS_AT_ONCE:
                things.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        return things

    def _take_up(self, thing: Any, now: float) -> list[Any]:
        if isinstance(thing, _Call):
            return [thing]
        if isinstance(thing, _Failed):
            self._is_away(thing.call, thing.error, now)
            return []
        if isinstance(thing, _Done):
            self._is_back(thing.call)
            if isinstance(thing.call.action, Chore):
                return []
            name = TIMED.get(type(thing.call.action))
            if name is not None:
                self._seconds[name] += thing.call.ended - thing.call.started
            thing = thing.event
        return self.state.apply(thing, now)

    def _start(self, action: do.Action | _Call) -> None:
        if isinstance(action, _Call):
            self._lanes[action.lane].put(action)
        elif isinstance(action, do.Announce):
            self._announce(action)
        elif isinstance(action, do.Warn):
            self.warn_once(action.words)
        else:
            self._lanes[action.lane].put(_Call(action))

    def warn_once(self, words: str) -> None:
        """Let the log say this, unless it has."""
        if words not in self._warned:
            self._warned.add(words)
            log.warning("%s", words)

    def _start_chores(self, now: float) -> None:
        for chore in self._chores:
            if not chore.is_running and now >= chore.due_at:
                chore.is_running = True
                chore.due_at = now + chore.period_s
                self._lanes[chore.lane].put(_Call(chore))

    # --- servers that are away ---------------------------------------------------------

    def _is_away(self, call: _Call, error: BaseException, now: float) -> None:
        """Make the call again later, and say meanwhile why it waits."""
        call.num_failures += 1
        is_sent = call.lane in SENDS
        longest_s = LAST_PAUSE_S if is_sent else LAST_POLL_PAUSE_S
        num_doublings = min(call.num_failures - 1, MAX_DOUBLINGS)
        pause_s = min(longest_s, FIRST_PAUSE_S * 2**num_doublings)
        heapq.heappush(self._retries, (now + pause_s, next(self._numbers), call))
        self._failing[call.lane].add(call)
        source = Source.SENDING if is_sent else Source.POLLING
        self.state.why_late.set(source, _why_it_waits(call, error), call.lane.value)
        if now >= self._say_at.get(call.lane, 0.0):
            self._say_at[call.lane] = now + SAY_EVERY_S
            what = "sending" if is_sent else "polling"
            log.warning("%s waits for redis error=%s", what, type(error).__name__)

    def _is_back(self, call: _Call) -> None:
        """The server of a lane answers, at least this call. Another call of the lane may still be failing."""
        if isinstance(call.action, Chore):
            call.action.is_running = False
        failing = self._failing[call.lane]
        if call not in failing:
            return
        failing.remove(call)
        if failing:
            return
        source = Source.SENDING if call.lane in SENDS else Source.POLLING
        self.state.why_late.withdraw(source, call.lane.value)

    def _try_again(self, now: float) -> None:
        while self._retries and self._retries[0][0] <= now:
            _, _, call = heapq.heappop(self._retries)
            self._lanes[call.lane].put(call)

    def _break_with(self, error: BaseException) -> None:
        with self.changed:
            self.broken = self.broken or error
            self.changed.notify_all()

    # --- the lanes' threads ------------------------------------------------------------

    def _work(self, lane: do.Lane) -> None:
        calls = self._lanes[lane]
        while (call := calls.get()) is not None:
            if self._is_closing.is_set() and not isinstance(call.action, do.Free):
                continue
            try:
                self._make(call)
            except BaseException as error:  # as in the loop
                self._break_with(error)
                if not isinstance(error, RankTakenError):  # which says all by itself
                    log.exception("a call of the engine failed")
                self._is_closing.set()
                self._inbox.put(ev.Tick())
                return

    def _make(self, call: _Call) -> None:
        call.started = time.perf_counter()
        try:
            if isinstance(call.action, Chore):
                call.action.do_it()
                event: ev.Event = ev.Tick()
            else:
                event = self._backend.perform(call.action)
        except AWAY as error:
            self._inbox.put(_Failed(call, error))
            return
        except OSError as error:
            if not has_no_room(error):
                raise
            self._inbox.put(_Failed(call, error))
            return
        call.ended = time.perf_counter()
        self._inbox.put(_Done(call, event))


def _why_it_waits(call: _Call, error: BaseException) -> str:
    what = "sending" if call.lane in SENDS else "polling"
    if has_no_room(error):
        return f"{what} waits for room in the payload store: {error}"
    return f"{what} waits: {why_away(error)}"


def _started(chore: Chore) -> Chore:
    now = time.monotonic()
    chore.due_at = now if chore.is_due_at_once else now + chore.period_s
    return chore
