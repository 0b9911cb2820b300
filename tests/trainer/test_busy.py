from __future__ import annotations

import time

import pytest

from tasks.rewards import RewardConfig
from trainer_client import busy
from trainer_client.board import Chunk, Entry
from trainer_client.busy import BusyChunks

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
def waiting(sent, monkeypatch) -> BusyChunks:
    monkeypatch.setattr(busy, "TRICKLE_EVERY_S", 0.1)
    return BusyChunks(lambda chunk: sent.append(chunk.request))


def test_one_goes_for_each_answer_of_its_reward_first_come_first_sent(waiting, sent):
    some = chunks_of("a", 5)
    for chunk in some:
        waiting.add(chunk)
    waiting.send_some(LOOK_AFTER_S)
    assert sent == []
    waiting.count_answers(chunks_of("b", 1)[0].entries)
    waiting.count_answers(entry for chunk in chunks_of("a", 2) for entry in chunk.entries)
    waiting.send_some(LOOK_AFTER_S)
    assert sent == ["a0", "a1"]
    waiting.send_some(LOOK_AFTER_S)
    assert sent == ["a0", "a1"]


def test_a_few_go_without_an_answer_since_others_free_places_too(waiting, sent):
    for chunk in chunks_of("a", 5):
        waiting.add(chunk)
    for num_sent in (2, 4, 5):
        time.sleep(0.11)
        waiting.send_some(LOOK_AFTER_S)
        assert len(sent) == num_sent


def test_what_waits_is_not_looked_after_until_it_is_sent(waiting):
    (chunk,) = chunks_of("a", 1)
    waiting.add(chunk)
    assert chunk.look_at == float("inf")
    time.sleep(0.11)
    waiting.send_some(LOOK_AFTER_S)
    assert 0 < chunk.look_at - time.monotonic() <= LOOK_AFTER_S


def test_one_that_is_answered_meanwhile_or_noted_twice_is_not_sent_twice(waiting, sent):
    first, second = chunks_of("a", 2)
    for chunk in (first, first, second, first):
        waiting.add(chunk)
    second.entries = []
    time.sleep(0.11)
    waiting.send_some(LOOK_AFTER_S)
    time.sleep(0.11)
    waiting.send_some(LOOK_AFTER_S)
    assert sent == ["a0"]
