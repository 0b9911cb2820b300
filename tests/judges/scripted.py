"""An OpenAI-compatible API on loopback that answers as a test says, faults included, and counts what it has in hand."""

from __future__ import annotations

import base64
import json
import math
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "scripted"


@dataclass
class Question:
    """One request for a chat completion."""

    number: int
    """How many came before it."""
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def parts(self) -> list[dict[str, Any]]:
        return [p for m in self.body["messages"] if isinstance(m["content"], list) for p in m["content"]]

    @property
    def text(self) -> str:
        """The text of the user message."""
        return "".join(p["text"] for p in self.parts if p["type"] == "text")

    @property
    def images(self) -> list[tuple[str, bytes]]:
        """MIME type and bytes of each image."""
        urls = [p["image_url"]["url"].partition(",") for p in self.parts if p["type"] == "image_url"]
        return [(head.removeprefix("data:").removesuffix(";base64"), base64.b64decode(data)) for head, _, data in urls]


@dataclass
class Answer:
    """What the server does."""

    status: int = 200
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_after: int | None = None
    """Close the connection after so many bytes of the body; 0 before the status line."""


Script = Callable[[Question], Answer]


def together(num: int, script: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """`script`, whose answers come when so many questions are in hand, however long their senders take."""
    barrier = threading.Barrier(num)

    def wait_and_answer(question: Any) -> Answer:
        barrier.wait(20)
        return script(question)

    return wait_and_answer


def says(
    text: str | None,
    *,
    finish_reason: str | None = "stop",
    logprobs: Mapping[str, float] | None = None,
    delay_s: float = 0.0,
) -> Answer:
    """A chat completion; `logprobs` are probabilities of the first token's candidates."""
    top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in (logprobs or {}).items()]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish_reason,
        "logprobs": {"content": [{**top[0], "top_logprobs": top}]} if top else None,
    }
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
    return Answer(body=json.dumps(body).encode(), delay_s=delay_s)


def says_yes(p_yes: float, *, delay_s: float = 0.0) -> Answer:
    """The answer to a yes/no question whose reward is `p_yes`."""
    return says("Yes", finish_reason="length", logprobs={"Yes": 0.9 * p_yes, "No": 0.9 * (1 - p_yes)}, delay_s=delay_s)


def fails(status: int, words: str, **headers: str) -> Answer:
    """An error as the API words it."""
    body = {"error": {"message": words, "type": "test", "code": status}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps(body).encode(), named)


class ScriptedServer:
    """A server of the standard library; `get` and `post` of a subclass answer what comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_stopping = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.get(self)

            def do_POST(self) -> None:
                owner.post(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """End all answers that are waiting, and the server."""
        self.is_stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class JudgeServer(ScriptedServer):
    """The server. `script` may be replaced while it runs."""

    def __init__(self, script: Script, models: Sequence[str] | None = (MODEL,), prefix: str = "/v1") -> None:
        self.script, self.models, self.prefix = script, models, prefix
        self.questions: list[Question] = []
        self.num_lists = self.num_in_flight = self.most_in_flight = 0
        super().__init__()

    @property
    def url(self) -> str:
        return self.root + self.prefix

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.num_lists += 1
        if handler.path != f"{self.prefix}/models" or self.models is None:
            send(handler, Answer(404, b"no such page"))
            return
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
        send(handler, Answer(body=json.dumps(listed).encode()))

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if handler.path != f"{self.prefix}/chat/completions":
            send(handler, Answer(404, b"no such page"))
            return
        with self._lock:
            question = Question(len(self.questions), body, {k.lower(): v for k, v in handler.headers.items()})
            self.questions.append(question)
            self.num_in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        try:
            answer = self.script(question)
            self.is_stopping.wait(answer.delay_s)
        finally:
            with self._lock:
                self.num_in_flight -= 1
        send(handler, answer)


def send(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    if answer.cut_after == 0:
        reset(handler)
        return
    handler.send_response(answer.status)
    for name, value in {"Content-Type": "application/json", **answer.headers}.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(answer.body)))
    handler.end_headers()
    handler.wfile.write(answer.body[: answer.cut_after])
    if answer.cut_after is not None:
        reset(handler)


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Cut the connection as a crash does."""
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()
