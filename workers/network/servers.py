"""Which of several servers to ask: how many requests each has in flight, and whether it cools down."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from tasks.errors import ModelLoadError
from tasks.hosts import LOOPBACK, origin_of
from tasks.masking import without_password
from tasks.settings import load_settings
from workers.network.proxies import Proxy

log = logging.getLogger(__name__)

FIRST_COOL_DOWN_S, LONGEST_COOL_DOWN_S = 5.0, 120.0
"""A server that failed cools down for so many seconds and is then asked one real question; each further failure doubles
the cool-down."""

S = TypeVar("S", bound="Server")


@dataclass(slots=True, eq=False)
class Server:
    """A server that several threads ask. Used on the event loop only, so nothing is locked."""

    url: str
    num_in_flight: int = 0
    """Questions of this process that it has not answered yet."""
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
    def asked_from(self) -> str:
        """The host that asks, for people: a server may be well and out of this host's reach."""
        host = urlsplit(self.url).hostname or ""
        is_here = f" ({host} there is that host itself)" if host in LOOPBACK else ""
        return f"from the worker's host {platform.node()}{is_here}"

    @property
    def proxy_words(self) -> str:
        """What a reason says of the proxy to it; empty if it is asked directly."""
        return self.proxy.words if self.proxy else ""

    @property
    def is_well(self) -> bool:
        """Whether to ask it: it did not fail lately, or its cool-down is over and no question tries it now."""
        return not self.cool_down_s or (
            time.monotonic() >= self.cools_down_until and not self.num_in_flight
        )

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Within, a question is in flight to the server."""
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


def check_may_ask(url: str) -> None:
    """Raise `ModelLoadError` if the operator of this worker does not let it ask this server."""
    settings = load_settings()
    if settings.may_ask(url):
        return
    origin = origin_of(url)
    host = without_password(url) if origin is None else f"{origin.host}:{origin.port}"
    raise ModelLoadError(
        f"this worker does not ask {host}: its REWARDQ_JUDGE_HOSTS is {settings.judge_hosts!r}; if it may, add the host"
    )


def choose_server(servers: Sequence[S]) -> S:
    """The well server with the fewest questions in flight; if none is well, the server whose cool-down ends first."""
    well = [s for s in servers if s.is_well]
    if well:
        return min(well, key=lambda s: (s.num_in_flight, s.num_asked))
    return min(servers, key=lambda s: (s.cools_down_until, s.num_in_flight))
