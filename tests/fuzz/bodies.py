"""Bodies for the reward server: odd ones made by hand, and valid ones changed by chance, over real connections.

Each gets rewards that are right, or an error as JSON with a status that says whose fault it is; 5xx is none of these.
After each the server serves on, and at the end it has nothing in hand and no more memory than before.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import math
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from PIL import Image

from tests.fuzz.counts import Counts, keep
from tests.servers import READY_S, ROOT, STOP_S, clean_env, ends_with_us, free_port, wait_until
from tests.soak.trainer import resident_MB

JSON, MSGPACK = "application/json", "application/msgpack"
SUFFIXES = {JSON: ".json", MSGPACK: ".msgpack"}
"""Of the corpus, by what a body says that it is."""

ANSWER_S = 20.0
"""How long an answer may take on a busy machine."""

MOST_MB = 400.0
"""What the server's memory may grow by, at its peak. It stays at 220 MB after the first thousands of bodies, however
many follow; a body of 1 MB of empty lists is some 60 MB of Python objects, and two may be read at once where a client
left before its answer."""

CHECK_EVERY = 50
"""After so many inputs a plain request is sent, and the counts of the server are looked at."""

REFUSALS = {400, 408, 411, 413, 415, 422, 431, 503}


@dataclass(frozen=True)
class Body:
    """A request's body, and the rewards that it must get; None where only the number of its prompts is known."""

    data: bytes
    kind: str
    rewards: list[float] | None = None


def run(seconds: float) -> Counts:
    """Send bodies for so long; the seed is printed."""
    seed = random.randrange(2**32)
    print(f"bodies: seed {seed}", flush=True)
    rng = random.Random(seed)
    counts = Counts()
    ends = time.monotonic() + seconds
    with _Server.started() as server:
        while time.monotonic() < ends and server.is_alive:
            if rng.random() < 0.02:
                _try_raw(rng, server, counts)
            else:
                _try(_body(rng), server, counts)
            if counts.tried % CHECK_EVERY == 0:
                _check(server, counts)
        _check(server, counts)
    return counts


def replay(files: Sequence[Path]) -> Counts:
    """Send bodies again; what they say that they are is the files' suffix."""
    kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
    counts = Counts()
    with _Server.started() as server:
        for file in files:
            _try(Body(file.read_bytes(), kinds[file.suffix]), server, counts)
        _check(server, counts)
    return counts


# --- what is sent --------------------------------------------------------------------------------


def _body(rng: random.Random) -> Body:
    make = rng.choices((_valid, _odd_fields, _changed_bytes, _by_hand), (2, 6, 5, 1))[0]
    made: Body = make(rng)
    return made


def _valid(rng: random.Random) -> Body:
    num = rng.choice((1, 1, 2, 5))
    prompts = ["".join(rng.choice('aé\U0001f600 \n"\0') for _ in range(rng.randrange(9))) for _ in range(num)]
    reds = [rng.randrange(256) for _ in range(num)]
    is_json = rng.random() < 0.5
    fields: dict[str, Any] = {"prompt": prompts}
    if rng.random() < 0.8:
        fields["image"] = [_png(red) if is_json else _rgb(red) for red in reds]
    else:
        reds = [0] * num
    if rng.random() < 0.3:
        fields["metadata"] = [{"x": i} for i in range(num)]
    rewards = [len(prompt) + red / 256 for prompt, red in zip(prompts, reds, strict=True)]
    data = json.dumps(fields).encode() if is_json else msgpack.packb(fields)
    return Body(data, JSON if is_json else MSGPACK, rewards)


def _odd_fields(rng: random.Random) -> Body:
    fields: dict[Any, Any] = {"prompt": rng.choice((["a"], ["a", "bc"], ["a"], _odd(rng)))}
    for name in rng.sample(FIELDS, rng.choice((1, 1, 2, 4))):
        value = _odd(rng)
        fields[name] = rng.choice((value, [value], [value, value], [[value]], [{"size": value, "rgb": _odd(rng)}]))
    if rng.random() < 0.5:
        return Body(msgpack.packb(fields, default=repr, unicode_errors="surrogatepass"), MSGPACK)
    return Body(json.dumps(fields, default=repr).encode(), JSON)


