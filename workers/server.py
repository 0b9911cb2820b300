"""A reward model behind HTTP, for an environment in which nothing else of rewardq can live. One file: copy it there.

It runs on Python 3.9 and needs fastapi, uvicorn, pillow and msgpack. Subclass `RewardServer`, implement
`compute_reward`, call `run()`. Its wire is the JSON of Flow-Factory's remote rewards:

    POST /compute   {"prompt": [text, ...], "image": [PNG in base64 or a data: URL, ...], "video": [[frame, ...], ...],
                     "condition_images": [[image, ...], ...], "condition_videos": [[[frame, ...], ...], ...],
                     "metadata": [{...}, ...], "fps": [number, ...]}; what is null or absent is not given
        200         {"rewards": [number, ...]}, one for each prompt
        4xx, 5xx    {"error": text, "detail": text}; with "errors": {"3": text} where the samples to blame are known,
                    and with "rewards" if the others have theirs: null for each sample to blame
        503         too much in hand; Retry-After says for how many seconds to stay away
    GET  /health    {"status": "ok", ...}: what bodies it takes, how many requests it has in hand

Our own client sends the same as msgpack, an image as {"size": [width, height], "rgb": bytes}.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import logging
import math
import numbers
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import msgpack
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

log = logging.getLogger(__name__)

# onnxruntime reads the variable while it is imported.
if "onnxruntime" in sys.modules and "ORT_DISABLE_TELEMETRY" not in os.environ:
    log.warning(
        "onnxruntime was imported before the reward server and may send telemetry to Microsoft; import the server "
        "first, or set ORT_DISABLE_TELEMETRY=1 where the process is started"
    )
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

MEDIA_DEPTHS = {"image": 0, "video": 1, "condition_images": 1, "condition_videos": 2}
"""Media fields of a request, and how deep the images of one sample lie in lists."""

BY_NAME = ("metadata", "fps")
"""Fields that `compute_reward` gets only where it names them: Flow-Factory's servers know none of them."""

FIELDS = ("prompt", *MEDIA_DEPTHS, *BY_NAME)
"""Fields of a request, which `compute_reward` may take."""

OTHER_NAMES = {"prompts": "prompt", "images": "image", "videos": "video"}
"""What Flow-Factory's guide calls some of them."""

MSGPACK = "application/msgpack"

LONGEST_PAUSE_S = 60
"""The most that a busy server asks a client to stay away."""

LATE = 1.5
"""A request whose turn has not come after so many times `max_wait_s` is answered 503: what calls take was misjudged."""

SMOOTHING = 0.25
"""Weight of the last call's time in the estimate of what the next calls take (exponential smoothing)."""


