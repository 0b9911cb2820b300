"""The scheduler: a virtual clock, simulated threads, processes that can die, stall and lose their servers.

Every simulated thread is a greenlet, and only one runs at a time, until it asks for something of the world: a call of
a server, a sleep, a wait. So a schedule is a function of its seed. Real code must not reach a wall clock, the order of
a set of texts, or random numbers of its own while it runs here.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import greenlet

T = TypeVar("T")

LATER = float("inf")

MAX_EVENTS = 200_000
"""A schedule that takes more waits for ever, in a circle."""


class KilledError(BaseException):
    """This process is dead: unwinds its threads. Nothing of a dead process has an effect on the world any more."""


class OutOfTimeError(Exception):
    """A schedule took more virtual time, or more events, than anything in it explains."""


class BrokenPropertyError(AssertionError):
    """Something happened that must never happen.

    Args:
        name: Which property does not hold.
        words: What was seen.
    """

    def __init__(self, name: str, words: str) -> None:
        super().__init__(name, words)
        self.name, self.words = name, words

    def __str__(self) -> str:
        return f"{self.name}: {self.words}"


class Process:
    """A simulated process: threads that die, and stand still, together."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.is_dead = False
        self.stalled_until = 0.0
        self.cut_off_until = 0.0
        """Its servers cannot be reached from it until then."""
        self.last_hit = -1.0
        """When a fault last hit it (a lost call, a stall, its death)."""
        self.threads: list[Thread] = []
        self.random = world.random_of(name)
        self.on_death: list[Callable[[], None]] = []

    def spawn(self, call: Callable[[], None], name: str) -> Thread:
        """Start a thread; it runs from the next switch on."""
        thread = Thread(self, call, name)
        self.threads.append(thread)
        self.world.wake(thread, self.world.now)
        return thread

    def hit(self) -> None:
        """A fault hits it now."""
        self.last_hit = self.world.now

    def kill(self, why: str) -> None:
        """End it at once, as `kill -9` does."""
        if self.is_dead:
            return
        self.hit()
        self.world.say(self, "dies", why)
        self.is_dead = True
        self.stalled_until = 0.0
        for thread in self.threads:
            if not thread.is_done and thread is not self.world.current:
                self.world.wake(thread, self.world.now)
        for call in self.on_death:
            call()

    def stall(self, seconds: float) -> None:
        """None of its threads runs for so long: it is stopped, or a C call holds the interpreter."""
        self.hit()
        self.stalled_until = max(self.stalled_until, self.world.now + seconds)

    def cut_off(self, seconds: float) -> None:
        """It reaches no server for so long."""
        self.hit()
        self.cut_off_until = max(self.cut_off_until, self.world.now + seconds)

    def hit_since(self, then: float) -> bool:
        """Whether a fault has hit it since `then`, or does now."""
        return self.last_hit >= then or self.stalled_until > then or self.cut_off_until > then


class Thread:
    """One greenlet of a process."""

    def __init__(self, process: Process, call: Callable[[], None], name: str) -> None:
        self.process, self.name = process, name
        self.ticket = 0
        """Number of the wake-up that counts; an earlier one is stale."""
        self.is_done = False
        self._call = call
        self.greenlet: Any = greenlet.greenlet(self._run, process.world.hub)

    def _run(self) -> None:
        world = self.process.world
        try:
            if not self.process.is_dead:
                self._call()
        except KilledError:
            pass
        except BaseException as error:
            if not self.process.is_dead and world.failure is None:
                world.failure = error
        self.is_done = True


class Signal:
    """What threads wait for; each wait looks for itself whether there is reason to go on."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiting: list[Thread] = []

    def wait(self, seconds: float = LATER) -> None:
        """Return once it is notified, or the time is over."""
        world = self._world
        thread = world.current
        self._waiting.append(thread)
        world.park(world.now + seconds)
        if thread in self._waiting:
            self._waiting.remove(thread)

    def notify(self) -> None:
        """Wake all that wait, in the order in which they came."""
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            self._world.wake(thread, self._world.now)


class Lock:
    """In the place of a `threading.Lock` that is held over calls of a server."""

    def __init__(self, world: World) -> None:
        self._signal = Signal(world)
        self._holder: Thread | None = None
        self._world = world

    def __enter__(self) -> Lock:
        while self._holder is not None and not self._holder.process.is_dead:
            self._signal.wait()
        self._world.check_alive()
        self._holder = self._world.current
        return self

    def __exit__(self, *_: object) -> None:
        self._holder = None
        self._signal.notify()


class Clock:
    """The virtual clock as one process's code reads it (`workers.scoring.retry.Clock`)."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.now

    def sleep(self, seconds: float) -> None:
        self._world.sleep(seconds)


