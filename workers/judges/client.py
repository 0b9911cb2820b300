"""One event loop for all judge calls of a process, with one API client for each endpoint and key."""

from __future__ import annotations

import asyncio
import os
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from tasks.errors import ModelLoadError
from tasks.hosts import LOOPBACK, Origin, origin_of
from tasks.masking import SECRETS, without_password
from tasks.rewards.options import NO_KEY_VARIABLE
from tasks.servers.http_urls import whats_wrong_with_api
from tasks.settings import Settings, is_key_variable, load_settings
from workers.judges.endpoints import Endpoint
from workers.judges.inner_errors import (
    INNER_ERROR,
    REFUSED,
    InnerError,
    inner_error,
)
from workers.network.answers import TOO_LARGE, BoundedTransport
from workers.network.loop import NetworkLoop
from workers.network.once import Once
from workers.network.proxies import proxy_for
from workers.network.servers import check_may_ask

OPENAI = Origin("https", "api.openai.com", 443)

LIMITS = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
"""Connections of one client, as the SDK has them."""

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
        check_may_ask(url)
        with self._lock:
            if (url, key) not in self._endpoints:
                self._endpoints[url, key] = _endpoint(url, key)
            return self._endpoints[url, key]

    async def _close_clients(self) -> None:
        for endpoint in self._endpoints.values():
            await endpoint.client.close()


def _endpoint(url: str, key: str) -> Endpoint:
    proxy = proxy_for(url)
    transport = BoundedTransport(proxy.url if proxy else None, LIMITS)
    http_client = openai.DefaultAsyncHttpxClient(
        transport=transport,
        trust_env=False,  # else httpx builds a transport for each proxy of the environment, needed or not
        follow_redirects=False,  # a judge must not choose whom else this worker asks
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
        error = _error_in(response)
        if error is not None:
            response.status_code = error.status
            response.extensions[INNER_ERROR] = error
    count = requests.get(None)
    if response.is_error and count is not None:
        count.refusal = response


def _error_in(response: Any) -> InnerError | None:
    too_large: str | None = response.extensions.get(TOO_LARGE)
    if too_large is not None:
        return InnerError(REFUSED, "", too_large)
    return inner_error(response.content)


@Once
def judge_loop() -> JudgeLoop:
    """The loop of this process."""
    return JudgeLoop()


def api_key(base_url: str, key_env: str) -> str:
    """The key to send to `base_url`.

    The key is read from the variable that the config names. It is sent only to api.openai.com, to the worker's own
    OPENAI_BASE_URL, or to a host in its REWARDQ_HOSTS, of the same scheme and port: a config or a message alone cannot
    make a worker send its keys elsewhere.

    Raises:
        ModelLoadError: The variable holds no key of a judge, is not set on this worker, or the host may not have the
            key.
    """
    if not key_env:
        return NO_KEY
    # A class of the user's has options that no trainer checks.
    if not is_key_variable(key_env):
        raise ModelLoadError(f"{NO_KEY_VARIABLE}, found {key_env!r}")
    key = os.environ.get(key_env)
    if not key:  # compose sets a variable that has no value to ""
        raise ModelLoadError(
            f"api_key_env names {key_env}, which is not set on this worker"
        )
    settings: Settings = load_settings()
    origin = origin_of(base_url)
    if origin is None or not _may_have_key(origin, settings):
        raise ModelLoadError(_refusal_of_key(key_env, base_url, settings))
    SECRETS.add(key)
    return key


# --- private -------------------------------------------------------------------------------------


def _may_have_key(origin: Origin, settings: Settings) -> bool:
    own = origin_of(os.environ.get("OPENAI_BASE_URL", ""))
    return origin in (OPENAI, own) or settings.may_send_key(origin)


def _refusal_of_key(key_env: str, base_url: str, settings: Settings) -> str:
    origin = origin_of(base_url)
    shown = without_password(base_url) if origin is None else origin.shown
    words = f"this worker does not send {key_env} to {shown}"
    if origin is None:
        return words
    risk = ""
    if origin.scheme == "http" and origin.host not in LOOPBACK:
        risk = " (over plain HTTP others on the way can read the key; https:// is for keys)"
    hosts = ",".join((*settings.allowed_hosts, shown))
    return f"{words}; if it may, start it with REWARDQ_HOSTS={hosts}{risk}"
