"""Rewards from a server of the user's over HTTP: `workers.server`, or any that speaks Flow-Factory's JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx2
import msgpack

from tasks import catalog
from tasks.errors import ConfigError, FailureKind, ModelLoadError
from tasks.rewards.options import options_of_subclass
from tasks.samples import MEDIA_FIELDS
from tasks.servers.http_urls import whats_wrong_with_server
from tasks.settings import without_password
from workers import deadline
from workers.base import (
    Accelerator,
    GroupwiseRewardModel,
    Inputs,
    PointwiseRewardModel,
    RewardArguments,
    RewardModelOutput,
    Unscored,
)
from workers.judges.images import DATA_URLS
from workers.judges.inner_errors import cut, inner_error
from workers.network.limiter import ConcurrencyLimiter
from workers.network.loop import NetworkLoop, cause_of
from workers.network.once import Once
from workers.network.proxies import proxy_for, trusted_certificates
from workers.network.servers import Server, choose_server

JSON, MSGPACK = "application/json", "application/msgpack"

FLOW_FACTORY_FIELDS = (
    "prompt",
    "image",
    "video",
    "condition_images",
    "condition_videos",
)
"""What its clients send, null where they have none."""

KEEPALIVE_S = 2.0
"""Idle connections are closed after so long; uvicorn closes them after 5."""

HEALTH_TIMEOUT_S = 10.0

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Pauses when no other server is left to ask: each is double the one before, and varied by half."""

_FAILED = ("error", "fail", "failed", "failure")
"""What a `status` in an answer says of rewards beside it: they are none."""

Columns = Mapping[str, Sequence[Any] | None]
"""The fields of some samples: a value for each sample, or None."""

Reward = Any
"""A number, which the caller checks, or an `Unscored`."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a server says of itself at /health; Flow-Factory's says nothing."""

    takes_msgpack: bool = False
    max_body_bytes: float = math.inf


@dataclass(slots=True, eq=False)
class RemoteServer(Server):
    """A reward server."""

    terms: Terms | None = None
    """None until it is asked, and after each answer without rewards: another may have taken its place."""
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
        wrong = whats_wrong_with_server(
            url
        )  # a class of the user's has options that the trainer does not check
        if wrong:
            raise ModelLoadError(f"server_url {wrong}")
        url = str(httpx2.URL(url)).rstrip("/")
        with self._lock:
            if url not in self._servers:
                self._servers[url] = RemoteServer(url, proxy=proxy_for(url))
            return self._servers[url]

    def client(self, server: RemoteServer) -> httpx2.AsyncClient:
        """The client of all servers that are asked through the same proxy, or through none. Used on the loop only."""
        proxy = server.proxy.url if server.proxy else None
        if proxy not in self._clients:
            limits = httpx2.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S)
            # a client that trusts the environment builds the transports of proxies that these servers do not need
            self._clients[proxy] = httpx2.AsyncClient(
                timeout=None,
                limits=limits,
                proxy=proxy,
                trust_env=False,
                verify=trusted_certificates(),
            )
        return self._clients[proxy]

    async def _close_clients(self) -> None:
        for client in self._clients.values():
            await client.aclose()


@Once
def remote_loop() -> RemoteLoop:
    """The loop of this process."""
    return RemoteLoop()


class NoAnswerError(Exception):
    """There are no rewards yet, but another request may bring them.

    Args:
        reason: That of the samples, if this was the last request.
        is_well: Whether the server can be asked about other samples meanwhile.
        pause_s: How long it wants to be left alone, since it has too much in hand.
    """

    def __init__(
        self, reason: Unscored, is_well: bool = False, pause_s: float | None = None
    ) -> None:
        super().__init__(reason, is_well, pause_s)
        self.reason, self.is_well, self.pause_s = reason, is_well, pause_s


class RejectedError(Exception):
    """A server gives no rewards for these samples together, and would not if it was asked again.

    Args:
        reason: Why.
        reasons: Those of the samples it blames, by index; empty if it names none.
    """

    def __init__(self, reason: Unscored, reasons: Mapping[int, Unscored]) -> None:
        super().__init__(reason, reasons)
        self.reason, self.reasons = reason, reasons


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

    def part(self, places: Sequence[int]) -> Question:
        """The samples at `places` alone."""
        return Question(
            {name: v and [v[i] for i in places] for name, v in self.columns.items()}
        )


@dataclass(slots=True)
class Call:
    """One call of a remote reward: until when it may last, and what it has found so far."""

    ends_at: float
    """On the event loop's clock."""
    rewards: dict[int, Reward] = field(default_factory=dict)
    last: str = ""
    """What the last request without an answer met."""


