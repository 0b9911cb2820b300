"""One question to a judge: which of its servers is asked, within which budget and deadline, and what came back."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai

from tasks.errors import BusyError, ModelLoadError
from tasks.servers.connections import LOST
from tasks.servers.http_urls import DEFAULT_JUDGE_URL
from workers.base import Unscored
from workers.judges.budget import FleetBudget, fleet_budget
from workers.judges.client import NO_KEY, Requests, api_key, judge_loop, requests
from workers.judges.endpoints import LIST_TIMEOUT_S, Endpoint, says_no_such_model
from workers.judges.inner_errors import MARK, InnerError, cut, said_in
from workers.judges.reply import Reply, read_reply
from workers.remote.network import cause_of, least_busy

__all__ = ["Chat", "Reply", "read_reply"]

CHECK_TIMEOUT_S = 30.0
"""Seconds for what is asked of a server before there are samples."""


class Chat:
    """A judge's way to its servers. Used by any thread.

    Args:
        options: A judge's options.
        timeout_s: Seconds for one question in all: retries, other servers, and waiting between them.
    """

    def __init__(self, options: Mapping[str, Any], timeout_s: float) -> None:
        given = options["api_base_url"]
        urls = [given] if isinstance(given, str) else given
        self._loop = judge_loop()
        self._endpoints = [
            self._loop.endpoint(url, api_key(url, options["api_key_env"]))
            for url in urls
        ]
        self._model: str = options["vlm_model"]
        self._timeout, self._timeout_s = options["timeout"], timeout_s
        self._max_retries: int = options["max_retries"]
        self._fleet_max: int = options["fleet_max_concurrent"]
        self._at_once: int = max(1, options["max_concurrent"])
        self._params = {
            "temperature": options["temperature"],
            "extra_body": options["extra_body"] or None,
        }
        self._clients: dict[tuple[Endpoint, int], Any] = {}

    @property
    def at_once(self) -> int:
        """How many questions of one call are asked side by side."""
        return self._at_once

    def admit(self) -> None:
        """Raise `BusyError` if the fleet's budget is in use at every server."""
        if not self._fleet_max:
            return
        try:
            if any(
                fleet_budget().has_room(e.url, self._fleet_max) for e in self._endpoints
            ):
                return
        except LOST as error:
            raise BusyError(
                f"Redis is away, which holds the budget of the judge: {error}"
            ) from None
        raise self._busy()

    def ask(
        self, chats: Sequence[list[Any]], **params: Any
    ) -> list[Reply | Unscored | BusyError]:
        """Ask questions side by side; each has `timeout_s`.

        Returns:
            For each a reply, the reason that there is none, or that no server could be asked within the budget.
        """
        return self._loop.run_all(
            [self._ask_one(messages, params) for messages in chats], self._timeout_s
        )

    def warm_up(self) -> None:
        """Ask each server for its models, and an unlisted model for an answer of one token.

        Raises:
            ModelLoadError: A server is away, refuses the key or the model, or its URL is wrong; the text says what.
        """
        for found in self._loop.run_all(
            [self._check(endpoint) for endpoint in self._endpoints], CHECK_TIMEOUT_S
        ):
            if found is not None:
                raise ModelLoadError(str(found))

    async def _check(self, endpoint: Endpoint) -> None:
        count = Requests(endpoint=endpoint)
        requests.set(count)
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await endpoint.check(self._model)
        except TimeoutError:
            raise Unscored(
                "timeout",
                f"no answer from {endpoint.name} within {CHECK_TIMEOUT_S:g} seconds",
            ) from None
        except openai.APITimeoutError:
            words = f"no answer from {endpoint.name} within {LIST_TIMEOUT_S:g} seconds{endpoint.way}"
            raise Unscored("timeout", words) from None
        except openai.OpenAIError as error:
            raise await self._reason(error, count) from None

    async def _ask_one(self, messages: list[Any], params: Mapping[str, Any]) -> Reply:
        count = Requests()
        requests.set(count)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._ask_somewhere(messages, params, count)
        except TimeoutError:
            words = f"no answer within timeout_s={self._timeout_s:g} seconds{_after(count)}{_before(count)}"
            raise Unscored("timeout", f"{words}{_asked(count)}{_way(count)}") from None
        except openai.OpenAIError as error:
            raise await self._reason(error, count) from None

    async def _reason(self, error: openai.OpenAIError, count: Requests) -> Unscored:
        """The reason for an error of the API, with what the server lists if it has no such model."""
        found = _reason(error, self._timeout, count)
        if count.endpoint is not None and says_no_such_model(error):
            found.message += await count.endpoint.refused(self._model)
        found.message += _way(count)
        return found

    async def _ask_somewhere(
        self, messages: list[Any], params: Mapping[str, Any], count: Requests
    ) -> Reply:
        """Ask the least busy server; one that fails is followed by the next, the last gets the retries left."""
        left = list(self._endpoints)
        while True:
            async with self._place(left) as endpoint:
                left.remove(endpoint)
                count.endpoint = endpoint
                others = any(e.is_well for e in left)
                retries = 0 if others else max(0, self._max_retries - count.num)
                try:
                    reply = await self._ask_at(
                        endpoint, retries, messages, params, count
                    )
                except (openai.APIConnectionError, openai.APIStatusError) as error:
                    endpoint.is_doubted |= says_no_such_model(error)
                    if _is_the_servers(error):
                        endpoint.failed()
                    else:
                        endpoint.answered()
                    if not (others and _may_help_elsewhere(error)):
                        raise
                else:
                    endpoint.answered()
                    return reply

    async def _ask_at(
        self,
        endpoint: Endpoint,
        retries: int,
        messages: list[Any],
        params: Mapping[str, Any],
        count: Requests,
    ) -> Reply:
        uncounted = requests.set(
            Requests()
        )  # the list of models is no request of this question's
        try:
            name = await endpoint.model_name(
                self._model, self._client(endpoint, retries)
            )
        finally:
            requests.reset(uncounted)
        completions = self._client(endpoint, retries).chat.completions.with_raw_response
        raw = await completions.create(
            model=name, messages=messages, **self._params, **params
        )
        try:
            return read_reply(raw.content, name, count.num)
        except Unscored as reason:
            reason.message += endpoint.way
            raise

    def _client(self, endpoint: Endpoint, retries: int) -> Any:
        if (endpoint, retries) not in self._clients:
            options = {"timeout": self._timeout, "max_retries": retries}
            self._clients[endpoint, retries] = endpoint.client.with_options(**options)
        return self._clients[endpoint, retries]

    @asynccontextmanager
    async def _place(self, endpoints: Sequence[Endpoint]) -> AsyncIterator[Endpoint]:
        """The server to ask, with its place in the fleet's budget. Raises `BusyError` if there is none."""
        left = list(endpoints)
        while left:
            endpoint = least_busy(left)
            with endpoint.asked():
                if not self._fleet_max:
                    yield endpoint
                    return
                lease = await self._lease(endpoint)
                if lease is not None:
                    try:
                        yield endpoint
                        return
                    finally:  # not awaited: it may not hold up a deadline
                        self._give_back(fleet_budget(), lease)
            left.remove(endpoint)
        raise self._busy()

    async def _lease(self, endpoint: Endpoint) -> str | None:
        lease = await self._acquire(endpoint)
        if (
            lease is None and self._loop.releases
        ):  # the place of the question before may still be on its way back
            await asyncio.wait(self._loop.releases)
            lease = await self._acquire(endpoint)
        return lease

    async def _acquire(self, endpoint: Endpoint) -> str | None:
        budget = fleet_budget()
        asking = asyncio.get_running_loop().run_in_executor(
            None, budget.acquire, endpoint.url, self._fleet_max
        )
        try:
            return await asyncio.shield(asking)
        except (
            asyncio.CancelledError
        ):  # the thread goes on: what it still gets is given back
            asking.add_done_callback(
                lambda got: (
                    None if got.exception() else self._give_back(budget, got.result())
                )
            )
            raise
        except LOST as error:
            raise BusyError(
                f"Redis is away, which holds the budget of the judge: {error}"
            ) from None

    def _give_back(self, budget: FleetBudget, lease: str | None) -> None:
        if lease is not None:
            release = asyncio.get_running_loop().run_in_executor(
                None, budget.release, lease
            )
            self._loop.releases.add(release)
            release.add_done_callback(self._loop.releases.discard)

    def _busy(self) -> BusyError:
        urls = ", ".join(e.name for e in self._endpoints)
        return BusyError(
            f"all {self._fleet_max} requests that fleet_max_concurrent allows are in flight at {urls}"
        )


