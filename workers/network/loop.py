"""The event loop on which the threads of a process wait for servers."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from tasks.errors import BusyError
from workers.base import Unscored

# One line a request at INFO, of which there are thousands.
# At DEBUG the others write every header and question.
for _name in ("httpx", "httpx2", "httpcore", "httpcore2", "openai"):
    logging.getLogger(_name).setLevel(logging.WARNING)

LOOP_GRACE_S = 30.0
"""How long after its deadline a call is waited for; only on a loop that hangs a call takes longer."""

T = TypeVar("T")


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
        """Await `calls` side by side on the loop, while this thread waits. Each ends within `timeout_s` by itself.

        An `Unscored` or a `BusyError` that a call raises is its result. Any other error of a call is raised here.
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
    """An error and, behind it, the operating system's reason for it, which libraries do not repeat."""
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    below, seen = error.__cause__ or error.__context__, {id(error)}
    while below is not None and id(below) not in seen:
        said = _said_by_system(below)
        if said:
            return words if said in words else f"{words} ({said})"
        seen.add(id(below))
        below = below.__cause__ or below.__context__
    return words


def _said_by_system(error: BaseException) -> str:
    """The operating system's words for an error; empty if it is none of its own."""
    # The numbers of an SSLError are OpenSSL's.
    if not isinstance(error, OSError) or isinstance(error, ssl.SSLError):
        return ""
    if not error.errno:
        return ""
    # Resolvers count below 0, which strerror() does not know.
    return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
