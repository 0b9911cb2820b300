from __future__ import annotations

import random

import pytest
import redis

from workers.scoring.retry import LONGEST_PAUSE_S, Clock, retry


class VirtualClock(Clock):
    """Sleeps without waiting."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, num_failures: int, error: Exception) -> None:
        self.left, self.error, self.calls = num_failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("refused"),
        redis.TimeoutError("slow"),
        redis.BusyLoadingError("loading"),
        redis.OutOfMemoryError("full"),
        ConnectionResetError("reset"),
        TimeoutError("slow"),
    ],
)
def test_a_server_that_is_away_for_a_while_is_asked_again(error, clock):
    call = Flaky(3, error)
    assert retry(call, 10, clock, random.Random()) == "answer"
    assert call.calls == 4


@pytest.mark.parametrize("error", [redis.ResponseError("WRONGTYPE"), ValueError("ours"), redis.DataError("ours")])
def test_an_error_that_asking_again_does_not_mend_is_raised_at_once(error, clock):
    call = Flaky(3, error)
    with pytest.raises(type(error)):
        retry(call, 10, clock, random.Random())
    assert call.calls == 1


def test_the_last_error_is_raised_at_the_deadline(clock):
    call = Flaky(10**6, redis.ConnectionError("refused"))
    with pytest.raises(redis.ConnectionError, match="refused"):
        retry(call, 120, clock, random.Random(0))
    assert 1000 + 120 - LONGEST_PAUSE_S <= clock.now_s <= 1000 + 120
    assert call.calls == len(clock.pauses) + 1


def test_pauses_grow_and_differ_between_processes(clock):
    call = Flaky(8, redis.ConnectionError("refused"))
    retry(call, 120, clock, random.Random(0))
    assert clock.pauses[0] <= 0.05
    assert 1.0 <= clock.pauses[-1] <= LONGEST_PAUSE_S
    another = VirtualClock()
    retry(Flaky(8, redis.ConnectionError("refused")), 120, another, random.Random(1))
    assert another.pauses != clock.pauses
