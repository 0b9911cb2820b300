"""Servers that judges are asked at: how busy each is, whether it is well, and the names of the models it serves.

Everything here happens on the judges' event loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai

from workers.base import Unscored

log = logging.getLogger(__name__)

FIRST_REST_S, LONGEST_REST_S = 5.0, 120.0
"""A server that failed is left alone for so long, then asked one real question; each further failure doubles it."""

LIST_TIMEOUT_S = 10.0
LIST_AGAIN_S = 15.0
"""Names that lacked the one wanted are asked for again after this long: the server may have been restarted."""


@dataclass(slots=True, eq=False)
class Endpoint:
    """One server."""

    url: str
    client: Any
    """Its `AsyncOpenAI`."""
    num_in_flight: int = 0
    """Questions of this process that it has in hand."""
    num_asked: int = 0
    rest_s: float = 0.0
    """How long it is left alone after its last failure; 0 while it is well."""
    rests_until: float = 0.0
    names: tuple[str, ...] | None = None
    """Models it lists; None if it was not asked or lists none."""
    listed_at: float = float("-inf")
    listing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_well(self) -> bool:
        """Whether to ask it: it did not fail lately, or has rested and is not being tried by a question now."""
        return not self.rest_s or (time.monotonic() >= self.rests_until and not self.num_in_flight)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """A question is with it meanwhile."""
        self.num_in_flight += 1
        self.num_asked += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1

    def answered(self) -> None:
        """It gave an answer: it is well."""
        self.rest_s = 0.0

    def failed(self) -> None:
        """It could not be reached or broke: leave it alone for a while."""
        if not self.rest_s or time.monotonic() >= self.rests_until:  # not again for those that failed together
            self.rest_s = min(max(FIRST_REST_S, 2 * self.rest_s), LONGEST_REST_S)
            self.rests_until = time.monotonic() + self.rest_s
            log.warning("judge left alone url=%s rest_s=%g", self.url, self.rest_s)

    async def model_name(self, wanted: str, client: Any) -> str:
        """The name of the model to ask for: `wanted`, or the only one that the server lists if that is empty.

        Args:
            client: Asks with the question's retries, where there is no question without a name.

        Raises:
            Unscored: The server does not list it, names those that it does, or its URL lacks the /v1.
            openai.OpenAIError: Without a name, the server could not be asked for one.
        """
        async with self.listing:
            if not self._is_listed(wanted) and time.monotonic() - self.listed_at > LIST_AGAIN_S:
                try:
                    self.names = await self._list(client if not wanted else self._quick_client())
                except (openai.APIConnectionError, openai.APIStatusError):
                    if not wanted:
                        raise  # else the question itself will meet the same, with its retries
                self.listed_at = time.monotonic()
        names = ", ".join(self.names or ())
        if self.names is None:
            if not wanted:
                raise Unscored("failed", f"{self.url} lists no models; name the one to ask as vlm_model")
            return wanted  # it does not say: let the request tell
        if not wanted and len(self.names) == 1:
            return self.names[0]
        if not wanted:
            raise Unscored("failed", f"{self.url} serves several models; name one of them as vlm_model: {names}")
        if wanted not in self.names:
            raise Unscored("failed", f"{self.url} serves no model {wanted!r} (vlm_model); it lists: {names or 'none'}")
        return wanted

    def _is_listed(self, wanted: str) -> bool:
        return self.names is not None and (wanted in self.names or (not wanted and len(self.names) == 1))

    def _quick_client(self) -> Any:
        return self.client.with_options(timeout=LIST_TIMEOUT_S, max_retries=0)

    async def _list(self, client: Any) -> tuple[str, ...] | None:
        """The names, or None of a server that lists none. Raises `Unscored` if its URL lacks the /v1."""
        names = await _names_at(client)
        if names is None and not urlsplit(self.url).path:
            with_v1 = client.with_options(base_url=f"{self.url}/v1")
            if await _names_at(with_v1) is not None:
                raise Unscored("failed", f"api_base_url {self.url} has no /v1; the API is at {self.url}/v1")
        return names


async def _names_at(client: Any) -> tuple[str, ...] | None:
    try:
        raw = await client.models.with_raw_response.list()
        return tuple(str(model["id"]) for model in json.loads(raw.content)["data"])
    except (openai.NotFoundError, ValueError, KeyError, TypeError):
        return None


def least_busy(endpoints: Sequence[Endpoint]) -> Endpoint:
    """The one to ask: the well one with the fewest questions in hand; if none is well, the one rested first."""
    well = [e for e in endpoints if e.is_well]
    if well:
        return min(well, key=lambda e: (e.num_in_flight, e.num_asked))
    return min(endpoints, key=lambda e: (e.rests_until, e.num_in_flight))
