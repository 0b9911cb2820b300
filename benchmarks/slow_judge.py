"""A judge that thinks for as long as its model's name says and answers Yes: `python -m benchmarks.slow_judge PORT`.

`GET /times` returns when each request came in and was answered, in seconds, and forgets them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
from typing import Any

import uvicorn

MODELS = ("0.5", "2")
"""Seconds that a request takes."""

HOST = "127.0.0.1"

_times: list[tuple[float, float]] = []


def take_times(port: int) -> list[tuple[float, float]]:
    """When each request since the last call came in (its body read) and was answered, in the order of answers."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/times", timeout=30) as reply:
        times: list[list[float]] = json.load(reply)
    return [(start, end) for start, end in times]


def is_up(port: int) -> bool:
    """Whether the server answers."""
    try:
        take_times(port)
    except OSError:
        return False
    return True


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The ASGI app."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/v1/chat/completions":
        await _send(send, await _complete(receive))
    elif scope["path"] == "/v1/models":
        models = [{"id": name, "object": "model"} for name in MODELS]
        await _send(send, {"object": "list", "data": models})
    else:
        await _send(send, _times)
        _times.clear()


async def _complete(receive: Any) -> dict[str, Any]:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    started = time.monotonic()
    model = json.loads(b"".join(parts))["model"]
    await asyncio.sleep(float(model) - (time.monotonic() - started))
    _times.append((started, time.monotonic()))
    yes = {"token": "Yes", "logprob": -0.1, "bytes": None}
    no = {"token": "No", "logprob": -2.4, "bytes": None}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Yes"},
        "finish_reason": "length",
        "logprobs": {"content": [{**yes, "top_logprobs": [yes, no]}]},
    }
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [choice],
    }


async def _send(send: Any, body: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


if __name__ == "__main__":
    uvicorn.run(
        app, host=HOST, port=int(sys.argv[1]), log_level="warning", lifespan="off"
    )
