"""What a process waits for servers with."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from workers.network.once import Once
from workers.network.servers import Server, choose_server


def test_of_what_a_process_has_one_threads_that_come_together_make_one():
    made = []

    @Once
    def one() -> object:
        time.sleep(0.05)
        made.append(object())
        return made[-1]

    together = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: together.wait() >= 0 and one(), range(8)))
    assert set(found) == set(made)
    assert len(made) == 1
    assert one.take() is made[0]
    assert one.take() is None
    assert one() is made[1]


def test_what_could_not_be_made_is_tried_again():
    tries = []

    @Once
    def one() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("not yet")
        return 7

    with pytest.raises(OSError, match="not yet"):
        one()
    assert one() == 7


def test_of_well_servers_the_least_busy_is_asked_and_else_the_one_whose_cool_down_ends_first():
    first, second, third = (Server(f"http://{n}") for n in "abc")
    with first.asked():
        assert choose_server([first, second]) is second
    second.failed()
    assert choose_server([first, second]) is first
    first.failed()
    assert choose_server([first, second, third]) is third
    assert choose_server([first, second]) is second
    first.answered()
    assert choose_server([first, second]) is first
