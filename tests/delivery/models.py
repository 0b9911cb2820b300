"""Reward models that do harm; a worker imports them as `tests.delivery.models.<class>`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.reward_models import number_in
from workers import GroupwiseRewardModel, PointwiseRewardModel, RewardModelOutput

HARM = {
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "MemoryError": MemoryError,
    "CancelledError": asyncio.CancelledError,
    "GeneratorExit": GeneratorExit,
}


class Logged(PointwiseRewardModel):
    """The number in the image, after `options["seconds"]` of sleep. What it begins with is in `options["calls"]`.

    A number in `options["on"]` does harm (the first `options["times"]` times, where given), and so does a call with
    more than `options["most"]` of them: `options["how"]` is `kill` (as the kernel does for want of memory), `hang`,
    `hold_gil` (a C call of `options["hold_s"]` that keeps the interpreter's lock), `lose_device` (a stand-in for CUDA
    after a kernel's assert), or the name of an exception.
    """

    required_fields = ("image",)

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        return RewardModelOutput(score(image, self.config.extra_kwargs))


class LoggedAtOnce(Logged):
    """`Logged`, by several threads at once."""

    required_fields = ("image",)
    thread_safe = True


class LoggedGroup(GroupwiseRewardModel):
    """`Logged`, a whole group at once."""

    required_fields = ("image",)

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        return RewardModelOutput(score(image, self.config.extra_kwargs))


class NeverAdmits(Logged):
    """Raises where a worker does not call a model but asks whether it may: out of the task, for no sample."""

    required_fields = ("image",)

    def admit(self) -> None:
        raise LookupError("no scale at hand")


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


def score(images: Sequence[Any], options: Mapping[str, Any]) -> list[float]:
    """What `Logged` says of these images, if it comes to that."""
    numbers = [number_in(one) for one in images]
    begin(options["calls"], numbers)
    is_harmless = "times" in options and num_begun(options["calls"], numbers[0]) > options["times"]
    time.sleep(options.get("seconds", 0.0))
    is_chosen = set(numbers) & set(options.get("on", ())) or len(numbers) > options.get("most", len(numbers))
    if is_chosen and not is_harmless:
        do_harm(options["how"], options.get("hold_s", 0.0))
    return [float(n) for n in numbers]


def begin(path: str, numbers: Sequence[int]) -> None:
    """Note in one write that these samples are begun, by whom and when."""
    lines = "".join(f"{n} {os.getpid()} {time.time():.3f}\n" for n in numbers)
    with open(path, "ab", buffering=0) as file:
        file.write(lines.encode())


def num_begun(path: str, number: int) -> int:
    """How often a sample was begun."""
    return [line.split()[0] for line in Path(path).read_text().splitlines()].count(str(number))


def do_harm(how: str, hold_s: float) -> None:
    """Does not return in the usual way."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "hang":
        threading.Event().wait()
    elif how == "hold_gil":
        ctypes.PyDLL(None).usleep(int(hold_s * 1e6))
    elif how == "lose_device":
        lose_device()
    else:
        raise HARM[how]("out of a model")


def lose_device() -> None:
    """From now on this process finds a GPU, of which each call raises, as CUDA's do once a kernel failed."""
    import torch

    def fail(_device: Any = None) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = torch.cuda.empty_cache = fail  # type: ignore[assignment]
    fail()
