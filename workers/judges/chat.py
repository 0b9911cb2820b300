"""One question to a judge: with which permit and deadline its servers are asked, and what came back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai

from tasks.errors import BusyError, ModelLoadError
from tasks.servers.connections import LOST
from workers.base import Unscored
from workers.judges import failures
from workers.judges.budget import FleetBudget, fleet_budget
from workers.judges.client import Requests, api_key, judge_loop, requests
from workers.judges.endpoints import LIST_TIMEOUT_S, Endpoint, says_no_such_model
from workers.judges.reply import Reply, read_reply
from workers.judges.retry import ask_with_retries
from workers.network.servers import choose_server

__all__ = ["Chat", "Reply", "read_reply"]

CHECK_TIMEOUT_S = 30.0
"""Seconds that a server has for the check before there are samples."""


class Chat:
    """A judge's way to its servers. Used by any thread.

    Args:
        options: A judge's options.
        timeout_s: Seconds for one question in all: retries, other servers, and the pauses between them.
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
        """Raise `BusyError` if all permits of the fleet's budget are taken at every server."""
        if not self._fleet_max:
            return

        try:
            for endpoint in self._endpoints:
                if fleet_budget().has_room(endpoint.url, self._fleet_max):
                    return
        except LOST as error:
            raise _redis_is_away(error) from None
        raise self._no_permit_left()

    def ask(
        self, chats: Sequence[list[Any]], **params: Any
    ) -> list[Reply | Unscored | BusyError]:
        """Ask questions side by side; each has `timeout_s`.

        Returns:
            For each question a reply, the reason why there is no reply, or a `BusyError` if no permit was left.
        """
        return self._loop.run_all(
            [self._ask_one(messages, params) for messages in chats], self._timeout_s
        )

    def warm_up(self) -> None:
        """Ask each server for its models, and a model that is not listed for an answer of one token.

        Raises:
            ModelLoadError: A server is away, refuses the key or the model, or its URL is wrong; the text says which.
        """
        checks = [self._check(endpoint) for endpoint in self._endpoints]
        for found in self._loop.run_all(checks, CHECK_TIMEOUT_S):
            if found is not None:
                raise ModelLoadError(str(found))

    async def _check(self, endpoint: Endpoint) -> None:
        count = Requests(endpoint=endpoint)
        requests.set(count)
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await endpoint.check(self._model)
        except TimeoutError:
            words = f"no answer from {endpoint.name} within {CHECK_TIMEOUT_S:g} seconds"
            raise Unscored("timeout", words) from None
        except openai.APITimeoutError:
            words = f"no answer from {endpoint.name} within {LIST_TIMEOUT_S:g} seconds{endpoint.proxy_words}"
            raise Unscored("timeout", words) from None
        except openai.OpenAIError as error:
            raise await self._reason(error, count) from None

    async def _ask_one(self, messages: list[Any], params: Mapping[str, Any]) -> Reply:
        count = Requests()
        requests.set(count)

        async def ask(endpoint: Endpoint, retries: int) -> Reply:
            return await self._ask_at(endpoint, retries, messages, params, count)

        try:
            async with asyncio.timeout(self._timeout_s):
                return await ask_with_retries(
                    self._endpoints, self._max_retries, count, self._permitted, ask
                )
        except TimeoutError:
            raise failures.no_answer_in_time(self._timeout_s, count) from None
        except openai.OpenAIError as error:
            raise await self._reason(error, count) from None

    async def _reason(self, error: openai.OpenAIError, count: Requests) -> Unscored:
        """The reason for an error of the API, with the models that the server lists if it has no such model."""
        found = failures.reason_of(error, self._timeout, count)
        if count.endpoint is not None and says_no_such_model(error):
            found.message += await count.endpoint.refused(self._model)
        found.message += failures.way_to(count)
        return found

    async def _ask_at(
        self,
        endpoint: Endpoint,
        retries: int,
        messages: list[Any],
        params: Mapping[str, Any],
        count: Requests,
    ) -> Reply:
        client = self._client(endpoint, retries)
        # the request for the list of models does not count as one of this question's
        uncounted = requests.set(Requests())
        try:
            name = await endpoint.model_name(self._model, client)
        finally:
            requests.reset(uncounted)

        raw = await client.chat.completions.with_raw_response.create(
            model=name, messages=messages, **self._params, **params
        )
        try:
            return read_reply(raw.content, name, count.num)
        except Unscored as reason:
            reason.message += endpoint.proxy_words
            raise

    def _client(self, endpoint: Endpoint, retries: int) -> Any:
        if (endpoint, retries) not in self._clients:
            options = {"timeout": self._timeout, "max_retries": retries}
            self._clients[endpoint, retries] = endpoint.client.with_options(**options)
        return self._clients[endpoint, retries]

    @asynccontextmanager
    async def _permitted(
        self, endpoints: Sequence[Endpoint]
    ) -> AsyncIterator[Endpoint]:
        """The server to ask, while a permit of the fleet's budget is held for it.

        Raises:
            BusyError: No server has a permit left.
        """
        left = list(endpoints)
        while left:
            endpoint = choose_server(left)
            with endpoint.asked():
                if not self._fleet_max:
                    yield endpoint
                    return

                permit = await self._permit(endpoint)
                if permit is not None:
                    try:
                        yield endpoint
                        return
                    finally:
                        # not awaited: the release must not delay the answer beyond its deadline
                        self._release(fleet_budget(), permit)
            left.remove(endpoint)
        raise self._no_permit_left()

    async def _permit(self, endpoint: Endpoint) -> str | None:
        """A permit, or None if all are taken."""
        permit = await self._acquire(endpoint)
        # The permit of the question before may still be on its way back to Redis, and this question would miss it.
        if permit is None and self._loop.releases:
            await asyncio.wait(self._loop.releases)
            permit = await self._acquire(endpoint)
        return permit

    async def _acquire(self, endpoint: Endpoint) -> str | None:
        budget = fleet_budget()
        acquiring = asyncio.get_running_loop().run_in_executor(
            None, budget.acquire, endpoint.url, self._fleet_max
        )

        def release_late(acquired: asyncio.Future[str | None]) -> None:
            if acquired.exception() is None:
                self._release(budget, acquired.result())

        try:
            return await asyncio.shield(acquiring)
        except asyncio.CancelledError:
            # the executor's thread goes on and may still get a permit, which nobody would release
            acquiring.add_done_callback(release_late)
            raise
        except LOST as error:
            raise _redis_is_away(error) from None

    def _release(self, budget: FleetBudget, permit: str | None) -> None:
        if permit is None:
            return
        release = asyncio.get_running_loop().run_in_executor(
            None, budget.release, permit
        )
        self._loop.releases.add(release)
        release.add_done_callback(self._loop.releases.discard)

    def _no_permit_left(self) -> BusyError:
        urls = ", ".join(endpoint.name for endpoint in self._endpoints)
        return BusyError(
            f"all {self._fleet_max} requests that fleet_max_concurrent allows are in flight at {urls}"
        )


# --- private -------------------------------------------------------------------------------------


def _redis_is_away(error: Exception) -> BusyError:
    return BusyError(f"Redis is away, which holds the budget of the judge: {error}")
