"""Asks the reward servers that give one reward: others or again after pauses, samples apart, until a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tasks.errors import ModelLoadError
from tasks.servers.http_urls import whats_wrong_with_server
from workers.base import Unscored
from workers.network.answers import TOO_LARGE, BoundedTransport
from workers.network.limiter import ConcurrencyLimiter
from workers.network.loop import NetworkLoop, cause_of
from workers.network.once import Once
from workers.network.proxies import proxy_for
from workers.network.servers import Server, check_may_ask, choose_server
from workers.remote.token import Token, token_for, without_token
from workers.remote.wire import (
    JSON,
    MSGPACK,
    Columns,
    NoAnswerError,
    RejectedError,
    Reward,
    Terms,
    encode,
    rewards_of,
    terms_of,
)

KEEPALIVE_S = 2.0
"""Idle connections are closed after so long; uvicorn closes them after 5."""

HEALTH_TIMEOUT_S = 10.0

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Pauses when no other server is left to ask: each is double the one before, and varied by half."""


@dataclass(slots=True, eq=False)
class RemoteServer(Server):
    """A reward server."""

    token: Token = field(default_factory=Token, repr=False)
    terms: Terms | None = None
    """None until the server is asked, and after each answer without rewards: another server may run there by then."""
    limiter: ConcurrencyLimiter = field(default_factory=ConcurrencyLimiter)


class RemoteLoop(NetworkLoop):
    """The event loop of requests to reward servers, and those servers."""

    def __init__(self) -> None:
        super().__init__("rewardq-remote")
        self._servers: dict[str, RemoteServer] = {}
        self._clients: dict[str | None, httpx2.AsyncClient] = {}

    def server(self, url: str) -> RemoteServer:
        """The one server at this URL.

        Raises:
            ModelLoadError: Nothing could be asked at this URL, or not through the proxy that the environment names.
        """
        # A class of the user's has options that the trainer does not check.
        wrong = whats_wrong_with_server(url)
        if wrong:
            raise ModelLoadError(f"server_url {wrong}")
        check_may_ask(url)
        url = str(httpx2.URL(url)).rstrip("/")
        with self._lock:
            if url not in self._servers:
                self._servers[url] = RemoteServer(
                    url, proxy=proxy_for(url), token=token_for(url)
                )
            return self._servers[url]

    def client(self, server: RemoteServer) -> httpx2.AsyncClient:
        """The client of all servers that are asked through the same proxy, or through none. Used on the loop only."""
        proxy = server.proxy.url if server.proxy else None
        if proxy not in self._clients:
            limits = httpx2.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S)
            self._clients[proxy] = httpx2.AsyncClient(
                timeout=None,
                transport=BoundedTransport(proxy, limits),
                # A client that trusts the environment builds the transports of proxies that these servers do not need.
                trust_env=False,
            )
        return self._clients[proxy]

    async def _close_clients(self) -> None:
        for client in self._clients.values():
            await client.aclose()


@Once
def remote_loop() -> RemoteLoop:
    """The loop of this process."""
    return RemoteLoop()


class Question:
    """Some samples on their way to a server, encoded once for all servers of the same terms."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.num_samples = len(columns["prompt"] or ())
        self._bodies: dict[Terms, bytes] = {}

    async def body(self, terms: Terms) -> bytes:
        """What a server of these terms is sent."""
        if terms not in self._bodies:
            self._bodies[terms] = await asyncio.to_thread(encode, self.columns, terms)
        return self._bodies[terms]

    def part(self, indices: Sequence[int]) -> Question:
        """The samples at `indices` alone."""
        columns: dict[str, Sequence[Any] | None] = {}
        for name, values in self.columns.items():
            columns[name] = None if values is None else [values[i] for i in indices]
        return Question(columns)


@dataclass(slots=True)
class RemoteCall:
    """One call of a remote reward: until when it may last, and what it has found so far."""

    ends_at_s: float
    """On the event loop's clock."""
    rewards: dict[int, Reward] = field(default_factory=dict)
    last: str = ""
    """What the last request without an answer met."""


