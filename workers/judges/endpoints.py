"""Servers that judges are asked at, and the names of the models that each serves."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai

from workers.base import Unscored
from workers.network import Server

LIST_TIMEOUT_S = 10.0
LIST_AGAIN_S = 15.0
"""Names that lacked the one wanted, or had one that is not there, are asked for again after this long: the server may
have been restarted."""


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

        Args:
            client: Asks with the question's retries, where there is no question without a name.

        Raises:
            Unscored: The server does not list it, names those that it does, or its URL lacks the /v1.
            openai.OpenAIError: Without a name, the server could not be asked for one.
        """
        async with self.listing:
            is_known = self._is_listed(wanted) and not self.is_doubted
            if not is_known and time.monotonic() - self.listed_at > LIST_AGAIN_S:
                try:
                    self.names = await self._list(client if not wanted else self._quick_client())
                    self.is_doubted = False
                except (openai.APIConnectionError, openai.APIStatusError):
                    if not wanted:
                        raise  # else the question itself will meet the same, with its retries
                self.listed_at = time.monotonic()
        names = ", ".join(self.names or ())
        if self.names is None:
            if not wanted:
                raise Unscored("failed", f"{self.name} lists no models; name the one to ask as vlm_model")
            return wanted  # it does not say: let the request tell
        if not wanted and len(self.names) == 1:
            return self.names[0]
        if not wanted:
            raise Unscored("failed", f"{self.name} serves several models; name one of them as vlm_model: {names}")
        if wanted not in self.names:
            raise Unscored("failed", f"{self.name} serves no model {wanted!r} (vlm_model); it lists: {names or 'none'}")
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
                raise Unscored("failed", f"api_base_url {self.name} has no /v1; the API is at {self.name}/v1")
        return names


async def _names_at(client: Any) -> tuple[str, ...] | None:
    try:
        raw = await client.models.with_raw_response.list()
        return tuple(str(model["id"]) for model in json.loads(raw.content)["data"])
    except (openai.NotFoundError, ValueError, KeyError, TypeError):
        return None