class World:
    """Everything there is in one schedule."""

    def __init__(self, seed: int, traces: bool = False, max_events: int = MAX_EVENTS) -> None:
        self.seed = seed
        self.now = 1000.0
        self.random = self.random_of("world")
        self.trace: list[tuple[Any, ...]] | None = [] if traces else None
        self.failure: BaseException | None = None
        self.num_events = 0
        self.is_over = False
        self._max_events = max_events
        self._heap: list[tuple[float, int, Thread]] = []
        self._num_wakes = 0
        self._processes: list[Process] = []
        self.hub = greenlet.getcurrent()
        self.nobody = self.process("nobody")
        self.current: Thread = None  # type: ignore[assignment]

    def random_of(self, name: str) -> random.Random:
        """Random numbers of one part of the world: what another part draws does not change them."""
        return random.Random(self.seed * 1_000_003 + zlib.crc32(name.encode()))

    def process(self, name: str) -> Process:
        """A new process."""
        process = Process(self, name)
        self._processes.append(process)
        return process

    def say(self, process: Process, what: str, *details: Any) -> None:
        """Note what happens, for people; nothing if nobody wants to read it."""
        if self.trace is not None:
            self.trace.append((self.now, process.name, what, *details))

    # --- for threads -------------------------------------------------------------------------------------------------

    def sleep(self, seconds: float) -> None:
        """Let the thread that calls wait."""
        self.park(self.now + seconds)

    def park(self, until: float) -> None:
        """Let the thread that calls wait until then, or until somebody wakes it."""
        thread = self.current
        if thread.process.is_dead:
            raise KilledError
        if until < LATER:
            self.wake(thread, until)
        else:
            thread.ticket = 0
        following = self._next()
        if following is None:
            self.hub.switch()
        elif following is not thread:
            self.current = following
            following.greenlet.switch()
        if thread.process.is_dead:
            raise KilledError

    def check_alive(self) -> None:
        """Raises `KilledError` in a thread of a dead process."""
        if self.current.process.is_dead:
            raise KilledError

    def wake(self, thread: Thread, at: float) -> None:
        """Let a thread go on at this time, and at no other that was said before."""
        self._num_wakes = thread.ticket = self._num_wakes + 1
        heapq.heappush(self._heap, (at, thread.ticket, thread))

    # --- the hub -----------------------------------------------------------------------------------------------------

    def run(self, max_s: float) -> None:
        """Run all threads until one says `is_over`, then end all processes.

        Raises:
            OutOfTimeError: It did not come to that within `max_s` of virtual time.
            Exception: What a thread raised.
        """
        self._ends_at = self.now + max_s
        try:
            while not self.is_over:
                thread = self._next()
                if thread is None:
                    if self.failure is None:
                        self.failure = OutOfTimeError(
                            f"nobody has anything to do at {self.now:.3f} after {self.num_events} events"
                        )
                    break
                self.current = thread
                thread.greenlet.switch()
            if self.failure is not None:
                raise self.failure
        finally:
            self._end_all()

    def _next(self) -> Thread | None:
        """The thread whose turn it is, at its time; None gives the turn to the hub."""
        heap = self._heap
        while heap:
            if self.failure is not None or self.is_over:
                return None
            at, ticket, thread = heapq.heappop(heap)
            if ticket != thread.ticket or thread.is_done:
                continue
            if thread.process.stalled_until > at:
                self.wake(thread, thread.process.stalled_until)
                continue
            self.num_events += 1
            if at > self._ends_at or self.num_events > self._max_events:
                self.failure = OutOfTimeError(f"still running at {at:.1f} after {self.num_events} events")
                return None
            self.now = at
            return thread
        return None

    def _end_all(self) -> None:
        """Unwind every thread that is left, so that none is unwound by the garbage collector."""
        self.trace = None
        for process in self._processes:
            process.is_dead = True
        for process in self._processes:
            for thread in process.threads:
                while not thread.is_done:
                    self.current = thread
                    thread.greenlet.switch()
        self._heap.clear()