class RewardServer:
    """Subclass it: load the model in `__init__`, implement `compute_reward`, and `run()`.

    Its attributes are bounds, for a subclass to replace.
    """

    thread_safe = False
    """Whether several threads may call `compute_reward` at once; if not, all calls are made by one thread."""
    num_threads = 8
    """Requests computed at once where it is thread-safe."""
    max_waiting = 32
    """Requests in hand, above which the next is answered 503. Each holds its media in memory; a worker with 32 threads
    sends up to 32."""
    max_wait_s = 20
    """Seconds that a request may have to wait for its turn, by what calls took lately; if it would be longer it is
    answered 503. Keep it and a call well below the clients' `timeout` (60), which runs meanwhile."""
    max_receive_s = 30
    """Seconds in which a request must have arrived whole; else it is answered 408 and counts as in hand no longer."""
    max_body_bytes = 1 << 30
    """A larger request is answered 413; send fewer samples at once."""
    max_pixels = 64 * 1024 * 1024
    """Pixels of one image or frame, above which it is refused."""
    stop_grace_s = 8
    """Seconds that requests in hand may take after SIGTERM or Ctrl-C; a second Ctrl-C ends the server at once."""
    host = "127.0.0.1"
    port = 8000

    def __init__(self, host: str = "127.0.0.1", port: int = 8000) -> None:
        self.host, self.port = host, port

    def compute_reward(self, *args: Any, **kwargs: Any) -> Any:
        """Rewards of `N` samples; `def compute_reward(self, prompt, image=None)` for example.

        Arguments are passed by name, and only those that it declares:
            prompt (or prompts): `N` texts.
            image (or images): `N` RGB images of PIL.
            video (or videos): `N` lists of frames, RGB images of PIL.
            condition_images, condition_videos: `N` lists of images or of videos.
            metadata: `N` mappings.
            fps: `N` numbers, frames a second of the videos.
        Each is None if the request has none, and so is one sample's; a request without one that has no default is
        refused. `**kwargs` takes all but metadata and fps.

        Returns:
            `N` finite numbers in order: a list, an array or a tensor. An exception instead of a number says why that
            sample has no reward. An exception that is raised is the reason for all samples of the call.
        """
        raise NotImplementedError

    def run(self, host: str | None = None, port: int | None = None) -> None:
        """Serve until SIGTERM or Ctrl-C; then answer what is in hand and return.

        Args:
            host: The address to listen on, unless the constructor's; 0.0.0.0 for requests from other hosts. Nobody is
                asked for a password, so only trusted hosts should reach it.
            port: The port to listen on, unless the constructor's.
        """
        if not logging.getLogger().handlers:
            logging.basicConfig(
                level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
            )
        config = uvicorn.Config(
            self.make_app(),
            host=self.host if host is None else host,
            port=self.port if port is None else port,
            access_log=False,
            timeout_graceful_shutdown=self.stop_grace_s,
        )
        is_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        before = {number: signal.signal(number, _stop) for number in signals}
        try:
            uvicorn.Server(config).run()
        except _Stopped:
            # uvicorn stops at the signal, and sends it again when it has answered all.
            log.info("stopped")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def make_app(self) -> FastAPI:
        """The ASGI app, for a process that is not `run()`'s."""
        return _Service(self).app()


# --- private -------------------------------------------------------------------------------------


class _Stopped(BaseException):
    """SIGTERM or Ctrl-C."""


def _stop(*_: Any) -> None:
    raise _Stopped


class _RequestError(Exception):
    """A request that is answered by an error: its status, its text, and more of the body."""

    def __init__(self, status: int, text: str, **more: Any) -> None:
        super().__init__(status, text, more)
        self.status, self.body = status, {"error": text, "detail": text, **more}


