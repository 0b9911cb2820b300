"""Mutated requests and task messages, handed to the worker's real `handle_task` against a real Redis."""

from __future__ import annotations

import io
import logging
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgpack
import numpy as np
from PIL import Image

from tasks import keys
from tasks.media import digest
from tasks.messages import WIRE_VERSION
from tasks.outcomes import WorkerOutcomes
from tasks.payloads import RedisStore
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.fuzz.counts import Counts, try_for
from tests.servers import RedisServer
from workers.scoring.chunk import score_chunk
from workers.scoring.context import ScoringContext
from workers.scoring.group import score_and_combine, wait_and_combine
from workers.scoring.handling import GroupRequest, ScoreRequest, handle_task
from workers.scoring.held_claims import HeldClaims
from workers.scoring.runner import ModelRunner

log = logging.getLogger(__name__)

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**53 + 1, 2**62, 2**63, -(2**63), 2**64 - 1),
    *(0.0, -0.0, 0.5, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *("", " ", "x", "\0", "a\nb", "\x1b[31m", "é猫", "nan", "x" * 5000, "x" * 100_000),
    *("../..", "/etc/passwd", "/proc/self/environ", "file:///etc/passwd", "http://127.0.0.1:1/v1"),
    *("os.system", "tests.reward_models.__main__.X", "workers.judges.judge.Judge", "OPENAI_API_KEY", "PATH"),
    *(b"", b"\xff" * 100, [], {}, [[]], [0] * 1000, [-1, -1, 3], [2**40, 2**40, 3], [0, 8, 3]),
    *({"": ""}, {"__class__": 1}, {"x": {"y": [None]}}),
)
"""Values that take the place of others."""

MODELS = ("jpeg_compressibility", "tests.reward_models.PixelCode", "vllm_evaluate", "RemotePointwiseRewardModel")
"""What base requests ask for. No judge or reward server is asked: REWARDQ_JUDGE_HOSTS names a host that is none."""

MOST_BYTES = 64 * 1024
"""A note or an outcome of one odd sample is never larger."""

SLOW_S = 20.0
"""A message that takes longer has wedged its slot."""


def run(seconds: float, seed: int | None = None) -> Counts:
    """Hand mutated requests to a worker's code for so many seconds.

    Args:
        seconds: How long; the Redis that is started for it, on a free port of loopback, takes a second more.
        seed: Of the mutations; another each time unless given. What fails is logged with its seed and number.

    Returns:
        How many messages were `tried`, how many of them were `refused` (a note, a failure, or dropped), how many did
        something `wrong` (a reward that is not that of the image, a key without TTL, a note or outcome that is too
        large, a queue's offset beyond its counter), and how many `ended` the task by an error, or wedged it.
    """
    with _bench() as bench:
        return try_for("requests", seconds, seed, bench.try_one)


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of plain data with one part of it replaced, removed, added, repeated or changed a little."""
    paths = list(_walk(value))
    if not paths:
        return rng.choice(ODD)
    return _replaced(value, rng.choice(paths), rng)


# --- private -------------------------------------------------------------------------------------


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list | tuple) else []


def _walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each part of plain data."""
    for key in _keys(value):
        yield (*path, key)
        yield from _walk(value[key], (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], rng: random.Random) -> Any:
    key, *rest = path
    copied: Any = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copied[key] = _replaced(copied[key], tuple(rest), rng)
        return copied
    how = rng.randrange(6)
    if how == 0:
        del copied[key]
    elif how == 1 and isinstance(copied, dict):
        copied[rng.choice(("x", "", "__class__", "wire", "failure", "members"))] = rng.choice(ODD)
    elif how == 1:
        copied += [copied[key]] * rng.choice((1, 10))
    elif how == 2:
        copied[key] = _changed(copied[key], rng)
    else:
        copied[key] = rng.choice(ODD)
    return copied


