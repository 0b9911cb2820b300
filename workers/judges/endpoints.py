"""Servers that judges are asked at, and the names of the models that each serves."""

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
from workers.judges.inner_errors import words_of
from workers.network.servers import Server

log = logging.getLogger(__name__)

LIST_TIMEOUT_S = 10.0
LIST_AGAIN_S = 15.0
"""Names that lacked the one wanted, or had one that is not there, are asked for again after this long: the server may
have been restarted."""

MOST_NAMES = 20
"""So many of the models that a server lists are told; gateways list hundreds."""

_NO_SUCH_MODEL = re.compile(
    r"model_not_found|\bmodel\b.{0,120}(?:does not exist|not exist|not found)|"
    r"(?:no such|unknown|invalid|not a valid) model\b",
    re.IGNORECASE | re.DOTALL,
)
"""How gateways say with another status than 404 that there is no model of a name."""


@dataclass(slots=True, eq=False)
class Endpoint(Server):
    """An OpenAI-compatible API."""

    client: Any = field(kw_only=True)
    """Its `AsyncOpenAI`."""
    names: tuple[str, ...] | None = None
    """Models it lists; None if it was not asked or lists none."""
    is_doubted: bool = False
    """Whether a model that it listed was not found when it was asked for."""
    listed_at: float = float("-inf")
    listing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def model_name(self, wanted: str, client: Any) -> str:
        """The name of the model to ask for: `wanted`, or the only one that the server lists if that is empty.

        A name that the server does not list is asked for all the same: aliases, variants, adapters and names behind a
        wildcard are on no list. Whether there is such a model is for the server to say.

        Args:
            client: Asks with the question's retries, where there is no question without a name.

        Raises:
            Unscored: No name is given and the server lists not just one, or its URL lacks the /v1.
            openai.OpenAIError: Without a name, the server could not be asked for one.
        """
        async with self.listing:
            is_known = (
                self._is_listed(wanted) or (wanted and self.names is not None)
            ) and not self.is_doubted
            if not is_known and time.monotonic() - self.listed_at > LIST_AGAIN_S:
                try:
                    await self._learn_names(
                        wanted, client if not wanted else self._quick_client()
                    )
                except (openai.APIConnectionError, openai.APIStatusError):
                    if not wanted:
                        raise  # else the question itself will meet the same, with its retries
                self.listed_at = time.monotonic()
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
        """What to say behind the words of a server that has no model of this name; the names are asked for anew."""
        self.is_doubted = True
        async with self.listing:
            if time.monotonic() - self.listed_at > LIST_AGAIN_S:
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
            if says_no_such_model(error) or getattr(error, "status_code", None) in (
                401,
                403,
                404,
            ):
                raise
            log.warning(
                "model not asked for a trial url=%s model=%r error=%s",
                self.name,
                name,
                error,
            )

    @property
    def listed(self) -> str:
        """The names of the models that it lists, for people."""
        names = self.names or ()
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return (", ".join(names[:MOST_NAMES]) or "none") + more

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
        """The names, or None of a server that lists none. Raises `Unscored` if its URL lacks the /v1."""
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
    """Whether the server's refusal is about the model's name: a 404, or another status with such words."""
    if isinstance(error, openai.NotFoundError):
        return True
    if getattr(error, "status_code", None) not in (400, 403, 422):
        return False
    body = error.body if isinstance(error.body, Mapping) else {}
    return bool(
        _NO_SUCH_MODEL.search(
            f"{body.get('code')} {words_of(body) or error.response.text}"
        )
    )


async def _names_at(client: Any) -> tuple[str, ...] | None:
    try:
        raw = await client.models.with_raw_response.list()
        listed = json.loads(raw.content)
        models = listed if isinstance(listed, list) else listed["data"]
        return tuple(str(model["id"]) for model in models)
    except (openai.NotFoundError, ValueError, KeyError, TypeError):
        return None
