from __future__ import annotations

import time

import pytest
import redis

from tasks.rewards import RewardConfig
from trainer_client import busy
from trainer_client.board import Chunk, Entry
from trainer_client.busy import BusyMessages

LOOK_AFTER_S = 2.0


def chunks_of(reward: str, num_chunks: int) -> list[Chunk]:
    block = {"reward_model": "vllm_evaluate", "name": reward, "vlm_model": reward}
    (spec,) = RewardConfig.from_dict({"rewards": block}).rewards
    return [
        Chunk(f"{reward}{i}", "", spec, i, [Entry(f"{reward}{i}", spec)], sent_at=0, look_at=0, pause_s=1)
        for i in range(num_chunks)
    ]


@pytest.fixture
def sent() -> list[str]:
    return []


@pytest.fixture
def waiting(sent, monkeypatch) -> BusyMessages:
    monkeypatch.setattr(busy, "EVERY_S", 0.1)
    return BusyMessages(lambda chunk, request: sent.append(request))


def test_one_goes_for_each_answer_of_its_reward_first_come_first_sent(waiting, sent, monkeypatch):
    monkeypatch.setattr(busy, "EVERY_S", 60.0)  # none without an answer, however slow this machine is
    some = chunks_of("a", 5)
    for chunk in some:
        waiting.add(chunk, chunk.request)
    waiting.send_some(LOOK_AFTER_S)
    assert sent == []
    waiting.count_answers(chunks_of("b", 1)[0].entries)
    waiting.count_answers(entry for chunk in chunks_of("a", 2) for entry in chunk.entries)
    waiting.send_some(LOOK_AFTER_S)
    assert sent == ["a0", "a1"]
    waiting.send_some(LOOK_AFTER_S)
    assert sent == ["a0", "a1"]


def test_more_go_while_none_comes_back_and_fewer_when_one_does(waiting, sent):
    some = chunks_of("a", 40)
    for chunk in some:
        waiting.add(chunk, chunk.request)
    for num_sent in (2, 6, 14):
        time.sleep(0.11)
        waiting.send_some(LOOK_AFTER_S)
        assert len(sent) == num_sent
    waiting.add(some[0], some[0].request)
    for num_sent in (18, 26):
        time.sleep(0.11)
        waiting.send_some(LOOK_AFTER_S)
        assert len(sent) == num_sent
    assert sent[:26] == [c.request for c in some[:26]]


def test_the_parts_of_a_group_go_one_by_one_and_the_group_is_looked_after_when_all_are_sent(waiting, sent):
    (chunk,) = chunks_of("a", 1)
    chunk.more_requests = ("part 0", "part 1", "part 2")
    for request in chunk.more_requests:
        waiting.add(chunk, request)
    time.sleep(0.11)
    waiting.send_some(LOOK_AFTER_S)
    assert (sent, chunk.look_at) == (["part 0", "part 1"], float("inf"))
    time.sleep(0.11)
    waiting.send_some(LOOK_AFTER_S)
    assert sent == ["part 0", "part 1", "part 2"]
    assert chunk.look_at <= time.monotonic() + LOOK_AFTER_S
    assert chunk.is_missed, "the parts' answers are not awaited one by one"


def test_a_message_that_could_not_be_sent_waits_on(sent, monkeypatch):
    monkeypatch.setattr(busy, "EVERY_S", 0.1)
    is_away = True

    def send(chunk, request):
        if is_away:
            raise redis.ConnectionError
        sent.append(request)

    waiting = BusyMessages(send)
    some = chunks_of("a", 2)
    for chunk in some:
        waiting.add(chunk, chunk.request)
    for _ in range(2):
        time.sleep(0.11)
        with pytest.raises(redis.ConnectionError):
            waiting.send_some(LOOK_AFTER_S)
    is_away = False
    time.sleep(0.11)
    waiting.send_some(LOOK_AFTER_S)
    assert sent == ["a0", "a1"]
    assert all(chunk.look_at < float("inf") for chunk in some)


def test_what_waits_is_not_looked_after_until_it_is_sent(waiting):
    (chunk,) = chunks_of("a", 1)
    waiting.add(chunk, chunk.request)
    assert chunk.look_at == float("inf")
    time.sleep(0.11)
    waiting.send_some(LOOK_AFTER_S)
    assert 0 < chunk.look_at - time.monotonic() <= LOOK_AFTER_S


def test_one_that_is_answered_meanwhile_or_noted_twice_is_not_sent_twice(waiting, sent):
    first, second = chunks_of("a", 2)
    for chunk in (first, first, second, first):
        waiting.add(chunk, chunk.request)
    second.entries = []
    time.sleep(0.11)
    waiting.send_some(LOOK_AFTER_S)
    time.sleep(0.11)
    waiting.send_some(LOOK_AFTER_S)
    assert sent == ["a0"]


def test_a_chunk_that_was_sent_is_forgotten(waiting, sent):
    some = chunks_of("a", 50)
    for _ in range(3):
        for chunk in some:
            waiting.add(chunk, chunk.request)
        waiting.count_answers([chunk.entries[0] for chunk in some])
        waiting.send_some(LOOK_AFTER_S)
    assert len(sent) == 150
    (queue,) = waiting._queues.values()
    assert (len(queue.waiting), len(queue.num_of)) == (0, 0)