# --- private -------------------------------------------------------------------------------------


def _is_the_servers(error: openai.OpenAIError) -> bool:
    """Whether a server is not well: it cannot be reached, does not answer, or breaks."""
    return isinstance(error, openai.APIConnectionError | openai.InternalServerError)


def _may_help_elsewhere(error: openai.OpenAIError) -> bool:
    """Whether another server may answer what this one did not: it is not well, or has too much to do."""
    return _is_the_servers(error) or getattr(error, "status_code", None) in (
        408,
        409,
        429,
    )


def _reason(error: openai.OpenAIError, timeout: float, count: Requests) -> Unscored:
    """The reason for an error of the API: what the server said."""
    after = _after(count)
    if isinstance(error, openai.APITimeoutError):
        words = f"the judge gave no answer within timeout={timeout:g} seconds{after}{_before(count)}"
        return Unscored("timeout", words + _asked(count))
    if isinstance(error, openai.APIStatusError):
        response = error.response
        return Unscored(
            "failed",
            f"the judge answered {_status(response)}{after}: {_server_words(response)}",
        )
    if isinstance(error, openai.APIConnectionError):
        return Unscored(
            "failed",
            f"no connection to the judge{after}: {_whereto(count.endpoint)}: {cause_of(error.__cause__ or error)}",
        )
    return Unscored("failed", f"{type(error).__name__}{after}: {error}")


