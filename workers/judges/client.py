"""One event loop and one API client an endpoint for all judge calls of a process, whatever the number of threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

from tasks.errors import ModelLoadError
from tasks.settings import Settings, load_settings
from workers.base import Unscored

OPENAI_HOST = "api.openai.com"
NO_KEY = "EMPTY"
"""What servers without authentication are sent in the place of a key."""

T = TypeVar("T")


class JudgeLoop:
    """The event loop of judge calls, in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._clients: dict[tuple[str, str], openai.AsyncOpenAI] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._loop.run_forever, name="rewardq-judges", daemon=True).start()

    def client(self, base_url: str, api_key: str) -> openai.AsyncOpenAI:
        """The one client of an endpoint."""
        with self._lock:
            if (base_url, api_key) not in self._clients:
                self._clients[base_url, api_key] = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
            return self._clients[base_url, api_key]

    def run(self, call: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Await `call` on the loop and wait here for its result; it is cancelled at the deadline.

        Raises:
            Unscored: `timeout`, once `timeout_s` seconds have passed.
        """
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(call, timeout_s), self._loop)
        try:
            return future.result()
        except (TimeoutError, concurrent.futures.TimeoutError):
            raise Unscored("timeout", f"the judge gave no answer within timeout_s={timeout_s:g} seconds") from None


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
    own = urlsplit(os.environ.get("OPENAI_BASE_URL", "")).hostname
    if host not in {OPENAI_HOST, own, *settings.allowed_hosts}:
        raise ModelLoadError(
            f"this worker does not send {key_env} to {host}; if it may, start it with "
            f"REWARDQ_HOSTS={','.join((*settings.allowed_hosts, host))}"
        )
    return os.environ[key_env]


def unscored(error: openai.OpenAIError) -> Unscored:
    """The reason for an API error: what the server said."""
    if isinstance(error, openai.APITimeoutError):
        return Unscored("timeout", f"the judge did not answer in time: {error}")
    if isinstance(error, openai.APIStatusError):
        return Unscored("failed", f"the judge answered {error.status_code}: {error.message}")
    if isinstance(error, openai.APIConnectionError):
        return Unscored("failed", f"no connection to the judge: {error.__cause__ or error}")
    return Unscored("failed", f"{type(error).__name__}: {error}")
