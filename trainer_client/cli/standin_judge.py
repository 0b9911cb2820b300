"""A stand-in for a VLM judge: an OpenAI-compatible chat API that reads no question and only measures sharpness.

It answers `Yes` the more surely the sharper the image is, so that `rewardq demo` shows the whole way of a judge's
reward on a machine without a VLM. It judges nothing: for rewards to train on, point at a real judge.

    P(Yes) = s / (s + SHARP), s = variance of the 4-neighbour Laplacian of the luma in [0, 255]
"""

from __future__ import annotations

import base64
import io
import math
import time
import uuid
from typing import Any

import click
import numpy as np
from PIL import Image

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
"""Sharpness at which it is undecided: a poster of the demo with no flaw has 700 to 2000, a blurred poster 300. Noise
has 20,000, since noise is sharp: this measures sharpness and nothing else."""

SURE = 0.001
"""P(Yes) stays this far from 0 and 1, so that its log probability is finite."""

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
        header, _, data = _first_image_url(body).partition(",")
        if not header.startswith("data:image/") or not header.endswith(";base64"):
            raise ValueError("not a data URL")
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        return image
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise NoImageError(
            f"needs an image as a base64 data URL in a message: {error or type(error).__name__}"
        ) from None


def _first_image_url(body: dict[str, Any]) -> str:
    for message in body["messages"]:
        if not isinstance(message["content"], list):
            continue  # a text, as the system's message
        for part in message["content"]:
            if part["type"] == "image_url":
                url: str = part["image_url"]["url"]
                return url
    raise ValueError("no message has an image")


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