def _before(count: Requests) -> str:
    """What a server said that was to be asked again, when time ended."""
    if count.refusal is None:
        return ""
    return f"; before that the judge answered {_status(count.refusal)}: {_server_words(count.refusal)}"


def _status(response: Any) -> str:
    """The status of an answer, or the code of the error that was inside one of 200."""
    inner: InnerError | None = response.extensions.get(MARK)
    if inner is None:
        return str(response.status_code)
    return (
        f"200 with an error of code {inner.code}" if inner.code else "200 with an error"
    )


def _whereto(endpoint: Endpoint | None) -> str:
    """What was asked and from where."""
    if endpoint is None:
        return f"from {platform.node()}"
    is_default = endpoint.url == DEFAULT_JUDGE_URL
    return f"{endpoint.name}{' (the default of api_base_url)' if is_default else ''} {endpoint.whence}"


def _asked(count: Requests) -> str:
    return f"; asked {_whereto(count.endpoint)}" if count.endpoint is not None else ""


def _way(count: Requests) -> str:
    return count.endpoint.way if count.endpoint is not None else ""


def _after(count: Requests) -> str:
    if not count.num:  # else a question had gone out
        return " when it was asked for its models" if count.endpoint is not None else ""
    return f" after {count.num} request{'s' if count.num != 1 else ''}"


def _server_words(response: Any) -> str:
    """What the server said, without the key: the message in its error, else its answer as it is."""
    inner: InnerError | None = response.extensions.get(MARK)
    words: str = (
        inner.words if inner is not None else said_in(response.content) or response.text
    )
    key = response.request.headers.get("Authorization", "").removeprefix("Bearer ")
    return cut(words.replace(key, "***") if key not in ("", NO_KEY) else words)