def _changed_bytes(rng: random.Random) -> Body:
    valid = _valid(rng)
    data = bytearray(valid.data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        i = rng.randrange(len(data) or 1)
        what = rng.random()
        if what < 0.6 and data:
            data[i] = rng.randrange(256)
        elif what < 0.8:
            del data[i : i + rng.randrange(30)]
        else:
            data[i:i] = rng.choice(
                (b"\x00", b"\xff\xff\xff\xff", b"[", b"{", b'"', b"\xdd", b"\xdf", b"1e999", b"NaN", b"\\u")
            )
    return Body(bytes(data), rng.choice((valid.kind, valid.kind, valid.kind, JSON, MSGPACK)))


def _by_hand(rng: random.Random) -> Body:
    data, kind = rng.choice(BY_HAND)
    return Body(data(), kind)


def _odd(rng: random.Random) -> Any:
    return rng.choice(ODD)


def _png(red: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (red, 1, 2)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _rgb(red: int) -> dict[str, Any]:
    return {"size": [3, 2], "rgb": bytes((red, 1, 2)) * 6}


def _image(width: int, height: int, mode: str, kind: str) -> str:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


FIELDS = (
    "prompt", "image", "video", "condition_images", "condition_videos", "metadata", "fps", "extra", "prompts", "",
    "\ud800",
)  # fmt: skip

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**63, -(2**63), 1e308, float("nan"), float("inf"), "", "a", "!!!", "=" * 9, "é" * 5000,
    "\0", "raise", "data:", "data:image/png,x", "data:;base64,", "data:image/svg+xml;base64,PHN2Zy8+",
    "file:///etc/passwd", "http://127.0.0.1:1/", [], {}, [None], [[]], [[[]]], [[None]], {"size": [1, 1]},
    {"rgb": ""}, {"size": [3, 2], "rgb": ""}, [3, 2], [2, 3, 4], [-1, -1], [0, 0], [1e9, 1e-9], [2**40, 0],
    [2**62, 2**62], [True, True], ["a" * 1000, 2000], ["a", "b"], [[1], [2]], [None, None], [65536, 1], [1, 65537],
    [257, 256], {"a": {"b": {"c": []}}}, list(range(2000)), "x" * 100_000, _png(7), _image(256, 256, "L", "PNG"),
    _image(257, 256, "L", "PNG"), _image(9000, 9000, "1", "PNG"), _image(4, 4, "I;16", "PNG"),
    _image(4, 4, "P", "GIF"), _image(4, 4, "RGBA", "WEBP"), _image(4, 4, "CMYK", "TIFF"), _image(4, 4, "RGB", "EPS"),
    _image(4, 4, "RGB", "PDF"), _image(4, 4, "RGB", "ICO"), _image(4, 4, "F", "TIFF"), _image(4, 4, "LA", "PNG"),
    _image(4, 4, "RGB", "PPM"), _image(4, 4, "RGB", "JPEG"), _png(9)[:60],
)  # fmt: skip
"""Values where another is due."""

BYTES = (b"\x00", b"\xff\xff\xff\xff", b"[", b"{", b'"', b"\xdd", b"\xdf", b"1e999", b"NaN", b"\\u")

BY_HAND: tuple[tuple[Callable[[], bytes], str], ...] = (
    (lambda: b"", JSON),
    (lambda: b"", MSGPACK),
    (lambda: b"", ""),
    (lambda: b'{"prompt": ["a"]}', "text/plain"),
    (lambda: b'{"prompt": ["a"]}', MSGPACK),
    (lambda: msgpack.packb({"prompt": ["a"]}), JSON),
    (lambda: b"[" * 500_000, JSON),
    (lambda: b"[" * 5000 + b"]" * 5000, JSON),
    (lambda: b'{"prompt": ["a"], "metadata": ' + b"[" * 900 + b"]" * 900 + b"}", JSON),
    (lambda: b'{"a":' * 100_000, JSON),
    (lambda: b"\x91" * 500_000 + b"\x90", MSGPACK),
    (lambda: b"\xdd\xff\xff\xff\xff", MSGPACK),
    (lambda: b"\xdf\xff\xff\xff\xff", MSGPACK),
    (lambda: b"\xc6\xff\xff\xff\xff", MSGPACK),
    (lambda: b"\xc9\xff\xff\xff\xff\x01", MSGPACK),
    (lambda: b"\xd6\xff\x00\x00\x00\x00", MSGPACK),
    (lambda: b'{"prompt": ["a"], "metadata": [' + b"9" * 100_000 + b"]}", JSON),
    (lambda: b'{"prompt": ["a"], "fps": [1e999]}', JSON),
    (lambda: b'{"prompt": ["a"], "metadata": [NaN]}', JSON),
    (lambda: b'{"prompt": ["\\ud800"]}', JSON),
    (lambda: b'{"prompt": ["\xff"]}', JSON),
    (lambda: b'{"prompt": ["a"], "prompt": ["a", "b"]}', JSON),
    (lambda: '{"prompt": ["a"]}'.encode("utf-16"), JSON),
    (lambda: b'\xef\xbb\xbf{"prompt": ["a"]}', JSON),
    (lambda: b'{"prompt": ["a"], "metadata": [' + b"[]," * 200_000 + b"[]]}", JSON),
    (lambda: b"\x82\xa6prompt\x91\xa1a\xa8metadata\xdd" + struct.pack(">I", 900_000) + b"\x90" * 900_000, MSGPACK),
    (lambda: b"x" * 3_000_000, JSON),
    (lambda: json.dumps({"prompt": ["a"] * 100_000}).encode(), JSON),
    (lambda: json.dumps({"prompt": ["a"], "video": [[_image(256, 256, "RGB", "PNG")] * 200]}).encode(), JSON),
)

RAW: tuple[bytes, ...] = (
    b"\0" * 100,
    b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"".join(b"X%d: a\r\n" % i for i in range(5000)) + b"\r\n",
    b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{",
    b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x",
    b"POST /compute HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
    b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    b"POST /compute HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n",
    b"POST http://other/compute HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    b"POST /compute HTTP/9.9\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
)
"""What is no request, or none that comes to its end."""


# --- what is looked at ---------------------------------------------------------------------------


class _Server:
    """A reward server in its own process."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._log = folder / "server.log"
        command = [*ends_with_us("KILL"), sys.executable, "-m", "tests.fuzz.served", str(self.port)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=clean_env(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(lambda: not self.is_alive or self.health() is not None, READY_S, pace_s=0.1)
        assert self.is_alive, self._log.read_text()
        self.first_MB = resident_MB(self.process.pid)

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[_Server]:
        """One that is ended afterwards."""
        with tempfile.TemporaryDirectory() as folder:
            server = cls(Path(folder))
            try:
                yield server
            finally:
                server.process.terminate()
                server.process.wait(STOP_S)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def peak_MB(self) -> float:  # noqa: N802
        """The most memory that it ever had."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1024

    def post(self, body: Body) -> tuple[int, bytes]:
        """Status and bytes of the answer.

        Raises:
            OSError: There was none in time.
            http.client.HTTPException: What came is none.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.request("POST", "/compute", body.data, {"Content-Type": body.kind} if body.kind else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def health(self) -> dict[str, Any] | None:
        """What it says of itself; None without an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.request("GET", "/health")
            found: dict[str, Any] = json.loads(connection.getresponse().read())
        except (OSError, ValueError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return found


def _try(body: Body, server: _Server, counts: Counts) -> None:
    counts.tried += 1
    try:
        status, answer = server.post(body)
    except TimeoutError:
        counts.stuck += 1
        return _tell(body, counts, f"no answer in {ANSWER_S:g} s")
    except (OSError, http.client.HTTPException) as error:
        if not server.is_alive:
            counts.ended += 1
            return _tell(body, counts, f"the server ended with status {server.process.returncode}")
        # A server may hang up on a body that is too large while it still arrives.
        counts.wrong += 1
        return _tell(body, counts, f"no answer: {type(error).__name__}: {error}")
    counts.refused += status in REFUSALS
    wrong = _what_is_wrong_with(status, answer, body)
    if wrong:
        counts.wrong += 1
        _tell(body, counts, wrong)
    return None


def _what_is_wrong_with(status: int, answer: bytes, body: Body) -> str:
    shown = f"{status} {answer[:200]!r}"
    try:
        said = json.loads(answer, parse_constant=_no_json)
    except ValueError:
        return f"an answer that is no JSON: {shown}"
    if status in REFUSALS:
        if body.rewards is not None:
            return f"a valid request was refused: {shown}"
        return "" if isinstance(said.get("error"), str) and len(said["error"]) < 5000 else f"no error in words: {shown}"
    if status != 200:
        return f"a status for a fault of the server's: {shown}"
    return _what_is_wrong_with_rewards(said.get("rewards"), body)


def _what_is_wrong_with_rewards(rewards: Any, body: Body) -> str:
    if body.rewards is not None:
        return "" if rewards == body.rewards else f"rewards {rewards}, not {body.rewards}"
    prompts = _prompts_in(body)
    if prompts is None:
        return f"rewards for a body in which this client finds no prompts: {rewards!r:.200}"
    if not isinstance(rewards, list) or len(rewards) != len(prompts):
        return f"not as many rewards as prompts: {rewards!r:.200} for {prompts!r:.200}"
    for reward, prompt in zip(rewards, prompts, strict=True):
        if not (isinstance(reward, float | int) and math.floor(reward) == len(prompt)):
            return f"reward {reward!r} for the prompt {prompt!r:.100}"
    return ""


def _prompts_in(body: Body) -> list[str] | None:
    """The prompts of a body, read here; None if there are none."""
    try:
        is_packed = body.kind == MSGPACK
        fields = msgpack.unpackb(body.data, strict_map_key=False) if is_packed else json.loads(body.data)
        prompts = fields["prompt"]
    except Exception:  # msgpack raises many kinds
        return None
    return prompts if isinstance(prompts, list) and all(isinstance(one, str) for one in prompts) else None


def _no_json(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _try_raw(rng: random.Random, server: _Server, counts: Counts) -> None:
    """Send what is no request, and leave."""
    counts.tried += 1
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), ANSWER_S) as connection:
        data = rng.choice(RAW)
        connection.sendall(data if rng.random() < 0.7 else data[: rng.randrange(len(data))])
        connection.settimeout(rng.choice((0.01, 0.2)))
        connection.recv(200)


def _check(server: _Server, counts: Counts) -> None:
    """A plain request is answered, nothing else is in hand, and memory is within its bound."""
    if not server.is_alive:
        if not counts.ended:
            counts.ended += 1
            counts.say(f"the server ended with status {server.process.returncode}")
        return
    try:
        wait_until(lambda: (server.health() or {}).get("num_in_hand") == 0, 3 * ANSWER_S, pace_s=0.1)
        status, answer = server.post(Body(b'{"prompt": ["abc"]}', JSON))
        assert (status, json.loads(answer)) == (200, {"rewards": [3.0]}), (status, answer)
    except (AssertionError, OSError, ValueError, http.client.HTTPException) as error:
        counts.stuck += 1
        counts.say(f"after {counts.tried} inputs it does not serve on: {error}")
    more_MB = server.peak_MB - server.first_MB
    if more_MB > MOST_MB:
        counts.wrong += 1
        counts.say(f"after {counts.tried} inputs its memory was {more_MB:.0f} MB above that of its start")
        server.first_MB = server.peak_MB  # said once


def _tell(body: Body, counts: Counts, words: str) -> None:
    kept = keep("bodies", body.data, SUFFIXES.get(body.kind, ".json"))
    counts.say(f"{kept.name}: {words}")
