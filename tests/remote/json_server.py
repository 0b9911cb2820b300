"""A reward server of the standard library that speaks only Flow-Factory's JSON, and fails as a test says."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
from PIL import Image

from tests.judges.scripted import Answer, ScriptedServer, send

FIELDS = {"prompt", "image", "video", "condition_images", "condition_videos"}


@dataclass
class Asked:
    """One request for rewards."""

    number: int
    """How many came before it."""
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def prompts(self) -> list[str]:
        return self.body["prompt"]


Script = Callable[[Asked], Answer]


def pixels_of(png: str) -> np.ndarray:
    """The pixels `(H, W, 3)` of an image as it travels."""
    with Image.open(io.BytesIO(base64.b64decode(png, validate=True))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def gives(rewards: list[Any], **more: Any) -> Answer:
    """Rewards as the contract words them; more of the answer, `delay_s` for example."""
    return Answer(body=json.dumps({"rewards": rewards}).encode(), **more)


def says_error(status: int, body: Any, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, body if isinstance(body, bytes) else json.dumps(body).encode(), named)


class JsonServer(ScriptedServer):
    """The server. `script` may be replaced while it runs; `health` is what it answers at /health."""

    def __init__(self, script: Script, health: Answer | None = None) -> None:
        self.script, self.health = script, health or Answer(body=b'{"status": "ok"}')
        self.asked: list[Asked] = []
        self.num_health = 0
        super().__init__()

    @property
    def url(self) -> str:
        return self.root

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        self.num_health += 1
        send(handler, self.health if handler.path == "/health" else Answer(404, b"no such page"))

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        if handler.path != "/compute" or handler.headers["Content-Type"] != "application/json":
            send(handler, says_error(422, {"detail": [{"msg": "not a JSON request to /compute"}]}))
            return
        body = json.loads(raw)
        assert body.keys() >= FIELDS
        with self._lock:
            asked = Asked(len(self.asked), body, dict(handler.headers))
            self.asked.append(asked)
        answer = self.script(asked)
        self.is_stopping.wait(answer.delay_s)
        send(handler, answer)