@dataclass(slots=True)
class _Tries:
    """The requests that one question has taken."""

    num_requests: int = 0
    num_failures: int = 0
    """Requests without an answer, except refusals of a server that had too much in hand."""

    @property
    def words(self) -> str:
        plural = "s" if self.num_requests > 1 else ""
        return f"after {self.num_requests} request{plural}"


class RemoteClient:
    """Asks the servers that give one reward. Used by any thread.

    Args:
        options: Those of a remote reward.
        timeout_s: Seconds for all that some samples take: requests, other servers, pauses.
        may_split: Whether samples that are rejected together may be sent apart.
    """

    def __init__(
        self, options: Mapping[str, Any], timeout_s: float, may_split: bool
    ) -> None:
        given = options["server_url"]
        urls = [given] if isinstance(given, str) else given
        self._loop = remote_loop()
        self._servers = [self._loop.server(url) for url in urls]
        self._request_timeout_s, self._timeout_s = options["timeout"], timeout_s
        self._most_failures: int = options["retry_attempts"] + len(self._servers) - 1
        self._may_split = may_split

    def rewards(self, columns: Columns) -> list[Reward]:
        """For each sample a reward, or the reason that there is none, within `timeout_s`."""
        question = Question(columns)
        (found,) = self._loop.run_all([self._in_time(question)], self._timeout_s)
        return found if isinstance(found, list) else [found] * question.num_samples

    def check(self) -> None:
        """Ask each server how it is; no sample is sent.

        Raises:
            ModelLoadError: One does not answer, or is no reward server; says which and why.
        """
        checks = [self._check(server) for server in self._servers]
        for found in self._loop.run_all(checks, HEALTH_TIMEOUT_S):
            if isinstance(found, Unscored):
                raise ModelLoadError(found.message)

    async def _check(self, server: RemoteServer) -> None:
        try:
            server.terms = await self._ask_terms(server)
        except NoAnswerError as error:
            raise error.reason from None

    async def _in_time(self, question: Question) -> list[Reward]:
        call = RemoteCall(asyncio.get_running_loop().time() + self._timeout_s)
        indices = range(question.num_samples)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(call.ends_at_s):
                await self._fill(call, indices, question)
        names = " and ".join(server.name for server in self._servers)
        before = f"; before that {call.last}" if call.last else ""
        message = f"no answer from {names} within timeout_s={self._timeout_s:g} seconds{before}"
        late = Unscored("timeout", message)
        return [call.rewards.get(i, late) for i in indices]

    async def _fill(
        self, call: RemoteCall, indices: Sequence[int], question: Question
    ) -> None:
        """Find the rewards of a question's samples, which have these indices in the call.

        Samples that a server rejects together are sent apart.
        """
        try:
            found = await self._ask(call, question)
        except Unscored as reason:
            found = [reason] * len(indices)
        except RejectedError as error:
            if self._may_split and len(indices) > 1:
                await self._fill_apart(call, indices, question, error.reasons)
                return
            found = [error.reasons.get(i, error.reason) for i in range(len(indices))]
        call.rewards.update(zip(indices, found, strict=True))

    async def _fill_apart(
        self,
        call: RemoteCall,
        indices: Sequence[int],
        question: Question,
        reasons: Mapping[int, Unscored],
    ) -> None:
        """The same without the samples that a server blames, or by halves if it blames none."""
        for i, reason in reasons.items():
            call.rewards[indices[i]] = reason
        left = [i for i in range(len(indices)) if i not in reasons]
        half = len(left) if reasons else len(left) // 2
        for some in (left[:half], left[half:]):
            if some:
                await self._fill(call, [indices[i] for i in some], question.part(some))

    async def _ask(self, call: RemoteCall, question: Question) -> list[Reward]:
        """Ask the server with the fewest requests in flight, and others or again after pauses until one answers.

        Raises:
            Unscored: None did, or one refuses.
            RejectedError: One rejects these samples.
        """
        asked: set[RemoteServer] = set()
        tries = _Tries()
        while True:
            server = choose_server(self._but(asked))
            try:
                return await self._try(server, question, call, tries)
            except NoAnswerError as error:
                last = error
            asked.add(server)
            is_last = tries.num_failures >= self._most_failures
            if not is_last and any(other.is_well for other in self._but(asked)):
                continue
            asked.clear()
            pause_s = self._pause_s(tries, last)
            ends_s = asyncio.get_running_loop().time() + pause_s
            if is_last or ends_s >= call.ends_at_s:
                raise Unscored(last.reason.kind, call.last)
            await asyncio.sleep(pause_s)

    def _but(self, asked: Collection[RemoteServer]) -> list[RemoteServer]:
        return [server for server in self._servers if server not in asked]

    def _pause_s(self, tries: _Tries, last: NoAnswerError) -> float:
        if last.pause_s is None:
            return backoff_s(tries.num_failures)
        return max(last.pause_s, FIRST_PAUSE_S) * random.uniform(1.0, 1.5)

    async def _try(
        self, server: RemoteServer, question: Question, call: RemoteCall, tries: _Tries
    ) -> list[Reward]:
        """Ask one server, and note how it is."""
        tries.num_requests += 1
        try:
            with server.asked():
                found = await self._ask_at(server, question, call.ends_at_s)
        except NoAnswerError as error:
            server.terms = None
            if error.is_well:
                server.answered()
            else:
                server.failed()
            if error.pause_s is None:
                tries.num_failures += 1
            call.last = f"{error.reason.message} {tries.words}"
            raise
        except (Unscored, RejectedError):
            server.terms = None
            server.answered()
            raise
        server.answered()
        return found

    async def _ask_at(
        self, server: RemoteServer, question: Question, ends_at_s: float
    ) -> list[Reward]:
        # Encoded before its turn comes, so that nothing waits for it then.
        await self._body(server, question)
        async with server.limiter.entered(ends_at_s):
            kind, body = await self._body(server, question)
            response = await self._send(
                server, "POST", "/compute", self._request_timeout_s, body, kind
            )
            try:
                found = rewards_of(
                    server, response, question.num_samples, self._may_split
                )
            except NoAnswerError as error:
                if error.pause_s is not None:
                    server.limiter.refused()
                raise
            server.limiter.answered()
            return found

    async def _body(
        self, server: RemoteServer, question: Question
    ) -> tuple[str, bytes]:
        """The kind and the bytes of what a server is sent."""
        if server.terms is None:
            server.terms = await self._ask_terms(server)
        terms = server.terms
        body = await question.body(terms)
        if len(body) > terms.max_body_bytes:
            message = f"{server.name} takes at most {terms.max_body_bytes} bytes, found {len(body)}"
            raise RejectedError(Unscored("invalid", message), {})
        return MSGPACK if terms.takes_msgpack else JSON, body

    async def _ask_terms(self, server: RemoteServer) -> Terms:
        response = await self._send(server, "GET", "/health", HEALTH_TIMEOUT_S)
        terms = terms_of(server, response)
        if terms.needs_token and not server.token.value:
            message = f"{server.name} wants a token; {server.token.why_not}"
            raise Unscored("failed", message)
        return terms

    async def _send(
        self,
        server: RemoteServer,
        method: str,
        path: str,
        timeout_s: float,
        content: bytes = b"",
        content_type: str = "",
    ) -> httpx2.Response:
        client, url = self._loop.client(server), server.url + path
        headers = dict(server.token.headers)
        if content_type:
            headers["Content-Type"] = content_type
        try:
            async with asyncio.timeout(timeout_s):
                response = await client.request(
                    method, url, content=content, headers=headers
                )
        except TimeoutError:
            message = f"{server.name} gave no answer to {path} within {timeout_s:g} seconds{server.proxy_words}"
            raise NoAnswerError(Unscored("timeout", message)) from None
        except httpx2.RequestError as error:
            message = f"no answer from {server.name}: {cause_of(error)}; asked {server.asked_from}{server.proxy_words}"
            raise NoAnswerError(Unscored("failed", message)) from None
        too_large = response.extensions.get(TOO_LARGE)
        if too_large is not None and response.is_success:
            raise Unscored("failed", f"{server.name}{path}: {too_large}")
        return without_token(response, server.token)


def backoff_s(num_failures: int) -> float:
    """How long to wait after so many failures, in seconds; varied, so that workers do not come back at once."""
    pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (num_failures - 1))
    return float(pause_s * random.uniform(0.5, 1.5))
