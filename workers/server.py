"""A reward model behind HTTP, for an environment in which nothing else of rewardq can live. One file: copy it there.

It runs on Python 3.9 and needs fastapi, uvicorn, pillow and msgpack. Subclass `RewardServer`, implement
`compute_reward`, call `run()`. Its wire is the JSON of Flow-Factory's remote rewards:

    POST /compute   {"prompt": [text, ...], "image": [PNG in base64 or a data: URL, ...], "video": [[frame, ...], ...],
                     "condition_images": [[image, ...], ...], "condition_videos": [[[frame, ...], ...], ...],
                     "metadata": [{...}, ...], "fps": [number, ...]}; what is null or absent is not given
        200         {"rewards": [number, ...]}, one for each prompt
        4xx, 5xx    {"error": text, "detail": text}; with "errors": {"3": text} where the samples to blame are known,
                    and with "rewards" if the others have theirs: null for each sample to blame
        401         the server has a token in REWARDQ_SERVER_TOKEN, and the request lacks `Authorization: Bearer TOKEN`
    503         too much in hand; Retry-After says for how many seconds to stay away
    GET  /health    {"status": "ok", ...}: what bodies it takes, how many requests are in hand, whether it has a token

Our own client sends the same as msgpack, an image as {"size": [width, height], "rgb": bytes}.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import msgpack
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from uvicorn.protocols.http.h11_impl import H11Protocol

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

TOKEN = "REWARDQ_SERVER_TOKEN"
"""Variable with the token that requests must have; if it is not set, requests need none."""

NO_TOKEN = f"this server wants a token, and the request has none; set {TOKEN} where the client runs"
WRONG_TOKEN = f"the token of the request is not this server's; set the same {TOKEN} where server and client run"

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Image files that are read, by Pillow's names. Of its other formats some run programs (EPS) or are never sent."""

MAX_DEPTH = 64
"""Lists and mappings within each other in a body of msgpack."""

READ_BYTES = 1 << 20
"""What the reader of msgpack takes of a body at once."""

VALUE_BYTES = 128
"""What a value of a parsed body takes in memory at most, besides its text or bytes."""

PIXEL_BYTES = 4
"""What Pillow takes for a pixel of an RGB image."""

LONGEST_REASON = 2000
"""Characters of an error in an answer; the rest is cut."""

BACKLOG = 64
"""Connections that wait for the server to accept them; it accepts so many at once before it closes any."""

