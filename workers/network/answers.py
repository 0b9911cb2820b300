"""Reads the answers of servers whole: up to so many bytes after decompression, and within the time of one request.

A server may be anybody's, and broken or hostile: 2 MB of gzip can hold 2 GB, and a body that comes a byte a second
keeps every timeout of a single read.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2

from tasks.settings import load_settings
from workers.network.proxies import trusted_certificates

TOO_LARGE = "rewardq_too_large"
"""The key, in `extensions` of an HTTP response, of the words on an answer that was larger than the limit."""

SHOWN_BYTES = 4096
"""How much of an answer that is too large is kept, for a reason to repeat."""

_BODY_HEADERS = ("content-encoding", "content-length", "transfer-encoding")
"""Headers about a body as it was sent; the body is decoded already."""


class BoundedTransport(httpx2.AsyncHTTPTransport):
    """Reads each answer before it is passed on. Redirects are not followed by any client that uses it.

    Args:
        proxy: URL of the proxy that requests go through, if any.
        limits: Of the connections.
    """

    def __init__(self, proxy: str | None, limits: httpx2.Limits) -> None:
        super().__init__(
            verify=trusted_certificates(), trust_env=False, proxy=proxy, limits=limits
        )
        self._max_bytes = load_settings().max_answer_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The answer with its whole body, or with its beginning and `TOO_LARGE` in its extensions.

        Raises:
            httpx2.ReadTimeout: The answer was not whole within the request's time for one read.
        """
        timeout_s = request.extensions.get("timeout", {}).get("read")
        try:
            async with asyncio.timeout(timeout_s):
                response = await super().handle_async_request(request)
                return await self._whole(response)
        except TimeoutError:
            words = f"the answer was not whole within {timeout_s:g} seconds"
            raise httpx2.ReadTimeout(words, request=request) from None

    async def _whole(self, response: httpx2.Response) -> httpx2.Response:
        body = bytearray()
        extensions: dict[str, Any] = dict(response.extensions)
        try:
            # Decompressed, at most 1 MiB at once.
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > self._max_bytes:
                    extensions[TOO_LARGE] = self._words()
                    del body[SHOWN_BYTES:]
                    break
        finally:
            await response.aclose()
        headers = [
            (name, value)
            for name, value in response.headers.raw
            if name.decode("ascii").lower() not in _BODY_HEADERS
        ]
        return httpx2.Response(
            response.status_code,
            headers=headers,
            content=bytes(body),
            extensions=extensions,
        )

    def _words(self) -> str:
        return (
            f"its answer is larger than {self._max_bytes} bytes after decompression; if that is right, raise "
            "REWARDQ_MAX_ANSWER_BYTES on the worker"
        )
