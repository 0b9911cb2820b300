"""One event loop for all judge calls of a process, with one API client for each endpoint and key."""

from __future__ import annotations

import asyncio
import os
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from tasks.errors import ModelLoadError
from tasks.servers.http_urls import whats_wrong_with_api
from tasks.settings import Settings, load_settings
from workers.judges.endpoints import Endpoint
from workers.judges.inner_errors import INNER_ERROR, inner_error
from workers.network.loop import NetworkLoop
from workers.network.once import Once
from workers.network.proxies import proxy_for, trusted_certificates

OPENAI_HOST = "api.openai.com"
NO_KEY = "EMPTY"
"""The key that is sent to servers without authentication."""


@dataclass(slots=True)
class Requests:
    """The requests of one question."""

    num: int = 0
    """How many were sent so far, the SDK's retries included."""
    endpoint: Endpoint | None = None
    """Where the last request went."""
    refusal: Any = None
    """The last answer that was an error, an `httpx.Response`; the SDK may be in the pause before a retry."""


requests: ContextVar[Requests] = ContextVar("requests")
"""The counter of the question that the current task asks; `CountingClient` counts there."""


class CountingClient(openai.AsyncOpenAI):  # type: ignore[misc]
    """The SDK's client, with a count of its requests: an error of the SDK does not say how many preceded it."""

    async def _prepare_request(self, request: Any) -> None:
        """Called by the SDK before each request, and before each retry."""
        count = requests.get(None)
        if count is not None:
            count.num += 1


class JudgeLoop(NetworkLoop):
    """The event loop of judge calls, and the endpoints that are asked on it."""

    def __init__(self) -> None:
        super().__init__("rewardq-judges")
        self._endpoints: dict[tuple[str, str], Endpoint] = {}
        self.releases: set[asyncio.Future[None]] = set()
        """Releases of permits of the fleet's budget that are on their way to Redis."""

    def endpoint(self, url: str, key: str) -> Endpoint:
        """The endpoint at this URL, with the client that has this key; the same object for the same arguments.

        Raises:
            ModelLoadError: The URL cannot be that of an API, or the environment names a proxy that cannot be used.
        """
        url = url.rstrip("/")
        # the trainer checks the URL of a built-in, and not the options of a user's class
        wrong = whats_wrong_with_api(url)
        if wrong:
            raise ModelLoadError(f"api_base_url {wrong}")
        with self._lock:
            if (url, key) not in self._endpoints:
                self._endpoints[url, key] = _endpoint(url, key)
            return self._endpoints[url, key]

    async def _close_clients(self) -> None:
        for endpoint in self._endpoints.values():
            await endpoint.client.close()


def _endpoint(url: str, key: str) -> Endpoint:
    proxy = proxy_for(url)
    http_client = openai.DefaultAsyncHttpxClient(
        proxy=proxy.url if proxy else None,
        trust_env=False,  # else httpx builds a transport for each proxy of the environment, needed or not
        verify=trusted_certificates(),
        event_hooks={"response": [_look_for_errors]},
    )
    # The key is a default header too, else one of OPENAI_CUSTOM_HEADERS could replace it at any host.
    headers = {"Authorization": f"Bearer {key}"}
    client = CountingClient(
        base_url=url, api_key=key, default_headers=headers, http_client=http_client
    )
    return Endpoint(url, client=client, proxy=proxy)


async def _look_for_errors(response: Any) -> None:
    """Give an answer of 200 with an error inside the status of that error, so that the SDK retries or raises.

    The counter of the question keeps an answer that is an error, for the reason if time ends before the SDK's retry.
    """
    if response.is_success:
        error = inner_error(await response.aread())
        if error is not None:
            response.status_code = error.status
            response.extensions[INNER_ERROR] = error
    count = requests.get(None)
    if response.is_error and count is not None:
        await response.aread()
        count.refusal = response


@Once
def judge_loop() -> JudgeLoop:
    """The loop of this process."""
    return JudgeLoop()


def api_key(base_url: str, key_env: str) -> str:
    """The key to send to `base_url`.

    The key is read from the variable that the config names. It is sent only to api.openai.com, to the worker's own
    OPENAI_BASE_URL, or to a host in its REWARDQ_HOSTS: a config alone cannot make a worker send its keys elsewhere.

    Raises:
        ModelLoadError: The variable is not set on this worker, or the host may not have the key.
    """
    if not key_env:
        return NO_KEY
    if not os.environ.get(key_env):  # compose sets a variable that has no value to ""
        raise ModelLoadError(
            f"api_key_env names {key_env}, which is not set on this worker"
        )

    settings: Settings = load_settings()
    host = (urlsplit(base_url).hostname or "").lower()
    own = (urlsplit(os.environ.get("OPENAI_BASE_URL", "")).hostname or "").lower()
    if host not in {OPENAI_HOST, own, *settings.allowed_hosts} - {""}:
        raise ModelLoadError(
            f"this worker does not send {key_env} to {host}; if it may, start it with "
            f"REWARDQ_HOSTS={','.join((*settings.allowed_hosts, host))}"
        )
    return os.environ[key_env]