LOG_WINDOW_S = 60
"""Seconds in which each kind of log line appears `max_log_lines` times at most."""

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
    sends up to 32. A request is in hand once it has arrived whole."""
    max_wait_s = 20
    """Seconds that a request may have to wait for its turn, by what calls took lately; if it would be longer it is
    answered 503. Keep it and a call well below the clients' `timeout` (60), which runs meanwhile."""
    max_head_s = 10
    """Seconds in which the head of a request must have arrived; else its connection is closed, as an idle one is."""
    max_receive_s = 30
    """Seconds in which a request must have arrived whole; else it is answered 408."""
    max_send_s = 30
    """Seconds for which an answer may wait for a client that does not read it; then its connection is closed."""
    max_connections = 1000
    """Connections, above which one that has not sent a whole request is closed, the oldest first. It is lowered to what
    the process may open (`ulimit -n`)."""
    max_body_bytes = 1 << 30
    """A larger request is answered 413; send fewer samples at once."""
    max_values = 200_000
    """Texts, numbers, images, lists and mappings of one request, above which it is answered 413."""
    max_pixels = 64 * 1024 * 1024
    """Pixels of one image or frame, above which it is refused."""
    max_request_pixels = 256 * 1024 * 1024
    """Pixels of all images and frames of one request, above which it is answered 413 before any is decoded."""
    max_bytes_in_hand = 4 << 30
    """Bytes that all requests together may hold in memory: bodies that arrive, what is made of them, decoded images. A
    request that does not fit is answered 503 while others hold the rest, and 413 if it never would."""
    max_log_lines = 60
    """Log lines of one kind within a minute; the next that is written says how many were left out."""
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
            host: The address to listen on, unless the constructor's; 0.0.0.0 for requests from other hosts. Without a
                token in REWARDQ_SERVER_TOKEN whoever reaches the port is served.
            port: The port to listen on, unless the constructor's.
        """
        where = self.host if host is None else host
        _begin_log(where)
        connections = _Connections(self)
        config = uvicorn.Config(
            self.make_app(),
            host=where,
            port=self.port if port is None else port,
            http=connections.open,  # type: ignore[arg-type]  # it calls this as it calls a class
            ws="none",
            backlog=BACKLOG,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=self.stop_grace_s,
        )
        rate = _LogRate(self.max_log_lines)
        for name in LOGGERS:
            logging.getLogger(name).addFilter(rate)
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
            for name in LOGGERS:
                logging.getLogger(name).removeFilter(rate)

    def make_app(self) -> FastAPI:
        """The ASGI app, for a process that is not `run()`'s.

        Its server must bound connections, the time of a request's head, and log lines, as `run()` does.
        """
        return _Service(self).app()


# --- private -------------------------------------------------------------------------------------


def _begin_log(where: str) -> None:
    """Have log lines shown, unless the program does so itself; the first says who is served."""
    if not logging.getLogger().handlers:
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
        )
    if not _token() and where not in ("127.0.0.1", "::1", "localhost"):
        log.warning(
            "listens on %s and serves whoever reaches it, since %s is not set",
            where,
            TOKEN,
        )


class _Stopped(BaseException):
    """SIGTERM or Ctrl-C."""


def _stop(*_: Any) -> None:
    raise _Stopped


class _RequestError(Exception):
    """A request that is answered by an error: its status, its text, and more of the body."""

    def __init__(self, status: int, text: str, **more: Any) -> None:
        super().__init__(status, text, more)
        self.status, self.body = status, {"error": text, "detail": text, **more}


class _LogRate(logging.Filter):
    """Lets each kind of line pass so many times in a window, so that no client fills a disk.

    Lines that the same place of the code writes are of one kind.
    """

    def __init__(self, max_lines: int) -> None:
        super().__init__()
        self._max_lines = max_lines
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, int], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written; the first of a new window says how many of the last were not."""
        now = time.monotonic()
        with self._lock:
            kind = self._kinds.setdefault((record.pathname, record.lineno), _Kind(now))
            if now - kind.began >= LOG_WINDOW_S:
                num_left_out = kind.num_lines - self._max_lines
                kind.began, kind.num_lines = now, 0
                if num_left_out > 0:
                    said = f"{record.getMessage()} ({num_left_out} lines of this kind were left out before)"
                    record.msg, record.args = said, ()
            kind.num_lines += 1
            return kind.num_lines <= self._max_lines


class _Kind:
    """The lines of one kind in the current window."""

    def __init__(self, began: float) -> None:
        self.began, self.num_lines = began, 0


LOGGERS = (__name__, "uvicorn.error", "asyncio")
"""Where clients can cause log lines: ours, of requests that are malformed, of connections that cannot be accepted."""


class _Connections:
    """The open connections of a server, and their bounds. Used on the event loop only."""

    def __init__(self, server: RewardServer) -> None:
        self.max_head_s, self.max_send_s = server.max_head_s, server.max_send_s
        self._most = min(server.max_connections, _most_sockets())
        self._open: dict[_Connection, None] = {}

    def open(self, *args: Any, **kwargs: Any) -> _Connection:
        """A new connection; called by uvicorn."""
        return _Connection(self, *args, **kwargs)

    def add(self, connection: _Connection) -> None:
        """Take a connection in; if there are too many, the oldest that has not sent a whole request is closed."""
        self._open[connection] = None
        if len(self._open) <= self._most:
            return
        for one in self._open:
            if one.is_waiting:
                one.transport.abort()
                del self._open[one]
                return

    def remove(self, connection: _Connection) -> None:
        """Forget a connection that was closed."""
        self._open.pop(connection, None)


def _most_sockets() -> int:
    """Connections that this process may have open, with as many files left for everything else."""
    try:
        import resource
    except ImportError:  # Windows has no such bound
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft // 2)