class Remote:
    """The way to the servers that give one reward. Used by any thread.

    Args:
        options: Those of a remote reward.
        timeout_s: Seconds for all that some samples take: requests, other servers, pauses.
        may_split: Whether samples that are rejected together may be sent apart.
    """

    def __init__(
        self, options: Mapping[str, Any], timeout_s: float, may_split: bool
    ) -> None:
        given = options["server_url"]
        self._loop = remote_loop()
        self._servers = [
            self._loop.server(url)
            for url in ([given] if isinstance(given, str) else given)
        ]
        self._timeout, self._timeout_s = options["timeout"], timeout_s
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
        for found in self._loop.run_all(
            [self._check(server) for server in self._servers], HEALTH_TIMEOUT_S
        ):
            if isinstance(found, Unscored):
                raise ModelLoadError(found.message)

    async def _check(self, server: RemoteServer) -> None:
        try:
            server.terms = terms_of(
                server, await self._send(server, "GET", "/health", HEALTH_TIMEOUT_S)
            )
        except NoAnswerError as error:
            raise error.reason from None

    async def _in_time(self, question: Question) -> list[Reward]:
        call = Call(asyncio.get_running_loop().time() + self._timeout_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(call.ends_at):
                await self._fill(call, range(question.num_samples), question)
        names = " and ".join(server.name for server in self._servers)
        before = f"; before that {call.last}" if call.last else ""
        late = Unscored(
            "timeout",
            f"no answer from {names} within timeout_s={self._timeout_s:g} seconds{before}",
        )
        return [call.rewards.get(place, late) for place in range(question.num_samples)]

    async def _fill(
        self, call: Call, places: Sequence[int], question: Question
    ) -> None:
        """Find the rewards of a question's samples, which have these places; those rejected together are sent apart."""
        try:
            found = await self._ask(call, question)
        except Unscored as reason:
            found = [reason] * len(places)
        except RejectedError as error:
            if self._may_split and len(places) > 1:
                await self._fill_apart(call, places, question, error.reasons)
                return
            found = [error.reasons.get(i, error.reason) for i in range(len(places))]
        call.rewards.update(zip(places, found, strict=True))

    async def _fill_apart(
        self,
        call: Call,
        places: Sequence[int],
        question: Question,
        reasons: Mapping[int, Unscored],
    ) -> None:
        """The same without the samples that a server blames, or by halves if it blames none."""
        call.rewards.update({places[i]: reason for i, reason in reasons.items()})
        left = [i for i in range(len(places)) if i not in reasons]
        half = len(left) if reasons else len(left) // 2
        for some in (left[:half], left[half:]):
            if some:
                await self._fill(call, [places[i] for i in some], question.part(some))

    async def _ask(self, call: Call, question: Question) -> list[Reward]:
        """Ask the least busy server, and others or again after pauses until one answers.

        Raises:
            Unscored: None did, or one refuses.
            RejectedError: One rejects these samples.
        """
        asked: set[RemoteServer] = set()
        num_failures = num_requests = 0
        while True:
            server = choose_server([s for s in self._servers if s not in asked])
            num_requests += 1
            try:
                with server.asked():
                    found = await self._ask_at(server, question, call.ends_at)
                server.answered()
                return found
            except NoAnswerError as error:
                last = error
            except (Unscored, RejectedError):
                server.answered()
                server.terms = None
                raise
            server.terms = None
            server.answered() if last.is_well else server.failed()
            num_failures += last.pause_s is None
            call.last = f"{last.reason.message} after {num_requests} request{'s' if num_requests > 1 else ''}"
            asked.add(server)
            if num_failures < self._most_failures and any(
                s.is_well for s in self._servers if s not in asked
            ):
                continue
            asked.clear()
            pause_s = backoff_s(num_failures)
            if last.pause_s is not None:
                pause_s = max(last.pause_s, FIRST_PAUSE_S) * random.uniform(1.0, 1.5)
            if (
                num_failures == self._most_failures
                or asyncio.get_running_loop().time() + pause_s >= call.ends_at
            ):
                raise Unscored(last.reason.kind, call.last)
            await asyncio.sleep(pause_s)

    async def _ask_at(
        self, server: RemoteServer, question: Question, ends_at: float
    ) -> list[Reward]:
        await self._body(server, question)  # so that it is there when its turn comes
        async with server.limiter.entered(ends_at):
            kind, body = await self._body(server, question)
            response = await self._send(
                server,
                "POST",
                "/compute",
                self._timeout,
                content=body,
                content_type=kind,
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
            server.terms = terms_of(
                server, await self._send(server, "GET", "/health", HEALTH_TIMEOUT_S)
            )
        terms = server.terms
        body = await question.body(terms)
        if len(body) > terms.max_body_bytes:
            reason = f"{server.name} takes at most {terms.max_body_bytes} bytes, found {len(body)}"
            raise RejectedError(Unscored("invalid", reason), {})
        return MSGPACK if terms.takes_msgpack else JSON, body

    async def _send(
        self,
        server: RemoteServer,
        method: str,
        path: str,
        timeout_s: float,
        content: bytes = b"",
        content_type: str = "",
    ) -> httpx2.Response:
        headers = {"Content-Type": content_type} if content_type else {}
        try:
            async with asyncio.timeout(timeout_s):
                client = self._loop.client(server)
                return await client.request(
                    method, server.url + path, content=content, headers=headers
                )
        except TimeoutError:
            reason = f"{server.name} gave no answer to {path} within {timeout_s:g} seconds{server.way}"
            raise NoAnswerError(Unscored("timeout", reason)) from None
        except httpx2.RequestError as error:
            reason = f"no answer from {server.name}: {cause_of(error)}; asked {server.whence}{server.way}"
            raise NoAnswerError(Unscored("failed", reason)) from None


class RemotePointwiseRewardModel(PointwiseRewardModel):
    """What a reward server says of each sample, in the range of its own. Samples it rejects together are sent apart.

    The server is sent the fields that the option `required_fields` names, or a subclass with its attribute.
    """

    required_fields: ClassVar[tuple[str, ...]] = ("prompt",)
    optional_fields: ClassVar[tuple[str, ...]] = ("image", "video")
    thread_safe = True
    asks_servers = True

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        if not config.extra_kwargs.get("server_url"):
            raise ValueError("needs server_url, the URL of a reward server")
        entry = catalog.CATALOG["RemotePointwiseRewardModel"]
        try:  # the trainer has checked those of a built-in, and cannot know that a class of yours has the same
            options = options_of_subclass(
                entry, config.extra_kwargs, type(self).__name__
            )
        except ConfigError as error:
            raise ModelLoadError(str(error)) from None
        if options["required_fields"]:
            vars(self).update(
                required_fields=tuple(options["required_fields"]), optional_fields=()
            )
        self._remote = Remote(
            options,
            config.timeout_s,
            may_split=not isinstance(self, GroupwiseRewardModel),
        )

    def warm_up(self) -> None:
        """Raise `ModelLoadError` if a server does not answer; no sample is sent."""
        self._remote.check()

    def score_inputs(self, inputs: Inputs) -> RewardModelOutput:
        """Rewards `(N,)`, in one request unless the server rejects that; an `Unscored` where there is none."""
        columns: dict[str, Sequence[Any] | None] = {
            "prompt": inputs.prompt,
            "image": inputs.image,
            "video": inputs.video,
            "condition_images": inputs.condition_images,
            "condition_videos": inputs.condition_videos,
        }
        for name in ("metadata", "fps"):
            if name in inputs.others:
                columns[name] = inputs.others[name]
        with deadline.paused():  # requests keep timeout_s by themselves
            return RewardModelOutput(self._remote.rewards(columns))


class RemoteGroupwiseRewardModel(RemotePointwiseRewardModel, GroupwiseRewardModel):
    """What a reward server says of the members of a group, which it is sent whole."""


def encode(columns: Columns, terms: Terms) -> bytes:
    """The body of a request: what fields the samples have, as a server takes them."""
    given = {
        n: v
        for n, v in columns.items()
        if v is not None and any(one is not None for one in v)
    }
    of = _rgb if terms.takes_msgpack else _png
    fields = {
        n: _each_image(v, of) if n in MEDIA_FIELDS else v for n, v in given.items()
    }
    if terms.takes_msgpack:
        return bytes(msgpack.packb(fields))
    return json.dumps({**dict.fromkeys(FLOW_FACTORY_FIELDS), **fields}).encode()


def terms_of(server: RemoteServer, response: httpx2.Response) -> Terms:
    """What an answer at /health says.

    Raises:
        NoAnswerError: The server is not well.
        Unscored: It is none of ours.
    """
    if response.status_code >= 500 or response.status_code == 429:
        raise NoAnswerError(
            Unscored(
                "failed",
                f"{server.name}/health answered {_words(response)}{server.way}",
            )
        )
    if not response.is_success:
        raise Unscored(
            "failed",
            f"{server.name}/health answered {_words(response)}; is a reward server there?{server.way}",
        )
    said = _mapping(response)
    most, takes = said.get("max_body_bytes"), said.get("takes")
    return Terms(
        takes_msgpack=isinstance(takes, list) and MSGPACK in takes,
        max_body_bytes=most if isinstance(most, int) else math.inf,
    )


def rewards_of(
    server: RemoteServer, response: httpx2.Response, num_samples: int, may_split: bool
) -> list[Reward]:
    """What an answer at /compute says of each sample.

    Raises:
        NoAnswerError: The server is not well, has too much in hand, or broke down over these samples.
        RejectedError: It says that it does not take these samples, or broke down and may take fewer.
        Unscored: It says something else.
    """
    said, status = _mapping(response), status_of(response)
    is_success = response.is_success and status == response.status_code
    rewards: Any = said.get("rewards")
    is_list = isinstance(rewards, list) and len(rewards) == num_samples
    if is_success and not _says_what_is_wrong(said):
        if is_list:
            return list(rewards)
        found = (
            f"{len(rewards)} rewards"
            if isinstance(rewards, list)
            else f"no rewards but {cut(response.text)!r}"
        )
        raise Unscored(
            "failed",
            f"{server.name} gave {found} for {num_samples} samples{server.way}",
        )
    kind: FailureKind = "invalid" if status in (400, 413, 422) else "failed"
    reasons = _reasons(server, said, kind, num_samples)
    if reasons and is_list:
        return [reasons.get(i, reward) for i, reward in enumerate(rewards)]
    reason = Unscored(kind, f"{server.name} answered {_words(response)}{server.way}")
    if (
        reasons
        or is_success
        or kind == "invalid"
        or (status == 500 and may_split and num_samples > 1)
    ):
        raise RejectedError(reason, reasons)
    pause_s = _retry_after_s(response) if status in (429, 503) else None
    if pause_s is not None:
        raise NoAnswerError(
            Unscored("timeout", reason.message), is_well=True, pause_s=pause_s
        )
    if status >= 500 or status in (408, 425, 429):
        raise NoAnswerError(reason, is_well=status == 500)
    raise reason


def status_of(response: httpx2.Response) -> int:
    """The status of an answer; of one of 200 with an error in it the code of that, if it is a status."""
    error = inner_error(response.content) if response.is_success else None
    return (
        error.status
        if error is not None and error.code == str(error.status)
        else response.status_code
    )


def backoff_s(num_failures: int) -> float:
    """How long to wait after `num_failures` of them."""
    return float(
        min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (num_failures - 1))
        * random.uniform(0.5, 1.5)
    )


# --- private -------------------------------------------------------------------------------------


def _each_image(value: Any, of: Callable[[Any], Any]) -> Any:
    """`value` with `of` each image in it; None stays None."""
    if isinstance(value, list | tuple):
        return [_each_image(one, of) for one in value]
    return None if value is None else of(value)


def _png(image: Any) -> str:
    return DATA_URLS.of(image, "png").partition(",")[2]


def _rgb(image: Any) -> dict[str, Any]:
    return {"size": list(image.size), "rgb": image.tobytes()}


def _mapping(response: httpx2.Response) -> dict[str, Any]:
    """The JSON object in an answer; empty if there is none."""
    try:
        said = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _says_what_is_wrong(said: Mapping[str, Any]) -> bool:
    """Whether an answer says that something went wrong, whatever its status is and whatever else it has."""
    errors = said.get("errors")
    each = (
        errors.values()
        if isinstance(errors, dict)
        else errors
        if isinstance(errors, list)
        else [errors]
    )
    status = said.get("status")
    is_failed = isinstance(status, str) and status.strip().casefold() in _FAILED
    return (
        bool(said.get("error"))
        or any(each)
        or is_failed
        or said.get("success") is False
    )


def _reasons(
    server: RemoteServer, said: Mapping[str, Any], kind: FailureKind, num_samples: int
) -> dict[int, Unscored]:
    """The reasons of the samples that a server blames: a text by index, or a list that has one for each sample."""
    errors = said.get("errors")
    if isinstance(errors, list) and len(errors) == num_samples:
        errors = {str(i): text for i, text in enumerate(errors)}
    texts = errors if isinstance(errors, dict) else {}
    places = {str(i): i for i in range(num_samples)}
    return {
        places[i]: Unscored(
            kind,
            f"{server.name}: {cut(text if isinstance(text, str) else json.dumps(text))}",
        )
        for i, text in texts.items()
        if i in places and text
    }


def _words(response: httpx2.Response) -> str:
    """The status of an answer and what it says."""
    said = _mapping(response)
    found = (
        said.get("error") or said.get("detail") or said.get("message") or response.text
    )
    if response.is_redirect:
        found = f"look at {without_password(response.headers.get('Location', ''))}, which is not followed"
    return f"{response.status_code}: {cut(found if isinstance(found, str) else json.dumps(found))}"


def _retry_after_s(response: httpx2.Response) -> float | None:
    """The seconds that a server wants to be left alone; None if it does not say."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None
