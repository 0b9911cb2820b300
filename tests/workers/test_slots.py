"""The judgement from looks at a worker's slots, and the pools that free a slot whatever is raised."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from celery.concurrency import solo, thread
from celery.worker import state

from workers.process.pool import SoloPool, ThreadsPool, guarded
from workers.process.slots import SlotJudgement, SlotState


def looks(*states):
    """What is judged after each of these looks, with two looks needed."""
    judgement = SlotJudgement()
    said = []
    for one in states:
        if one is None:
            judgement.forget()
        else:
            judgement.look(one)
        said.append(judgement.why_stuck(2))
    return said


IDLE = SlotState(2, reserved=frozenset(), running=frozenset(), num_taken=7, num_waiting=0)
LOST = dataclasses.replace(IDLE, reserved=frozenset({"a"}))
WAITING = dataclasses.replace(IDLE, num_waiting=3)
BUSY = dataclasses.replace(WAITING, reserved=frozenset({"a", "b"}), running=frozenset({"a", "b"}))
WORDS_OF_LOST = "1 of its 2 slots are held by tasks that no thread runs"
WORDS_OF_IDLE = "it takes no message, though 3 wait in its queues and 2 of its 2 slots are free"


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([IDLE] * 4, [""] * 4),
        ([BUSY] * 4, [""] * 4),
        ([LOST] * 4, ["", "", WORDS_OF_LOST, WORDS_OF_LOST]),
        ([LOST, LOST, LOST, IDLE], ["", "", WORDS_OF_LOST, ""]),
        ([LOST, LOST, None, LOST, LOST], [""] * 5),
        ([dataclasses.replace(LOST, reserved=frozenset({n})) for n in "abcd"], [""] * 4),
        ([dataclasses.replace(LOST, running=None)] * 4, [""] * 4),
        ([WAITING] * 4, ["", "", WORDS_OF_IDLE, WORDS_OF_IDLE]),
        ([dataclasses.replace(WAITING, num_taken=n) for n in range(4)], [""] * 4),
        ([WAITING, WAITING, BUSY, WAITING], [""] * 4),
        ([WAITING, WAITING, None, WAITING, WAITING], [""] * 5),
    ],
)
def test_a_worker_is_stuck_if_the_same_slots_stay_lost_or_nothing_is_taken_for_several_looks(states, said):
    assert looks(*states) == said


class FakeRequest:
    """As much of Celery's request as a pool sees."""

    id, name = "1", "task"

    def __init__(self, error=None):
        self.error, self.num_acknowledged, self.done = error, 0, threading.Event()

    def on_success(self, _result):
        if self.error is not None:
            raise self.error

    def acknowledge(self):
        self.num_acknowledged += 1
        self.done.set()


@pytest.mark.parametrize("pool", [ThreadsPool, SoloPool])
@pytest.mark.parametrize("where", ["accept", "target", "callback"])
@pytest.mark.parametrize("error", [ValueError("planted"), MemoryError("planted"), SystemExit(3)], ids=repr)
def test_a_slot_is_free_whatever_is_raised_around_a_tasks_body(pool, where, error):
    request = FakeRequest(error if where == "callback" else None)
    made = pool(limit=1)
    state.task_reserved(request)

    def accept(_pid, _time):
        if where == "accept":
            raise error

    def target():
        if where == "target":
            raise error

    try:
        made.apply_async(target, accept_callback=accept, callback=request.on_success)
    except SystemExit:
        assert pool is SoloPool, "only there it reaches the main thread, which it may end"
    assert request.done.wait(10)
    assert request not in state.reserved_requests
    assert request.num_acknowledged == 1
    assert made.running == set()


def test_our_pools_take_the_place_of_celerys_however_they_are_named():
    assert guarded("threads") is guarded(thread.TaskPool) is ThreadsPool
    assert guarded("solo") is guarded(solo.TaskPool) is SoloPool
