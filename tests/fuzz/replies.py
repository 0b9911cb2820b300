"""Mutated answers of a judge, sent over HTTP by a server on loopback and read by the real judge code."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import math
import random
import time
import zlib
from collections.abc import Iterator
from typing import Any

import yaml
from PIL import Image

from tasks.catalog import CATALOG
from tasks.settings import load_settings
from tests.fuzz.counts import Counts, try_for
from tests.fuzz.requests import mutated
from tests.judges.scripted import MODEL, Answer, JudgeServer, says, says_yes
from tests.servers import ROOT
from workers import Accelerator, RewardArguments
from workers.judges import client
from workers.loading.building import reward_class
from workers.scoring.outputs import outcomes_of

log = logging.getLogger(__name__)

SLOW_S = 10.0
"""A sample whose judge has answered is decided long before."""

JUDGES = ("vllm_evaluate", "rational_rewards_t2i", "pairwise_judge")


def run(seconds: float, seed: int | None = None) -> Counts:
    """Let judges read mutated answers for so many seconds.

    Args:
        seconds: How long.
        seed: Of the mutations; another each time unless given. What fails is logged with its seed and number.

    Returns:
        How many answers were `tried`, how many of them were `refused` (the sample has a reason and no reward), how many
        gave a `wrong` reward (none in [0, 1], or another than the answer's where only what is around it was changed),
        and how many `ended` the question by an error that is no reason, or by taking too long.
    """
    with _bench() as bench:
        return try_for("replies", seconds, seed, bench.try_one)


# --- private -------------------------------------------------------------------------------------


class _Bench:
    """A judge server that answers what it is told, and the built-in judges that ask it."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.server = JudgeServer(lambda _question: self.answer)
        self.judges = {name: self._judge(name) for name in JUDGES}
        self.image = Image.new("RGB", (8, 8))
        self.texts = [one["reply"] for one in yaml.safe_load((ROOT / "tests/judges/replies.yaml").read_text())]

    def _judge(self, name: str) -> Any:
        entry = CATALOG[name]
        defaults = {option: found.default for option, found in entry.options.items()}
        options = {**defaults, "api_base_url": self.server.url, "vlm_model": MODEL, "max_retries": 0, "timeout": 5.0}
        config = RewardArguments(
            name=name,
            reward_model=name,
            timeout_s=8.0,
            image_format=entry.image_format,
            extra_kwargs=options,
        )
        return reward_class(name, load_settings())(config, Accelerator())

    def close(self) -> None:
        self.server.stop()
        loop = client.judge_loop.take()
        if loop is not None:
            loop.close()

    def try_one(self, rng: random.Random) -> str:
        """Ask about one sample, whose judge gives a mutated answer: refused, scored, wrong, ended."""
        name = rng.choice(JUDGES)
        expected = None
        plain = self._plain_answer(name, rng)
        if name == "vllm_evaluate" and rng.random() < 0.3:
            self.answer, expected = _changed_around(plain, rng), 0.75
        else:
            self.answer = _mutated_answer(plain, rng)
        began_s = time.monotonic()
        try:
            (outcome,) = outcomes_of(self._ask(name), 1)
        except BaseException:
            log.exception("ended")
            return "ended"
        if time.monotonic() - began_s > SLOW_S:
            return "ended"
        return _verdict(outcome, expected)

    def _ask(self, name: str) -> Any:
        judge = self.judges[name]
        if name != "pairwise_judge":
            return judge(["a cat"], image=[self.image])
        return judge(["a cat"], image=[[self.image, self.image]])  # both members of a pair

    def _plain_answer(self, name: str, rng: random.Random) -> Answer:
        if name == "vllm_evaluate":
            return says_yes(0.75)
        if name == "pairwise_judge":
            return says(
                rng.choice(("Verdict: first", "Verdict: second", "**Verdict:** tie", "Verdict: first or second"))
            )
        return says(rng.choice(self.texts))


def _verdict(outcome: Any, expected: float | None) -> str:
    if outcome.reward is None:
        return "refused"
    is_in_range = math.isfinite(outcome.reward) and 0.0 <= outcome.reward <= 1.0
    if not is_in_range or (expected is not None and not math.isclose(outcome.reward, expected, abs_tol=1e-9)):
        log.error("reward %r, expected %r", outcome.reward, expected)
        return "wrong"
    return "scored"


def _changed_around(answer: Answer, rng: random.Random) -> Answer:
    """The same answer with other things around its choice, which are none of ours."""
    body = json.loads(answer.body)
    for key in ("id", "created", "model", "object", "usage"):
        if rng.random() < 0.5:
            body[key] = rng.choice((None, 0, "", "x" * 1000, [], {"a": 1}))
    return Answer(body=json.dumps(body).encode())


def _mutated_answer(answer: Answer, rng: random.Random) -> Answer:
    """An answer with its JSON, its bytes, its text, its encoding or its status changed."""
    body: Any = json.loads(answer.body)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        body = mutated(body, rng)
    if rng.random() < 0.3:
        body = _with_odd_text(body, rng)
    data = bytearray(json.dumps(body, default=lambda one: one.decode("latin-1")).encode())
    how = rng.randrange(8)
    if how == 0:
        for _ in range(rng.choice((1, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == 1:
        del data[rng.randrange(len(data)) :]
    elif how == 2:
        data = bytearray(b"[" * rng.choice((10, 1000, 100_000)) + bytes(data))
    elif how == 3:
        data = bytearray(b'{"choices":[{"message":{"content":' + b"[" * 500 + b"]" * 500 + b"}}]}")
    return _sent(bytes(data), rng)


def _with_odd_text(body: Any, rng: random.Random) -> Any:
    """The same reply with a text that repeats itself, as broken models' do."""
    parts = (
        "*",
        "| ",
        "\n",
        "Verdict: first|",
        "## Score: 9",
        "<think>",
        "</think>",
        "[",
        "_",
        "aspect ",
        "\ud800",
        "é",
    )
    part = rng.choice(parts)
    text = rng.choice(("", "Verdict: first", "Yes", "# Detailed Judgement\n1. Text Faithfulness:\n## Score: 3 "))
    with contextlib.suppress(TypeError, KeyError, IndexError):
        body["choices"][0]["message"]["content"] = text + part * rng.choice((10, 1000, 50_000)) + text
    return body


def _sent(data: bytes, rng: random.Random) -> Answer:
    """An answer with these bytes; now and then compressed, of a wrong encoding, or of another status."""
    status = rng.choice((200, 200, 200, 200, 200, 201, 204, 301, 307, 400, 404, 429, 500, 503))
    headers: dict[str, str] = {}
    if status in (301, 307):
        headers["Location"] = rng.choice(("http://127.0.0.1:1/v1", "file:///etc/passwd", "//", ""))
    if status == 204:
        data = b""
    how = rng.randrange(12)
    if how == 0:
        return Answer(status, gzip.compress(data), {**headers, "Content-Encoding": "gzip"})
    if how == 1:
        return Answer(status, zlib.compress(data), {**headers, "Content-Encoding": "deflate"})
    if how == 2:
        return Answer(status, data, {**headers, "Content-Encoding": rng.choice(("gzip", "br", "gzip, gzip", "x"))})
    if how == 3:
        return Answer(status, data, headers, cut_after=rng.randrange(len(data) + 1))
    if how == 4:
        return Answer(status, data, {**headers, "Content-Type": rng.choice(("text/html; charset=x", "", "a\tb"))})
    return Answer(status, data, headers)


@contextlib.contextmanager
def _bench() -> Iterator[_Bench]:
    bench = _Bench()
    try:
        yield bench
    finally:
        bench.close()
