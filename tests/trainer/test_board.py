from __future__ import annotations

import pickle
import sys
import threading
import time

import pytest

from tasks.messages import Outcome
from tasks.rewards import RewardConfig
from trainer_client.board import Board, Chunk, Entry, Slot
from trainer_client.groups import Member
from trainer_client.ticket import Ticket

ALONE, RANK = RewardConfig.from_dict(
    {"rewards": [{"reward_model": f"jpeg_compressibility{suffix}"} for suffix in ("", "_Rank")]}
).rewards


@pytest.fixture
def hasty():
    """Threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


class Life:
    """A thread that gives one slot after another its entries, sends them, seals its group, and answers all."""

    def __init__(self) -> None:
        self._board = Board("client")
        self._is_over = threading.Event()
        self.slot = self._new_slot()[0]
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Life:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _new_slot(self) -> tuple[Slot, Entry]:
        slot = Slot("train", 0, 0, "g", None, {}, (ALONE, RANK), time.monotonic())
        entry = Entry("alone", ALONE, slots=[slot])
        slot.entries = {ALONE.name: entry}
        return slot, entry

    def _run(self) -> None:
        while not self._is_over.is_set():
            self.slot, entry = self._new_slot()
            self._board.adopt([self.slot], [Chunk("request", "label", ALONE, 1, [entry], 0.0, 0.0, 0.0)])
            group = Entry("group", RANK, places={(0, 0): 0})
            member = Member(self.slot, "key", None, Entry("", ALONE))
            self._board.join_group(group, RANK.name, {(0, 0): member})
            self._board.answer({entry: Outcome(reward=1.0), group: Outcome(members=(Outcome(reward=0.0),))})


def test_a_ticket_is_pickled_whatever_other_threads_do_to_its_samples(hasty):
    until = time.monotonic() + 2
    with Life() as life:
        while time.monotonic() < until:
            ticket = Ticket("run", "launch", "train", 0, 0, 0, 1, (), (life.slot,))
            (record,) = pickle.loads(pickle.dumps(ticket)).slots
            assert record.addresses is None or record.addresses[RANK.name][2] == 0
