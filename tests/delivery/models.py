"""Reward models that do harm; a worker imports them as `tests.delivery.models.<class>`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

from tests.reward_models import number_in
from workers import PointwiseRewardModel, RewardModelOutput

HARM = {
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "MemoryError": MemoryError,
    "CancelledError": asyncio.CancelledError,
    "GeneratorExit": GeneratorExit,
}


class Logged(PointwiseRewardModel):
    """The number in the image, after `options["seconds"]` of sleep. What it begins with is in `options["calls"]`.

    A number in `options["on"]` does harm, and so does a call with more than `options["most"]` of them:
    `options["how"]` is `kill` (as the kernel does for want of memory), `hang`, `hold_gil` (a C call of
    `options["hold_s"]` that keeps the interpreter's lock), or the name of an exception.
    """

    required_fields = ("image",)

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        options = self.config.extra_kwargs
        numbers = [number_in(one) for one in image]
        begin(options["calls"], numbers)
        time.sleep(options.get("seconds", 0.0))
        if set(numbers) & set(options.get("on", ())) or len(numbers) > options.get("most", len(numbers)):
            do_harm(options["how"], options.get("hold_s", 0.0))
        return RewardModelOutput([float(n) for n in numbers])


class LoggedAtOnce(Logged):
    """`Logged`, by several threads at once."""

    required_fields = ("image",)
    thread_safe = True


class Asks(PointwiseRewardModel):
    """The number in the image, as the server at `options["url"]` says it back: a judge's way to a reward."""

    required_fields = ("image",)
    thread_safe = True

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        answers = []
        for one in image:
            with urllib.request.urlopen(f"{self.config.extra_kwargs['url']}/{number_in(one)}", timeout=120) as answer:
                answers.append(float(answer.read()))
        return RewardModelOutput(answers)


def begin(path: str, numbers: Sequence[int]) -> None:
    """Note in one write that these samples are begun, by whom and when."""
    lines = "".join(f"{n} {os.getpid()} {time.time():.3f}\n" for n in numbers)
    with open(path, "ab", buffering=0) as file:
        file.write(lines.encode())


def do_harm(how: str, hold_s: float) -> None:
    """Does not return in the usual way."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "hang":
        threading.Event().wait()
    elif how == "hold_gil":
        ctypes.PyDLL(None).usleep(int(hold_s * 1e6))
    else:
        raise HARM[how]("out of a model")