class _Service:
    """Takes requests, decodes them, has one after another computed, and answers.

    Its counts are changed on the event loop only, so they need no lock.
    """

    def __init__(self, server: RewardServer) -> None:
        self._server = server
        if type(server).compute_reward is RewardServer.compute_reward:
            name = type(server).__name__
            raise TypeError(f"{name} has no compute_reward; implement it")
        self._arguments, self._needed = _declared_by(server)
        self._calls: queue.SimpleQueue[tuple[Future[Any], Mapping[str, Any]]] = (
            queue.SimpleQueue()
        )
        self._num_in_hand = 0
        """Requests that are not answered yet."""
        self._num_calls = 0
        """Requests in hand that have arrived whole: they are computed, or wait for it."""
        self._compute_s: float | None = None
        """What calls took lately; None before the first."""
        self._num_threads = server.num_threads if server.thread_safe else 1
        for _ in range(self._num_threads):
            name = "compute_reward"
            threading.Thread(target=self._compute, name=name, daemon=True).start()

    def app(self) -> FastAPI:
        app = FastAPI(title=type(self._server).__name__)

        @app.get("/health", response_model=None)
        async def health() -> Any:
            return {
                "status": "ok",
                "takes": ["application/json", MSGPACK],
                "max_body_bytes": self._server.max_body_bytes,
                "num_in_hand": self._num_in_hand,
            }

        @app.post("/compute", response_model=None)
        async def compute(request: Request) -> Any:
            try:
                return JSONResponse({"rewards": await self._rewards(request)})
            except _RequestError as error:
                log.warning("no rewards status=%d", error.status)
                return JSONResponse(
                    error.body, error.status, self._headers(error.status)
                )
            except Exception as error:  # what compute_reward returned may be anything
                log.exception("no rewards status=500")
                return JSONResponse(_RequestError(500, _words(error)).body, 500)

        return app

    def _headers(self, status: int) -> dict[str, str] | None:
        if status == 503:
            pause_s = math.ceil((self._compute_s or 0.0) / self._num_threads)
            return {"Retry-After": str(min(LONGEST_PAUSE_S, max(1, pause_s)))}
        if status == 408:
            # The rest of the late request would be read as the next one.
            return {"Connection": "close"}
        return None

    async def _rewards(self, request: Request) -> list[float]:
        """The rewards of a request's samples. Raises the answer that says why there are none."""
        num_in_hand, most = self._num_in_hand, self._server.max_waiting
        if num_in_hand >= most:
            await self._received(request, 0)
            text = f"{num_in_hand} requests are in hand, the most is {most}"
            raise _RequestError(503, text)
        self._num_in_hand += 1
        try:
            body = await self._received(request, self._server.max_body_bytes)
            if body is None:
                text = f"more than {self._server.max_body_bytes} bytes; send fewer samples at once"
                raise _RequestError(413, text)
            self._check_wait()
            self._num_calls += 1
            try:
                return await self._computed(body, request)
            finally:
                self._num_calls -= 1
        finally:
            self._num_in_hand -= 1

    async def _received(self, request: Request, max_bytes: int) -> bytes | None:
        """The body of a request; None if it is larger."""
        most_s = self._server.max_receive_s
        try:
            return await asyncio.wait_for(_body_of(request, max_bytes), most_s)
        except asyncio.TimeoutError:  # on Python 3.9 another class than TimeoutError
            text = f"not all of it came within {most_s} seconds"
            raise _RequestError(408, text) from None

    def _check_wait(self) -> None:
        """Refuse a request that would wait for too long; one for which a thread is free never does."""
        wait_s = self._num_calls // self._num_threads * (self._compute_s or 0.0)
        if wait_s > self._server.max_wait_s:
            took = f"each took {self._compute_s:.3g} seconds lately"
            wait = f"that makes {wait_s:.3g} seconds, the most is {self._server.max_wait_s}"
            raise _RequestError(
                503, f"{self._num_calls} requests are in hand and {took}: {wait}"
            )

    async def _computed(self, body: bytes, request: Request) -> list[float]:
        kind = request.headers.get("content-type", "")
        given = await asyncio.to_thread(self._decode, body, kind)
        num_samples = len(given["prompt"])
        if not num_samples:
            return []

        call: Future[Any] = Future()
        self._calls.put((call, given))
        most_s = LATE * self._server.max_wait_s
        late = asyncio.get_running_loop().call_later(most_s, call.cancel)
        try:
            found, error = await _unless_gone(call, request)
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            text = f"{self._num_calls} requests are in hand: its turn did not come within {most_s:g} seconds"
            raise _RequestError(503, text) from None
        finally:
            late.cancel()
            if call.cancelled():
                # Drops its media: the call itself stays in the queue until a thread comes to it.
                given.clear()
        if error is not None:
            raise _failed(error, num_samples)
        return _checked(found, num_samples)

    def _decode(self, body: bytes, kind: str) -> dict[str, Any]:
        """The fields that compute_reward takes, and the prompts."""
        fields = _parsed(body, kind)
        lacking = [n for n in FIELDS if n in self._needed and fields.get(n) is None]
        if lacking:
            names = " and ".join(lacking)
            text = f"compute_reward needs {names}, which the request has not"
            raise _RequestError(400, text)
        given: dict[str, Any] = {"prompt": fields["prompt"]}
        for name in self._arguments.values():
            given[name] = fields.get(name)
        self._decode_media(given)
        return given

    def _decode_media(self, given: dict[str, Any]) -> None:
        """Replace the media of a request by images. Raises the answer that says what is wrong with them."""
        problems: dict[str, str] = {}
        for name, depth in MEDIA_DEPTHS.items():
            if given.get(name) is None:
                continue
            images = []
            for i, value in enumerate(given[name]):
                try:
                    images.append(_images(value, depth, self._server.max_pixels))
                except Exception as error:  # Pillow raises whatever its decoders do
                    problems.setdefault(str(i), f"{name}: {_words(error)}")
            given[name] = images
        if problems:
            raise _RequestError(422, _first(problems), errors=problems)

    def _compute(self) -> None:
        """Make calls one after another, for as long as the process lives."""
        while True:
            call, given = self._calls.get()
            if call.set_running_or_notify_cancel():
                call.set_result(self._call(given))
            del call, given  # its media, while the next is waited for

    def _call(self, given: Mapping[str, Any]) -> tuple[Any, BaseException | None]:
        """What compute_reward returns and what it raises."""
        arguments = {name: given.get(field) for name, field in self._arguments.items()}
        started = time.monotonic()
        try:
            return self._server.compute_reward(**arguments), None
        except BaseException as error:  # user code may raise anything, SystemExit too
            log.exception("compute_reward raised")
            return None, error
        finally:
            took_s = time.monotonic() - started
            before_s = took_s if self._compute_s is None else self._compute_s
            self._compute_s = before_s + SMOOTHING * (took_s - before_s)
            log.info(
                "computed num_samples=%d compute_s=%.3f", len(given["prompt"]), took_s
            )


