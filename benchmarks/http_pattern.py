"""The pattern in use today, to compare with: JSON over HTTP with base64 PNGs, a FastAPI server that decodes them.

It does what Flow-Factory's remote reward and its example server do. `python -m benchmarks.http_pattern PORT` serves.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from PIL import Image

from tasks.media import PixelsHWC

BATCH_SIZE = 16
"""Images in a request."""

HOST = "127.0.0.1"
TIMEOUT_S = 300.0


def is_up(port: int) -> bool:
    """Whether the server answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def score(port: int, images: Sequence[PixelsHWC], num_threads: int) -> list[float]:
    """Rewards of images, `BATCH_SIZE` a request; each thread has one request in flight."""
    batches = []
    for start in range(0, len(images), BATCH_SIZE):
        batches.append(images[start : start + BATCH_SIZE])
    rewards: list[float] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for answer in pool.map(partial(_post, port), batches):
            rewards += answer
    return rewards


def _post(port: int, images: Sequence[PixelsHWC]) -> list[float]:
    request = {"prompt": [""] * len(images), "image": list(map(_to_base64, images))}
    body, headers = json.dumps(request), {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/compute", body, headers)
        rewards: list[float] = json.load(connection.getresponse())["rewards"]
    finally:
        connection.close()
    return rewards


def _to_base64(pixels_HWC: PixelsHWC) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _from_base64(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def make_server() -> Any:
    """The FastAPI app; its reward is 1.0."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/compute")
    async def compute(request: dict[str, Any]) -> dict[str, list[float]]:
        images = list(map(_from_base64, request["image"]))
        return {"rewards": [1.0] * len(images)}

    return app


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(make_server(), host=HOST, port=int(sys.argv[1]), log_level="warning")
