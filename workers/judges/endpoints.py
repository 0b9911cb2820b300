"""The servers of judges, and the names of the models that each serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai

from workers.base import Unscored
from workers.judges.inner_errors import cut, words_of
from workers.network.servers import Server

log = logging.getLogger(__name__)

LIST_TIMEOUT_S = 10.0
"""Seconds that a server has for the list of its models."""

LIST_AGAIN_S = 15.0
"""A list of models is asked for again after so many seconds if it lacks the model wanted, or has a model that the
server did not find: the server may have been restarted with another model."""

MOST_NAMES = 20
"""How many of a server's models a reason names; gateways list hundreds."""

MOST_LISTED = 10_000
"""How many of a server's models are kept."""

MAX_NAME_CHARS = 300
"""A longer text is no name of a model."""

REFUSED_STATUSES = (401, 403, 404)
"""Statuses of a trial question that say that no question will be answered: wrong key, not allowed, no such model. After
another error the model may still answer real questions."""

MOST_SEARCHED = 10_000
"""How many characters of an error are searched for words about a model."""

_NO_SUCH_MODEL = re.compile(
    r"model_not_found|\bmodel\b.{0,120}(?:does not exist|not exist|not found)|"
    r"(?:no such|unknown|invalid|not a valid) model\b",
    re.IGNORECASE | re.DOTALL,
)
"""Words by which gateways say, with another status than 404, that there is no model of a name."""


@dataclass(slots=True, eq=False)
class Endpoint(Server):
    """An OpenAI-compatible API."""

    client: Any = field(kw_only=True)
    """Its `AsyncOpenAI`."""
    names: tuple[str, ...] | None = None
    """The models that it lists; None if it was not asked yet, or has no list."""
    is_doubted: bool = False
    """Whether the list may be outdated: a model of the list was not found."""
    listed_at: float = float("-inf")
    """When the list was asked for, on the clock of `time.monotonic`."""
    listing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the list is asked for, so that of many questions only one asks."""

    async def model_name(self, wanted: str, client: Any) -> str:
        """The name of the model to ask for: `wanted`, or the only one that the server lists if `wanted` is empty.

        A name is asked for even if the server does not list it: aliases, variants, adapters and names behind a wildcard
        are on no list. Only the server can say whether there is such a model.

        Args:
            wanted: The option `vlm_model`.
            client: Asks for the list with the question's retries, if a name has to be learned for the question.

        Raises:
            Unscored: No name is given and the server does not list exactly one, or its URL lacks the /v1.
            openai.OpenAIError: No name is given and the list could not be had.
        """
        async with self.listing:
            if not self._knows_enough(wanted) and self._may_list_again():
                await self._list_for_question(wanted, client)

        if wanted:
            return wanted
        if not self.names:
            raise Unscored(
                "failed",
                f"{self.name} lists no models; name the one to ask as vlm_model",
            )
        if len(self.names) == 1:
            return self.names[0]
        raise Unscored(
            "failed",
            f"{self.name} serves several models; name one of them as vlm_model: {self.listed}",
        )

    async def refused(self, wanted: str) -> str:
        """What to add to the words of a server that has no model of this name; the list is asked for anew."""
        self.is_doubted = True
        async with self.listing:
            if self._may_list_again():
                self.listed_at = time.monotonic()
                with contextlib.suppress(
                    openai.APIConnectionError, openai.APIStatusError, Unscored
                ):
                    await self._learn_names(wanted, self._quick_client())
        if self.names is None:
            return f"; {self.name} lists no models: is this the URL of an OpenAI-compatible API?"
        if wanted in self.names:
            return ""
        if not wanted:
            return f"; it lists: {self.listed}"
        return f"; {self.name} serves no model {wanted!r} (vlm_model); it lists: {self.listed}"

    async def check(self, wanted: str) -> None:
        """Ask for the models, and for an answer of one token by a model that is not listed.

        Raises:
            Unscored: There is no model to ask for.
            openai.OpenAIError: The server cannot be asked, or refuses the model.
        """
        client = self._quick_client()
        self.listed_at = time.monotonic()
        await self._learn_names(wanted, client)
        name = await self.model_name(wanted, client)
        if self._is_listed(name):
            return

        question = [{"role": "user", "content": "Answer Yes."}]
        try:
            await client.chat.completions.with_raw_response.create(
                model=name, messages=question, max_tokens=1
            )
        except (openai.APIStatusError, openai.APITimeoutError) as error:
            status = getattr(error, "status_code", None)
            if says_no_such_model(error) or status in REFUSED_STATUSES:
                raise
            log.warning(
                "model not asked for a trial url=%s model=%r error=%s",
                self.name,
                name,
                cut(str(error)),
            )

    @property
    def listed(self) -> str:
        """The names of the models that it lists, in words."""
        names = self.names or ()
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return (", ".join(names[:MOST_NAMES]) or "none") + more

    def _knows_enough(self, wanted: str) -> bool:
        """Whether the list need not be asked for: it is not doubted, and without a name it has exactly one."""
        if self.is_doubted:
            return False
        return self.names is not None if wanted else self._is_listed(wanted)

    def _may_list_again(self) -> bool:
        return time.monotonic() - self.listed_at > LIST_AGAIN_S

    async def _list_for_question(self, wanted: str, client: Any) -> None:
        try:
            await self._learn_names(wanted, self._quick_client() if wanted else client)
        except (openai.APIConnectionError, openai.APIStatusError):
            if not wanted:
                raise
            # with a name the question meets the same error, and has retries
        self.listed_at = time.monotonic()

    async def _learn_names(self, wanted: str, client: Any) -> None:
        self.names = await self._list(client)
        self.is_doubted = False
        if wanted and self.names and wanted not in self.names:
            log.warning(
                "model not listed but asked url=%s model=%r listed=%s",
                self.name,
                wanted,
                self.listed,
            )

    def _is_listed(self, wanted: str) -> bool:
        return self.names is not None and (
            wanted in self.names or (not wanted and len(self.names) == 1)
        )

    def _quick_client(self) -> Any:
        return self.client.with_options(timeout=LIST_TIMEOUT_S, max_retries=0)

    async def _list(self, client: Any) -> tuple[str, ...] | None:
        """The names, or None if the server has no list. Raises `Unscored` if its URL lacks the /v1."""
        names = await _names_at(client)
        if names is None and not urlsplit(self.url).path:
            with_v1 = client.with_options(base_url=f"{self.url}/v1")
            if await _names_at(with_v1) is not None:
                raise Unscored(
                    "failed",
                    f"api_base_url {self.name} has no /v1; the API is at {self.name}/v1",
                )
        return names


def says_no_such_model(error: Any) -> bool:
    """Whether the server refused because of the model's name: by a 404, or by another status and such words."""
    if isinstance(error, openai.NotFoundError):
        return True
    if getattr(error, "status_code", None) not in (400, 403, 422):
        return False

    body = error.body if isinstance(error.body, Mapping) else {}
    words = f"{body.get('code')} {words_of(body) or error.response.text}"
    return _NO_SUCH_MODEL.search(words[:MOST_SEARCHED]) is not None


async def _names_at(client: Any) -> tuple[str, ...] | None:
    try:
        raw = await client.models.with_raw_response.list()
        listed = json.loads(raw.content)
        models = listed if isinstance(listed, list) else listed["data"]
        names = [str(model["id"]) for model in models[:MOST_LISTED]]
    except (openai.NotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return tuple(name for name in names if len(name) <= MAX_NAME_CHARS)