_BY_KEYWORD = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


def _declared_by(server: RewardServer) -> tuple[dict[str, str], set[str]]:
    """The arguments of compute_reward with the field that each takes, and the fields that it cannot do without."""
    arguments, needed, takes_rest = {}, set(), False
    for name, parameter in inspect.signature(server.compute_reward).parameters.items():
        field = OTHER_NAMES.get(name, name)
        is_needed = parameter.default is parameter.empty
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_rest = True
        elif field in FIELDS and parameter.kind in _BY_KEYWORD:
            arguments[name] = field
            if is_needed:
                needed.add(field)
        elif is_needed and parameter.kind is not parameter.VAR_POSITIONAL:
            raise TypeError(
                f"compute_reward takes {name!r}, which no request has; they have {', '.join(FIELDS)}"
            )
    if takes_rest:
        _add_rest(arguments)
    return arguments, needed


def _add_rest(arguments: dict[str, str]) -> None:
    """Add the fields that `**kwargs` takes."""
    named = {*arguments.values(), *BY_NAME}
    for field in FIELDS:
        if field not in named:
            arguments[field] = field


async def _body_of(request: Request, max_bytes: int) -> bytes | None:
    """The body, or None if it is larger. It is read to its end: a client that still sends would miss the answer."""
    parts: list[bytes] = []
    num_bytes, is_more = 0, True
    while is_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise _RequestError(400, "the client left before it had sent all")
        part, is_more = message.get("body", b""), message.get("more_body", False)
        num_bytes += len(part)
        if num_bytes > max_bytes:
            parts.clear()
        else:
            parts.append(part)
    return b"".join(parts) if num_bytes <= max_bytes else None