def _changed(value: Any, rng: random.Random) -> Any:
    """A value that is nearly the same."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 1000))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("\0a/.:é\n") + value[at + 1 :]
    nested: Any = value
    for _ in range(rng.choice((1, 10, 200))):
        nested = [nested]
    return nested


class _Bench:
    """A worker's parts in this process, a Redis, one image, and base requests for it."""

    def __init__(self, url: str) -> None:
        self.settings = load_settings(broker_url=url, modules="tests.reward_models", device="cpu", max_models=4)
        self.results = connect(self.settings.results)
        self.store = RedisStore(self.settings.payloads)
        outcomes = WorkerOutcomes(self.results, self.settings.claim_ttl_s, self.settings.result_ttl_s)
        runner = ModelRunner(self.settings)
        context = ScoringContext(
            "gpu.1@here", outcomes, self.store, HeldClaims(outcomes), runner, send_body=lambda _: None
        )
        self.app = SimpleNamespace(scoring_context=context)
        self.pixels = np.random.default_rng(7).integers(0, 256, (8, 8, 3), np.uint8)
        self.ref = {
            "name": "f.image",
            "digest": digest(self.pixels.tobytes()),
            "shape": [8, 8, 3],
            "format": "raw",
        }
        self.results.set(keys.sent_number("gpu"), 1000)

    def close(self) -> None:
        self.results.close()

    def try_one(self, rng: random.Random) -> str:
        """Send one message, and see what came of it: refused, scored, wrong, ended."""
        self.store.put({"f.image": self.pixels.tobytes()}, 60)
        is_group = rng.random() < 0.3
        request = self._request(rng, is_group)
        packed = _packed(request, rng)
        request = _unpacked(packed)
        arguments = {
            "label": "f",
            "request_id": "f.r",
            "wire": WIRE_VERSION,
            "number": 7,
            "store": self.store.identity(),
        }
        if rng.random() < 0.2:
            arguments = mutated(arguments, rng)
        self.store.put({"f.r": packed}, 60)
        kind, work = (
            (GroupRequest, rng.choice((score_and_combine, wait_and_combine)))
            if is_group
            else (ScoreRequest, score_chunk)
        )

        task = SimpleNamespace(app=self.app, request=SimpleNamespace(delivery_info={"routing_key": "gpu"}))
        began_s = time.monotonic()
        try:
            fields = {name: one for name, one in arguments.items() if isinstance(name, str)}
            words = handle_task(task, fields, kind, work)
        except TypeError as error:
            if "unexpected keyword" not in str(error) and "missing" not in str(error):
                log.exception("ended")
                return "ended"
            return "refused"  # Celery does not call a task with such arguments
        except BaseException:
            log.exception("ended")
            return "ended"
        if time.monotonic() - began_s > SLOW_S:
            return "ended"
        return self._verdict(request, words)

    def _request(self, rng: random.Random, is_group: bool) -> Any:
        model = rng.choice(MODELS[:2] if rng.random() < 0.8 else MODELS)
        sample = {"address": f"run:{rng.randrange(16**16):016x}:k", "prompt": "a cat", "media": {"image": self.ref}}
        reward = {
            "name": "r", "model": model, "fingerprint": "f" * 16, "version": "1", "dtype": "float32", "batch_size": 4,
            "timeout_s": 5.0, "image_format": "raw", "options": _options(model),
        }  # fmt: skip
        now_ms = int(time.time() * 1000)
        request: dict[str, Any] = {
            "wire": WIRE_VERSION, "id": "f.r", "run": "run", "label": "f",
            "sent_ms": now_ms, "deadline_ms": now_ms + 60_000, "reward": reward,
        }  # fmt: skip
        if is_group:
            other = {**sample, "address": f"run:{rng.randrange(16**16):016x}:l"}
            request |= {"how": "rank", "address": f"run:{rng.randrange(16**16):016x}:g", "members": [sample, other]}
        else:
            request["samples"] = [sample]
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            request = mutated(request, rng)
        return request

    def _verdict(self, request: Any, words: str) -> str:
        if int(self.results.get(keys.consumed_offset("gpu")) or 0) > 1000:
            log.error("consumed offset beyond the counter: %s", words)
            return "wrong"
        verdict = "refused"
        for name in self.results.scan_iter("rewardq:*", 1000):
            kind = self.results.type(name)
            value = self.results.get(name) if kind == b"string" else b""
            is_counter = name.startswith((b"rewardq:sent:", b"rewardq:taken:", b"rewardq:store"))
            if not is_counter and not name.startswith(b"rewardq:ledger") and self.results.ttl(name) < 0:
                log.error("no TTL: %r", name)
                return "wrong"
            if name.startswith((b"rewardq:outcome:", b"rewardq:note:")):
                if len(value or b"") > MOST_BYTES:
                    log.error("%d bytes in %r", len(value or b""), name)
                    return "wrong"
                if not self._is_right(request, value or b""):
                    log.error("a wrong reward in %r: %r", name, (value or b"")[:80])
                    return "wrong"
                verdict = "scored" if (value or b"").startswith(b"R;") else verdict
                self.results.delete(name)
        return verdict

    def _is_right(self, request: Any, value: bytes) -> bool:
        """Whether a reward is that of the image, where the request still asks for it; what is no reward is right."""
        if not value.startswith(b"R;"):
            return True
        reward = msgpack.unpackb(value.partition(b";")[2]).get("reward")
        if reward is None:
            return True
        if not math.isfinite(reward):
            return False
        try:
            (sample,) = request["samples"]
            is_plain = sample["media"] == {"image": self.ref} and request["reward"]["model"] == "jpeg_compressibility"
        except (TypeError, KeyError, ValueError):
            return True
        return not is_plain or math.isclose(reward, self._jpeg_reward(), rel_tol=1e-6)

    def _jpeg_reward(self) -> float:
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "JPEG", quality=95)
        return -len(file.getvalue()) / 1000


def _options(model: str) -> dict[str, Any]:
    if model == "vllm_evaluate":
        return {"api_base_url": "http://judge.invalid:8000/v1", "vlm_model": "m", "max_retries": 0}
    if model == "RemotePointwiseRewardModel":
        return {"server_url": "http://judge.invalid:8000", "retry_attempts": 1}
    return {}


def _packed(request: Any, rng: random.Random) -> bytes:
    """The bytes of a request; now and then damaged."""
    try:
        packed = bytearray(msgpack.packb(request, strict_types=False))
    except OverflowError:  # an integer that the format does not have cannot be sent either
        return rng.randbytes(40)
    if rng.random() < 0.15 and packed:
        for _ in range(rng.choice((1, 3))):
            packed[rng.randrange(len(packed))] = rng.randrange(256)
        if rng.random() < 0.3:
            del packed[rng.randrange(len(packed)) :]
    return bytes(packed)


def _unpacked(packed: bytes) -> Any:
    """What a request says after its bytes were damaged; None if nothing can be read."""
    try:
        return msgpack.unpackb(packed)
    except (ValueError, msgpack.UnpackException):
        return None


@contextmanager
def _bench() -> Iterator[_Bench]:
    here = {"REWARDQ_JUDGE_HOSTS": "nobody.invalid", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, here):
        server = RedisServer(Path(folder))
        try:
            bench = _Bench(server.url)
            try:
                yield bench
            finally:
                bench.close()
        finally:
            server.stop()
