"""One event loop and one API client an endpoint for all judge calls of a process, whatever the number of threads."""

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
from workers.judges.inner_errors import MARK, inner_error
from workers.network.loop import NetworkLoop
from workers.network.once import Once
from workers.network.proxies import proxy_for, trusted_certificates

OPENAI_HOST = "api.openai.com"
NO_KEY = "EMPTY"
"""What servers without authentication are sent in the place of a key."""


@dataclass(slots=True)
class Requests:
    """The requests of one question."""

    num: int = 0
    """How many so far, the SDK's retries included."""
    endpoint: Endpoint | None = None
    """Where the last one went."""
    refusal: Any = None
    """The last answer that was an error, as the HTTP library has it; the SDK may be waiting to ask again."""


requests: ContextVar[Requests] = ContextVar("requests")
"""Set around a question; each of its requests is counted there."""


class CountingClient(openai.AsyncOpenAI):  # type: ignore[misc]
    """The SDK's client, which says of a failure what the last request met but not how many there were."""

    async def _prepare_request(self, request: Any) -> None:
        """Called by the SDK before each request, retries too."""
        count = requests.get(None)
        if count is not None:
            count.num += 1


class JudgeLoop(NetworkLoop):
    """The event loop of judge calls, and the endpoints that are asked on it."""

    def __init__(self) -> None:
        super().__init__("rewardq-judges")
        self._endpoints: dict[tuple[str, str], Endpoint] = {}
        self.releases: set[asyncio.Future[None]] = set()
        """Places in a budget of the fleet that are being given back."""

    def endpoint(self, url: str, key: str) -> Endpoint:
        """The one endpoint at this URL, with the one client that has this key.

        Raises:
            ModelLoadError: Nothing could be asked at this URL, or not through the proxy that the environment names.
        """
        url = url.rstrip("/")
        wrong = whats_wrong_with_api(
            url
        )  # a class of the user's has options that the trainer does not check
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
        trust_env=False,  # else the transports of proxies are built that this URL does not need
        verify=trusted_certificates(),
        event_hooks={"response": [_look_for_errors]},
    )
    # said as a header too, so that none of OPENAI_CUSTOM_HEADERS takes its place at any host
    headers = {"Authorization": f"Bearer {key}"}
    client = CountingClient(
        base_url=url, api_key=key, default_headers=headers, http_client=http_client
    )
    return Endpoint(url, client=client, proxy=proxy)


async def _look_for_errors(response: Any) -> None:
    """Give an answer of 200 with an error in it that error's status, so that the SDK does what it does about that.

    An answer that is an error is kept for the question, should its time end before the SDK has asked again.
    """
    if response.is_success:
        error = inner_error(await response.aread())
        if error is not None:
            response.status_code = error.status
            response.extensions[MARK] = error
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

    It is read from the variable that the config names, and only for api.openai.com, the worker's own OPENAI_BASE_URL,
    or a host in its REWARDQ_HOSTS: a config alone cannot make a worker send its keys elsewhere.

    Raises:
        ModelLoadError: The variable is not set here, or the host is not one that may have the key.
    """
    if not key_env:
        return NO_KEY
    if not os.environ.get(
        key_env
    ):  # compose gives a variable that is not set as an empty one
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