async def _unless_gone(call: Future[Any], request: Request) -> Any:
    """The call's result; if the client leaves first, a call that has not begun is dropped."""
    answer = asyncio.wrap_future(call)
    gone = asyncio.ensure_future(_is_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        call.cancel()  # at once; answer.cancel() would tell the thread only in the loop's next round
        raise _RequestError(400, "the client left before there was an answer")
    finally:
        gone.cancel()


async def _is_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _parsed(body: bytes, kind: str) -> dict[str, Any]:
    """The fields of a request, each with a value for each prompt."""
    try:
        fields = msgpack.unpackb(body) if kind.startswith(MSGPACK) else json.loads(body)
    except Exception as error:  # msgpack raises many kinds
        text = f"the body cannot be read as {kind or 'JSON'}: {_words(error)}"
        raise _RequestError(400, text) from None
    if not isinstance(fields, dict) or not _is_list_of_texts(fields.get("prompt")):
        raise _RequestError(400, "the body needs 'prompt', a list of texts")
    for name in FIELDS:
        if fields.get(name) is not None:
            _check_length(name, fields[name], len(fields["prompt"]))
    return fields


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _check_length(name: str, value: Any, num_prompts: int) -> None:
    if isinstance(value, list):
        if len(value) == num_prompts:
            return
        found = f"{len(value)} values"
    else:
        found = f"a {type(value).__name__}"
    text = f"{name!r} has {found} for {num_prompts} prompts; it needs a list of one for each"
    raise _RequestError(400, text)


def _images(value: Any, depth: int, max_pixels: int) -> Any:
    """The images in `value`, which lie `depth` lists deep."""
    if value is None:
        return None
    if depth:
        if not isinstance(value, list):
            raise ValueError(f"needs a list, found a {type(value).__name__}")
        return [_images(one, depth - 1, max_pixels) for one in value]
    if isinstance(value, str):
        image = Image.open(io.BytesIO(_bytes_of(value)))
        _check_size(image.size, max_pixels)
        if image.mode.startswith(("I", "F")):
            # More than 8 bits, which Pillow would cut off at white.
            text = f"its mode {image.mode} has no exact RGB; send 8 bits a channel"
            raise ValueError(text)
        return image.convert("RGB")
    if isinstance(value, dict) and {"size", "rgb"} <= value.keys():
        _check_size(value["size"], max_pixels)
        return Image.frombytes("RGB", tuple(value["size"]), value["rgb"])
    raise ValueError(
        f"needs an image as a text in base64, found a {type(value).__name__}"
    )


def _bytes_of(text: str) -> bytes:
    """An image file from base64, plain or in a data: URL."""
    head, is_url, rest = text[:200].partition(":")
    if not is_url:
        return base64.b64decode(text)
    if head != "data":
        raise ValueError(
            f"needs an image in base64, found a URL ({head}:...), which nothing is fetched from"
        )
    kind, comma, _ = rest.partition(",")
    if not comma or not kind.endswith(";base64"):
        raise ValueError("needs a data: URL in base64 (data:image/png;base64,...)")
    return base64.b64decode(text.partition(",")[2])


def _check_size(size: Any, max_pixels: int) -> None:
    width, height = size
    if width <= 0 or height <= 0:
        raise ValueError(f"{width} x {height} are no pixels")
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} are more than {max_pixels} pixels")


def _checked(found: Any, num_samples: int) -> list[Any]:
    """The rewards that compute_reward returned. Raises the answer that names each sample without a reward."""
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, (list, tuple)) or len(values) != num_samples:
        number: Any = f"a {type(found).__name__} instead of"
        if isinstance(values, (list, tuple)):
            number = len(values)
        text = f"compute_reward returned {number} rewards for {num_samples} samples"
        errors = {str(i): text for i in range(num_samples)}
        raise _RequestError(500, f"{_named(num_samples)}: {text}", errors=errors)

    rewards = [_number(value) for value in values]
    problems = {}
    for i, value in enumerate(values):
        if rewards[i] is None:
            problems[str(i)] = _why_no_reward(value)
    if problems:
        raise _RequestError(500, _first(problems), errors=problems, rewards=rewards)
    return rewards


def _why_no_reward(value: Any) -> str:
    if isinstance(value, BaseException):
        return _words(value)
    return f"compute_reward returned {value!r:.200}"


def _number(value: Any) -> float | None:
    """A finite number; None if it is none. Arrays and tensors of one number are taken."""
    try:
        found = value.item() if hasattr(value, "item") else value
        is_number = isinstance(found, numbers.Real) and not isinstance(found, bool)
        return float(found) if is_number and math.isfinite(found) else None
    except (ValueError, RuntimeError, OverflowError):
        return None  # an array of several numbers, or a number larger than a float


def _failed(error: BaseException, num_samples: int) -> _RequestError:
    errors = {"errors": {"0": _words(error)}} if num_samples == 1 else {}
    return _RequestError(500, f"{_named(num_samples)}: {_words(error)}", **errors)


def _named(num_samples: int) -> str:
    return "sample 0" if num_samples == 1 else f"samples 0 to {num_samples - 1}"


def _first(problems: Mapping[str, str]) -> str:
    """The first of the problems, and how many there are."""
    sample, reason = next(iter(problems.items()))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"sample {sample}: {reason}{more}"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()
