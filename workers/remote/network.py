"""The event loop on which a process waits for servers, and which of them to ask: how busy and how well each is."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import os
import platform
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from tasks.errors import BusyError
from tasks.settings import without_password
from workers import deadline
from workers.base import Unscored
from workers.remote.proxies import Proxy

log = logging.getLogger(__name__)

for _name in (
    "httpx",
    "httpx2",
):  # one line a request at INFO, of which there are thousands
    logging.getLogger(_name).setLevel(logging.WARNING)

FIRST_COOL_DOWN_S, LONGEST_COOL_DOWN_S = 5.0, 120.0
"""A server that failed cools down for so many seconds and is then asked one real question; each further failure doubles
the cool-down."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")

LOOP_GRACE_S = 30.0
"""So long after its deadline a call is waited for; only a loop that hangs is later."""

T = TypeVar("T")
S = TypeVar("S", bound="Server")


class Once(Generic[T]):
    """What a process has one of: made at the first call, by one of the threads that come then; the others wait.

    (`functools.cache` would have each of them make one.)
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        """The one there is."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]

    def take(self) -> T | None:
        """The one there is, if there is one, which the next call does not give any more."""
        with self._lock:
            return self._made.pop() if self._made else None


@dataclass(slots=True, eq=False)
class Server:
    """A server that several threads ask. Used on the event loop only, so nothing is locked."""

    url: str
    num_in_flight: int = 0
    """Questions of this process that it has in hand."""
    num_asked: int = 0
    cool_down_s: float = 0.0
    """How long it cools down after its last failure; 0 while it is well."""
    cools_down_until: float = 0.0
    """When the cool-down ends, on the clock of `time.monotonic`."""
    proxy: Proxy | None = None
    """What requests to it go through."""

    @property
    def name(self) -> str:
        """Its URL for people."""
        return without_password(self.url)

    @property
    def whence(self) -> str:
        """The host that asks, for people: a server may be well and out of this host's reach."""
        host = urlsplit(self.url).hostname or ""
        is_here = f" ({host} there is that host itself)" if host in LOOPBACK else ""
        return f"from the worker's host {platform.node()}{is_here}"

    @property
    def way(self) -> str:
        """What a reason says of the way to it; empty if it is asked directly."""
        return self.proxy.words if self.proxy else ""

    @property
    def is_well(self) -> bool:
        """Whether to ask it: it did not fail lately, or its cool-down is over and no question tries it now."""
        return not self.cool_down_s or (
            time.monotonic() >= self.cools_down_until and not self.num_in_flight
        )

    @contextmanager
    def asked(self) -> Iterator[None]:
        """A question is with it meanwhile."""
        self.num_in_flight += 1
        self.num_asked += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1

    def answered(self) -> None:
        """It gave an answer: it is well."""
        self.cool_down_s = 0.0

    def failed(self) -> None:
        """It could not be reached or broke: let it cool down."""
        now = time.monotonic()
        if self.cool_down_s and now < self.cools_down_until:
            return  # another question that was in flight at the first failure: the cool-down does not grow by it

        self.cool_down_s = min(
            max(FIRST_COOL_DOWN_S, 2 * self.cool_down_s), LONGEST_COOL_DOWN_S
        )
        self.cools_down_until = now + self.cool_down_s
        log.warning("server cooling down url=%s for_s=%g", self.name, self.cool_down_s)


def least_busy(servers: Sequence[S]) -> S:
    """The well server with the fewest questions in flight; if none is well, the server whose cool-down ends first."""
    well = [s for s in servers if s.is_well]
    if well:
        return min(well, key=lambda s: (s.num_in_flight, s.num_asked))
    return min(servers, key=lambda s: (s.cools_down_until, s.num_in_flight))


class ConcurrencyLimiter:
    """Lets as many requests to a server at once as it takes, the request whose time ends first before the others.

    Without a limiter the requests that a server refused come back in random order, and some of them never in time.
    The limit follows the server's answers (additive increase, decrease at a refusal), since no server says how much
    it takes. Used on the event loop only.
    """

    def __init__(self) -> None:
        self.limit = math.inf
        """How many are let in: one fewer than there were after a refusal, one more after as many answers."""
        self.num_inside = 0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @asynccontextmanager
    async def entered(self, ends_at: float) -> AsyncIterator[None]:
        """Inside, once there is room; `ends_at` is when the request's time ends, on the loop's clock."""
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (ends_at, next(self._numbers), turn))
        self._let_in()
        try:
            await turn
            yield
        finally:
            self.num_inside -= turn.done() and not turn.cancelled()
            self._let_in()

    def answered(self) -> None:
        """It took a request and answered: it may take more."""
        self.limit += 1 / self.limit

    def refused(self) -> None:
        """It had too much in hand for one that is inside now."""
        self.limit = max(1, self.num_inside - 1)

    def _let_in(self) -> None:
        while self._waiting and self.num_inside + 1 <= self.limit:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():  # given up while it waited
                self.num_inside += 1
                turn.set_result(None)


class NetworkLoop:
    """An event loop in a thread of its own, for all threads of the process that wait on the network.

    Args:
        name: The thread's.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=name, daemon=True
        )
        self._thread.start()

    def run_all(
        self, calls: Sequence[Coroutine[Any, Any, T]], timeout_s: float
    ) -> list[T | Unscored | BusyError]:
        """Await `calls`, each of which ends within `timeout_s` by itself, side by side on the loop; wait for them here.

        A reason that one raises stands in its place; anything else that one raises is raised here.
        """
        future = asyncio.run_coroutine_threadsafe(_gather(calls), self._loop)
        try:
            found = future.result(timeout_s + LOOP_GRACE_S)
        except TimeoutError:
            future.cancel()
            name = self._thread.name
            reason = f"this worker's event loop {name} hangs: no end within timeout_s={timeout_s:g} seconds"
            return [Unscored("timeout", reason)] * len(calls)
        results: list[T | Unscored | BusyError] = []
        for one in found:
            if isinstance(one, BaseException) and not isinstance(
                one, Unscored | BusyError
            ):
                raise one
            results.append(one)
        return results

    def close(self) -> None:
        """Close all connections and end the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await self._close_clients()
        await self._loop.shutdown_default_executor()

    async def _close_clients(self) -> None:
        raise NotImplementedError


async def _gather(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T | BaseException]:
    return list(await asyncio.gather(*calls, return_exceptions=True))


def cause_of(error: BaseException) -> str:
    """An error and, behind it, what the operating system says below it, which libraries do not repeat."""
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    below, seen = error.__cause__ or error.__context__, {id(error)}
    while below is not None and id(below) not in seen:
        if (
            isinstance(below, OSError)
            and below.errno
            and not isinstance(below, ssl.SSLError)
        ):  # whose numbers are its own
            says = (
                os.strerror(below.errno) if below.errno > 0 else str(below.strerror)
            )  # resolvers count below 0
            return words if says in words else f"{words} ({says})"
        seen.add(id(below))
        below = below.__cause__ or below.__context__
    return words


@contextmanager
def its_own_deadline() -> Iterator[None]:
    """Meanwhile the worker's watchdog does not count: who waits on the network keeps `timeout_s` by itself."""
    with deadline.paused():
        yield
