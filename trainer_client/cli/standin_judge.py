"""A stand-in for a VLM judge: an OpenAI-compatible chat API that reads no question and only measures sharpness.

It answers `Yes` the more surely the sharper the image is, so that `rewardq demo` shows the whole way of a judge's
reward on a machine without a VLM. It judges nothing: for rewards to train on, point at a real judge.

    P(Yes) = s / (s + SHARP), s = variance of the 4-neighbour Laplacian of the luma in [0, 255]
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import time
import uuid
from typing import Any

import click
import numpy as np
from PIL import Image, UnidentifiedImageError

from tasks.errors import MissingExtraError

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
except ImportError as error:
    raise MissingExtraError(
        "the stand-in judge", error.name or "fastapi", "demo"
    ) from None

NAME = "sharpness-standin"
"""The model it calls itself."""

SHARP = 600.0
"""Sharpness at which it is undecided: a poster of the demo with no flaw has 700 to 2000, a blurred one 300.
Noise, which is sharp too, has 20,000: it measures no more than it says."""

SURE = 0.001
"""P(Yes) keeps this far from 0 and 1: a log probability is finite."""

app = FastAPI(title="Stand-in judge: measures sharpness, judges nothing")


class NoImageError(ValueError):
    """A chat without an image that can be read."""


@app.exception_handler(NoImageError)
def refuse(_request: Request, error: NoImageError) -> JSONResponse:
    """The answer to a chat without an image, as the API words errors."""
    return JSONResponse(
        {"error": {"message": str(error), "type": "invalid_request_error"}},
        status_code=400,
    )


@app.get("/v1/models")
def models() -> dict[str, Any]:
    """The one model, as the API lists it."""
    return {
        "object": "list",
        "data": [{"id": NAME, "object": "model", "created": 0, "owned_by": "rewardq"}],
    }


@app.post("/v1/chat/completions")
def complete(body: dict[str, Any]) -> dict[str, Any]:
    """Yes or No on the first image of a chat, with the log probabilities of both."""
    p_yes = yes_probability(sharpness(_first_image(body)))
    top = [_candidate(" Yes", p_yes), _candidate(" No", 1.0 - p_yes)]
    top.sort(key=lambda candidate: -candidate["logprob"])
    answer = {**top[0], "top_logprobs": top}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": NAME,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": top[0]["token"]},
                "logprobs": {"content": [answer]} if body.get("logprobs") else None,
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 0, "completion_tokens": 1, "total_tokens": 1},
    }


def sharpness(image: Image.Image) -> float:
    """Variance of the 4-neighbour Laplacian of the luma, in squared grey levels of [0, 255]."""
    luma = np.asarray(image.convert("L"), dtype=np.float32)
    inner = luma[1:-1, 1:-1]
    laplacian = (
        luma[:-2, 1:-1]
        + luma[2:, 1:-1]
        + luma[1:-1, :-2]
        + luma[1:-1, 2:]
        - 4.0 * inner
    )
    return float(laplacian.var())


def yes_probability(sharpness: float) -> float:
    """P(Yes), rising with sharpness from 0 to 1."""
    return min(1.0 - SURE, max(SURE, sharpness / (sharpness + SHARP)))


def _candidate(token: str, probability: float) -> dict[str, Any]:
    return {
        "token": token,
        "logprob": math.log(probability),
        "bytes": list(token.encode()),
    }


def _first_image(body: dict[str, Any]) -> Image.Image:
    try:
        parts = [
            p
            for m in body["messages"]
            if isinstance(m["content"], list)
            for p in m["content"]
        ]
        url: str = next(
            p["image_url"]["url"] for p in parts if p["type"] == "image_url"
        )
        header, _, data = url.partition(",")
        if not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ValueError("not a data URL")
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        return image
    except (
        KeyError,
        TypeError,
        StopIteration,
        ValueError,
        binascii.Error,
        UnidentifiedImageError,
        OSError,
    ) as error:
        raise NoImageError(
            f"needs an image as a base64 data URL in a message: {error or type(error).__name__}"
        ) from None


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), required=True)
def serve(port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM or Ctrl-C."""
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )


if __name__ == "__main__":
    serve()
