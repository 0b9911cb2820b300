"""Several servers for one judge: the least busy is asked, one that fails cools down and is tried again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.clock import Clock
from tests.judges.scripted import fails, says_yes
from workers import Unscored
from workers.network import servers as network


def reason(output) -> Unscored:
    (found,) = output.rewards
    assert isinstance(found, Unscored), found
    return found


def ask(judge, picture, **kwargs):
    return judge(["a cat"], image=[picture(**kwargs)])


def test_the_least_busy_server_is_asked(judge_server, make_judge, picture):
    go = threading.Event()

    def hold_back(_):
        assert go.wait(20)
        return says_yes(0.75)

    def answer_at_once(question):
        if question.number == 35:
            go.set()
        return says_yes(0.75)

    slow, fast = judge_server(hold_back), judge_server(answer_at_once)
    judge = make_judge("vllm_evaluate", slow, fast)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: ask(judge, picture, number=i).rewards[0], range(40))) == [0.75] * 40
    assert len(fast.questions) > 3 * len(slow.questions) > 0


def test_a_server_that_fails_cools_down_and_is_tried_again_with_a_real_request(
    judge_server, make_judge, picture, monkeypatch
):
    monkeypatch.setattr(network, "time", clock := Clock())
    sick = judge_server(lambda _: fails(500, "out of memory"))
    well = judge_server()
    judge = make_judge("vllm_evaluate", sick, well)
    assert [ask(judge, picture, number=i).rewards[0] for i in range(10)] == [0.75] * 10
    assert len(sick.questions) == 1
    sick.script = lambda _: says_yes(0.25)
    clock.now += network.FIRST_COOL_DOWN_S
    found = [ask(judge, picture, number=i).rewards[0] for i in range(6)]
    assert pytest.approx(0.25) in found
    assert len(sick.questions) > 2


def test_a_server_that_fails_again_cools_down_for_longer(judge_server, make_judge, picture, monkeypatch):
    monkeypatch.setattr(network, "time", clock := Clock())
    sick, well = judge_server(lambda _: fails(500, "out of memory")), judge_server()
    judge = make_judge("vllm_evaluate", sick, well)
    for num_cool_downs, tries in ((0.0, 1), (1.2, 2), (1.2, 2), (1.2, 3)):
        clock.now += num_cool_downs * network.FIRST_COOL_DOWN_S
        assert [ask(judge, picture, number=i).rewards[0] for i in range(4)] == [0.75] * 4
        assert len(sick.questions) == tries


def test_a_busy_server_is_followed_by_the_next_one(judge_server, make_judge, picture):
    full = judge_server(lambda _: fails(429, "full", retry_after="30"))  # later than `timeout_s`
    judge = make_judge("vllm_evaluate", full, judge_server())
    assert ask(judge, picture).rewards == [pytest.approx(0.75)]


def test_when_all_servers_fail_the_last_one_gets_the_retries(judge_server, make_judge, picture):
    servers = [judge_server(lambda _: fails(500, "broken")) for _ in range(2)]
    found = reason(ask(make_judge("vllm_evaluate", *servers, max_retries=2), picture))
    assert found.message == "the judge answered 500 after 3 requests: broken"
    assert sorted(len(s.questions) for s in servers) == [1, 2]


def test_a_wrong_request_is_not_asked_elsewhere(judge_server, make_judge, picture):
    servers = [judge_server(lambda _: fails(400, "no such field")) for _ in range(2)]
    assert "no such field" in reason(ask(make_judge("vllm_evaluate", *servers), picture)).message
    assert sum(len(s.questions) for s in servers) == 1