class _Connection(H11Protocol):
    """uvicorn's connection, which bounds neither the time of a request's head nor the number of connections."""

    def __init__(self, connections: _Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._all = connections
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether no request has arrived whole that is still to be answered."""
        return self._has_no_request or self.cycle.more_body

    @property
    def _has_no_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """A client has connected: the head of its first request is awaited."""
        super().connection_made(transport)
        self._all.add(self)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Some bytes came: with the end of a head, or without."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """A request is answered: the head of the next is awaited."""
        super().on_response_complete()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, by whomever."""
        self._all.remove(self)
        self._forget_head()
        self._forget_answer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read what it is sent."""
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(
                self._all.max_send_s, self.transport.abort
            )

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._forget_answer()

    def _watch_head(self) -> None:
        if not self._has_no_request or self.transport.is_closing():
            self._forget_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(
                self._all.max_head_s, self.transport.abort
            )

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _forget_answer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None


class _Room:
    """The bytes of memory that all requests in hand share. Used on the event loop only, so it needs no lock."""

    def __init__(self, most: int) -> None:
        self.most, self.num_taken = most, 0


class _Share:
    """What one request has taken of the room."""

    def __init__(self, room: _Room) -> None:
        self._room, self.num_bytes = room, 0

    def take(self, num_bytes: int) -> None:
        """Take so many bytes more. Raises the answer that says that they are not there; then it holds what it had."""
        wanted = self.num_bytes + num_bytes
        most = self._room.most
        if wanted > most:
            text = f"needs {wanted} bytes of memory, the most for all requests is {most}; send fewer samples at once"
            raise _RequestError(413, text)
        if self._room.num_taken + num_bytes > most:
            others = self._room.num_taken - self.num_bytes
            text = f"needs {wanted} bytes of memory, other requests hold {others} of {most}"
            raise _RequestError(503, text)
        self._room.num_taken += num_bytes
        self.num_bytes = wanted

    def keep_until(self, call: Future[Any]) -> None:
        """Keep what is taken until a call is done whose client has left: its media are still in memory."""
        kept = _Share(self._room)
        kept.num_bytes, self.num_bytes = self.num_bytes, 0
        loop = asyncio.get_running_loop()

        def give_back(_: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(kept.give_back)

        call.add_done_callback(give_back)

    def give_back(self, num_bytes: int | None = None) -> None:
        """Give so many bytes back, or all."""
        given = self.num_bytes if num_bytes is None else num_bytes
        self._room.num_taken -= given
        self.num_bytes -= given


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
        self._token = _token()
        self._room = _Room(server.max_bytes_in_hand)
        self._calls: queue.SimpleQueue[tuple[Future[Any], Mapping[str, Any]]] = (
            queue.SimpleQueue()
        )
        self._num_in_hand = 0
        """Requests that have arrived whole and are not answered yet."""
        self._compute_s: float | None = None
        """What calls took lately; None before the first."""
        self._num_threads = server.num_threads if server.thread_safe else 1
        for _ in range(self._num_threads):
            name = "compute_reward"
            threading.Thread(target=self._compute, name=name, daemon=True).start()

    def app(self) -> FastAPI:
        # No page that describes it: it would only help those who look for servers.
        title = type(self._server).__name__
        app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

        @app.get("/health", response_model=None)
        async def health(request: Request) -> Any:
            if "authorization" in request.headers and not self._has_token(request):
                return JSONResponse({"error": WRONG_TOKEN}, 401, self._headers(401))
            said = {
                "status": "ok",
                "takes": ["application/json", MSGPACK],
                "max_body_bytes": self._server.max_body_bytes,
                "num_in_hand": self._num_in_hand,
            }
            return said if self._token is None else {**said, "needs_token": True}

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
        if status == 401:
            return {"WWW-Authenticate": "Bearer", "Connection": "close"}
        if status == 408:
            # The rest of the late request would be read as the next one.
            return {"Connection": "close"}
        return None

    async def _rewards(self, request: Request) -> list[float]:
        """The rewards of a request's samples. Raises the answer that says why there are none."""
        self._check_token(request)
        share = _Share(self._room)
        try:
            body = await self._received(request, share)
            self._check_places()
            self._check_wait()
            self._num_in_hand += 1
            try:
                kind = request.headers.get("content-type", "")
                given = await self._decoded(body, kind, share)
                del body  # its bytes are given back, and need not wait for the rewards
                return await self._computed(given, request, share)
            finally:
                self._num_in_hand -= 1
        finally:
            share.give_back()

    def _check_token(self, request: Request) -> None:
        """Refuse a request without the token of this server, if it has one; nothing of its body is read."""
        if self._token is None:
            return
        if not self._has_token(request):
            is_given = "authorization" in request.headers
            raise _RequestError(401, WRONG_TOKEN if is_given else NO_TOKEN)

    def _has_token(self, request: Request) -> bool:
        """Whether a request has the token of this server, if it has one."""
        if self._token is None:
            return True
        said = request.headers.get("authorization", "").encode("utf-8", "replace")
        return hmac.compare_digest(said, b"Bearer " + self._token)

    async def _received(self, request: Request, share: _Share) -> bytes:
        """The body of a request, whose bytes its share has."""
        most_s = self._server.max_receive_s
        try:
            return await asyncio.wait_for(self._body(request, share), most_s)
        except asyncio.TimeoutError:  # on Python 3.9 another class than TimeoutError
            text = f"not all of it came within {most_s} seconds"
            raise _RequestError(408, text) from None

    async def _body(self, request: Request, share: _Share) -> bytes:
        """The body of a request.

        It is read to its end, also if it is refused meanwhile: a client that still sends would miss the answer.
        """
        body = io.BytesIO()
        refusal: _RequestError | None = None
        async for part in _parts(request):
            if refusal is not None:
                continue
            try:
                self._check_places()
                self._take(share, part)
            except _RequestError as error:
                refusal = error
                share.give_back()
                body = io.BytesIO()
            else:
                body.write(part)
        if refusal is not None:
            raise refusal
        return body.getvalue()

    def _take(self, share: _Share, part: bytes) -> None:
        if share.num_bytes + len(part) > self._server.max_body_bytes:
            text = f"more than {self._server.max_body_bytes} bytes; send fewer samples at once"
            raise _RequestError(413, text)
        share.take(len(part))

    def _check_places(self) -> None:
        """Refuse a request while too many are in hand."""
        num_in_hand, most = self._num_in_hand, self._server.max_waiting
        if num_in_hand >= most:
            text = f"{num_in_hand} requests are in hand, the most is {most}"
            raise _RequestError(503, text)

    def _check_wait(self) -> None:
        """Refuse a request that would wait for too long; one for which a thread is free never does."""
        wait_s = self._num_in_hand // self._num_threads * (self._compute_s or 0.0)
        if wait_s > self._server.max_wait_s:
            took = f"each took {self._compute_s:.3g} seconds lately"
            wait = f"that makes {wait_s:.3g} seconds, the most is {self._server.max_wait_s}"
            raise _RequestError(
                503, f"{self._num_in_hand} requests are in hand and {took}: {wait}"
            )

    async def _decoded(self, body: bytes, kind: str, share: _Share) -> dict[str, Any]:
        """The prompts and the fields that compute_reward takes. Memory is taken before it is used."""
        most = self._server.max_values
        share.take(await asyncio.to_thread(_parsing_bytes, body, kind, most))
        before = share.num_bytes
        given = await asyncio.to_thread(self._opened, body, kind)
        pixel_bytes = PIXEL_BYTES * self._num_pixels(given)
        share.take(pixel_bytes)
        await asyncio.to_thread(_load_media, given)
        share.give_back(before)
        return given

    async def _computed(
        self, given: dict[str, Any], request: Request, share: _Share
    ) -> list[float]:
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
            text = f"{self._num_in_hand} requests are in hand: its turn did not come within {most_s:g} seconds"
            raise _RequestError(503, text) from None
        finally:
            late.cancel()
            if call.cancelled():
                # Drops its media: the call itself stays in the queue until a thread comes to it.
                given.clear()
            elif not call.done():
                share.keep_until(call)
        if error is not None:
            raise _failed(error, num_samples)
        return _checked(found, num_samples)

    def _opened(self, body: bytes, kind: str) -> dict[str, Any]:
        """The fields that compute_reward takes, and the prompts; no image is decoded yet."""
        fields = _parsed(body, kind, self._server.max_values)
        lacking = [n for n in FIELDS if n in self._needed and fields.get(n) is None]
        if lacking:
            names = " and ".join(lacking)
            text = f"compute_reward needs {names}, which the request has not"
            raise _RequestError(400, text)
        given: dict[str, Any] = {"prompt": fields["prompt"]}
        for name in self._arguments.values():
            given[name] = fields.get(name)
        _check_each(given, "metadata", "a mapping", _is_mapping)
        _check_each(given, "fps", "a finite number", _is_finite)
        _open_media(given, self._server.max_pixels)
        return given

    def _num_pixels(self, given: Mapping[str, Any]) -> int:
        """The pixels of a request's images. Raises the answer that says that they are too many."""
        num_pixels = 0
        for name in MEDIA_DEPTHS:
            for picture in _pictures(given.get(name)):
                num_pixels += picture.num_pixels
        most = self._server.max_request_pixels
        if num_pixels > most:
            text = f"{num_pixels} pixels in all its images, the most is {most}; send fewer samples at once"
            raise _RequestError(413, text)
        return num_pixels

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


def _token() -> bytes | None:
    """The token that requests must have; None if they need none.

    Raises:
        ValueError: It cannot stand in a header.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token:  # compose sets a variable that has no value to ""
        return None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{TOKEN} needs letters, digits and signs of ASCII only")
    return token.encode()


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


async def _parts(request: Request) -> Any:
    """The parts of a request's body, as they come."""
    is_more = True
    while is_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise _RequestError(400, "the client left before it had sent all")
        is_more = message.get("more_body", False)
        yield message.get("body", b"")


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


def _parsing_bytes(body: bytes, kind: str, max_values: int) -> int:
    """What parsing a body takes in memory at most, besides the body. Raises the answer that says that it is too much.

    The values of a JSON text are counted by the signs that are between values, which base64 has none of.
    """
    if kind.startswith(MSGPACK):
        # The reader's buffer, and a copy of each text and image. The values are counted while they are read.
        return 2 * len(body) + VALUE_BYTES * min(max_values, len(body))
    num_values = 1 + sum(body.count(sign) for sign in (b",", b"[", b"{", b":"))
    if num_values > max_values:
        raise _too_many_values(max_values)
    # A text with one character beyond ASCII may take four bytes for each of its characters.
    text = 1 if body.isascii() else 4
    values = text if b"\\u" not in body else 4
    return (text + values + 1) * len(body) + VALUE_BYTES * num_values


def _too_many_values(max_values: int) -> _RequestError:
    text = f"more than {max_values} values in the request; send fewer samples at once"
    return _RequestError(413, text)


def _parsed(body: bytes, kind: str, max_values: int) -> dict[str, Any]:
    """The fields of a request, each with a value for each prompt."""
    try:
        is_msgpack = kind.startswith(MSGPACK)
        fields = (
            _MsgpackReader(body, max_values).read() if is_msgpack else json.loads(body)
        )
    except _RequestError:
        raise
    except Exception as error:  # msgpack raises many kinds
        text = f"the body cannot be read as {kind[:100] or 'JSON'}: {_words(error)}"
        raise _RequestError(400, text) from None
    if not isinstance(fields, dict) or not _is_list_of_texts(fields.get("prompt")):
        raise _RequestError(400, "the body needs 'prompt', a list of texts")
    for name in FIELDS:
        if fields.get(name) is not None:
            _check_length(name, fields[name], len(fields["prompt"]))
    return fields


class _MsgpackReader:
    """Reads one value of msgpack, with bounds on how many values are in it and how deep.

    msgpack's own reader makes room for as many entries as a list says that it has. So a body of a few bytes could ask
    for gigabytes, and one of empty lists takes many times its bytes.
    """

    def __init__(self, body: bytes, max_values: int) -> None:
        self._body = body
        self._unpacker = msgpack.Unpacker(
            io.BytesIO(body),
            read_size=READ_BYTES,
            max_buffer_size=max(READ_BYTES, len(body)),
        )
        self._max_values = self._num_left = max_values

    def read(self) -> Any:
        """The value, with nothing behind it."""
        value = self._value(MAX_DEPTH)
        if self._unpacker.tell() != len(self._body):
            raise ValueError("more bytes than one value")
        return value

    def _value(self, depth: int) -> Any:
        self._num_left -= 1
        if self._num_left < 0:
            raise _too_many_values(self._max_values)
        sign = self._next_byte()
        if 0x90 <= sign <= 0x9F or sign in (0xDC, 0xDD):
            return self._list(depth - 1)
        if 0x80 <= sign <= 0x8F or sign in (0xDE, 0xDF):
            return self._mapping(depth - 1)
        return self._unpacker.unpack()

    def _next_byte(self) -> int:
        position: int = self._unpacker.tell()
        if position >= len(self._body):
            raise ValueError("it ends within a value")
        return self._body[position]

    def _list(self, depth: int) -> list[Any]:
        _check_depth(depth)
        values = []
        for _ in range(self._unpacker.read_array_header()):
            values.append(self._value(depth))
        return values

    def _mapping(self, depth: int) -> dict[Any, Any]:
        _check_depth(depth)
        values = {}
        for _ in range(self._unpacker.read_map_header()):
            key = self._value(0)
            values[key] = self._value(depth)
        return values


def _check_depth(depth: int) -> None:
    if depth < 0:
        raise ValueError("lists and mappings lie too deep in each other, or in a key")


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


def _check_each(
    given: Mapping[str, Any], name: str, what: str, is_so: Callable[[Any], bool]
) -> None:
    """Refuse samples whose value of a field is of another type; a sample may have none."""
    problems = {}
    for i, value in enumerate(given.get(name) or ()):
        if value is not None and not is_so(value):
            found = f"needs {what}, found a {type(value).__name__}"
            problems[str(i)] = f"{name}: {found}"
    if problems:
        raise _RequestError(422, _first(problems), errors=problems)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


class _Picture:
    """An image of a request whose size is known and whose pixels are not decoded yet."""

    def __init__(self, size: tuple[int, int], load: Callable[[], Image.Image]) -> None:
        self.num_pixels = size[0] * size[1]
        self.load = load


def _open_media(given: dict[str, Any], max_pixels: int) -> None:
    """Replace the media of a request by pictures. Raises the answer that says what is wrong with them."""

    def opened(value: Any, depth: int) -> Any:
        return _each_leaf(value, depth, lambda one: _picture(one, max_pixels))

    _replace_media(given, opened)


def _load_media(given: dict[str, Any]) -> None:
    """Replace the pictures of a request by images. Raises the answer that says what is wrong with them."""

    def loaded(value: Any, depth: int) -> Any:
        return _each_leaf(value, depth, lambda one: one.load())

    _replace_media(given, loaded)


def _replace_media(given: dict[str, Any], made: Callable[[Any, int], Any]) -> None:
    problems: dict[str, str] = {}
    for name, depth in MEDIA_DEPTHS.items():
        values = given.get(name)
        if values is None:
            continue
        for i, value in enumerate(values):
            try:
                values[i] = None if value is None else made(value, depth)
            except Exception as error:  # Pillow raises whatever its decoders do
                problems.setdefault(str(i), f"{name}: {_words(error)}")
    if problems:
        raise _RequestError(422, _first(problems), errors=problems)


def _each_leaf(value: Any, depth: int, made: Callable[[Any], Any]) -> Any:
    """`value`, in which images lie `depth` lists deep, with `made` of each image."""
    if not depth:
        return made(value)
    if not isinstance(value, list):
        raise ValueError(f"needs a list, found a {type(value).__name__}")
    return [_each_leaf(one, depth - 1, made) for one in value]


def _pictures(value: Any) -> Iterator[_Picture]:
    """All pictures in lists of lists."""
    if isinstance(value, list):
        for one in value:
            yield from _pictures(one)
    elif value is not None:
        yield value


def _picture(value: Any, max_pixels: int) -> _Picture:
    if isinstance(value, str):
        return _picture_of_file(_bytes_of(value), max_pixels)
    if isinstance(value, dict) and {"size", "rgb"} <= value.keys():
        return _picture_of_pixels(value["size"], value["rgb"], max_pixels)
    raise ValueError(
        f"needs an image as a text in base64, found a {type(value).__name__}"
    )


def _picture_of_file(content: bytes, max_pixels: int) -> _Picture:
    formats = _formats()
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError:
        found = f"{len(content)} bytes that are none of {', '.join(formats)}"
        raise ValueError(f"needs an image file, found {found}") from None
    _check_size(image.size, max_pixels)
    if image.mode.startswith(("I", "F")):
        # More than 8 bits, which Pillow would cut off at white.
        text = f"its mode {image.mode} has no exact RGB; send 8 bits a channel"
        raise ValueError(text)
    return _Picture(image.size, lambda: image.convert("RGB"))


def _picture_of_pixels(size: Any, rgb: Any, max_pixels: int) -> _Picture:
    is_pair = isinstance(size, list) and len(size) == 2
    if not is_pair or not all(type(side) is int and side > 0 for side in size):
        raise ValueError("needs a size of [width, height], two integers above 0")
    _check_size(size, max_pixels)
    width, height = size
    if not isinstance(rgb, bytes):
        raise ValueError(f"needs rgb as bytes, found a {type(rgb).__name__}")
    if len(rgb) != 3 * width * height:
        text = f"{width} x {height} need {3 * width * height} bytes of rgb, found {len(rgb)}"
        raise ValueError(text)
    return _Picture(
        (width, height), lambda: Image.frombytes("RGB", (width, height), rgb)
    )


def _formats() -> tuple[str, ...]:
    """The image files that this Pillow reads and we let it."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


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
    words = f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()
    if len(words) <= LONGEST_REASON:
        return words
    return f"{words[:LONGEST_REASON]}... ({len(words)} characters)"
