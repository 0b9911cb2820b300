"""One event loop and one API client an endpoint for all judge calls of a process, whatever the number of threads."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

from tasks.errors import BusyError, ModelLoadError
from tasks.settings import Settings, load_settings
from workers.base import Unscored
from workers.judges.endpoints import Endpoint

for _name in ("httpx", "httpx2"):  # one line a request at INFO, of which there are thousands
    logging.getLogger(_name).setLevel(logging.WARNING)

OPENAI_HOST = "api.openai.com"
NO_KEY = "EMPTY"
"""What servers without authentication are sent in the place of a key."""

LOOP_GRACE_S = 30.0
"""So long after its deadline a call is waited for; only a loop that hangs is later."""

T = TypeVar("T")


@dataclass(slots=True)
class Requests:
    """How many requests one question took so far, the SDK's retries included."""

    num: int = 0


requests: ContextVar[Requests] = ContextVar("requests")
"""Set around a question; each of its requests is counted there."""


class CountingClient(openai.AsyncOpenAI):  # type: ignore[misc]
    """The SDK's client, which says of a failure what the last request met but not how many there were."""

    async def _prepare_request(self, request: Any) -> None:
        """Called by the SDK before each request, retries too."""
        count = requests.get(None)
        if count is not None:
            count.num += 1


class JudgeLoop:
    """The event loop of judge calls, in a thread of its own, and the endpoints that are asked on it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._endpoints: dict[tuple[str, str], Endpoint] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewardq-judges", daemon=True)
        self._thread.start()

    def endpoint(self, url: str, key: str) -> Endpoint:
        """The one endpoint at this URL, with the one client that has this key."""
        url = url.rstrip("/")
        with self._lock:
            if (url, key) not in self._endpoints:
                # said as a header too, so that none of OPENAI_CUSTOM_HEADERS takes its place at any host
                headers = {"Authorization": f"Bearer {key}"}
                client = CountingClient(base_url=url, api_key=key, default_headers=headers)
                self._endpoints[url, key] = Endpoint(url, client)
            return self._endpoints[url, key]

    def run_all(self, calls: Sequence[Coroutine[Any, Any, T]], timeout_s: float) -> list[T | Unscored | BusyError]:
        """Await `calls`, each of which ends within `timeout_s` by itself, side by side on the loop; wait for them here.

        A reason that one raises stands in its place; anything else that one raises is raised here.
        """
        future = asyncio.run_coroutine_threadsafe(_gather(calls), self._loop)
        try:
            found = future.result(timeout_s + LOOP_GRACE_S)
        except TimeoutError:
            future.cancel()
            reason = f"this worker's event loop for judges hangs: no end within timeout_s={timeout_s:g} seconds"
            return [Unscored("timeout", reason)] * len(calls)
        results: list[T | Unscored | BusyError] = []
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, Unscored | BusyError):
                raise one
            results.append(one)
        return results

    def close(self) -> None:
        """Close all connections and end the thread."""
        asyncio.run_coroutine_threadsafe(self._close_clients(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close_clients(self) -> None:
        for endpoint in self._endpoints.values():
            await endpoint.client.close()
        await self._loop.shutdown_default_executor()


async def _gather(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T | BaseException]:
    return list(await asyncio.gather(*calls, return_exceptions=True))


@cache
def judge_loop() -> JudgeLoop:
    """The loop of this process."""
    return JudgeLoop()


def api_key(base_url: str, key_env: str) -> str:
    """The key to send to `base_url`.

    It is read from the variable that the config names, and only for api.openai.com, the worker's own OPENAI_BASE_URL,
    or a host in its REWARDQ_HOSTS: a config alone cannot make a worker send its keys elsewhere.

    Raises:
        ModelLoadError: The variable is not set here, or the host is not one that may have the key.
    """
    if not key_env:
        return NO_KEY
    if key_env not in os.environ:
        raise ModelLoadError(f"api_key_env names {key_env}, which is not set on this worker")
    settings: Settings = load_settings()
    host = (urlsplit(base_url).hostname or "").lower()
    own = (urlsplit(os.environ.get("OPENAI_BASE_URL", "")).hostname or "").lower()
    if host not in {OPENAI_HOST, own, *settings.allowed_hosts} - {""}:
        raise ModelLoadError(
            f"this worker does not send {key_env} to {host}; if it may, start it with "
            f"REWARDQ_HOSTS={','.join((*settings.allowed_hosts, host))}"
        )
    return os.environ[key_env]
