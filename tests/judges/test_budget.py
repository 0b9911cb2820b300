"""The fleet's budget: permits in Redis, alone and with three workers of which one is killed."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import ResponseError

from tasks import keys
from tasks.errors import BusyError
from tasks.servers.connections import connect
from tests.judges.scripted import MODEL, says, says_yes
from tests.servers import wait_until
from trainer_client import RewardClient, Sample
from workers.judges import budget as budgets
from workers.judges import chat
from workers.judges.budget import FleetBudget

URL = "http://judge:8000/v1"
TTL_S = 1.0


@pytest.fixture
def redis(settings):
    with connect(settings.results) as client:
        yield client


@pytest.fixture
def new_budget(redis):
    """Makes the budget of one more process."""
    made = []

    def make():
        made.append(FleetBudget(redis, TTL_S))
        return made[-1]

    yield make
    for budget in made:
        budget.close()


@pytest.fixture
def budget(new_budget):
    return new_budget()


def test_no_more_permits_than_the_budget(budget):
    permits = [budget.acquire(URL, 3) for _ in range(5)]
    assert [permit is not None for permit in permits] == [True, True, True, False, False]
    assert not budget.has_room(URL, 3)
    assert budget.acquire("http://other/v1", 3)
    budget.release(permits[0])
    assert budget.has_room(URL, 3)
    assert budget.acquire(URL, 3)


def test_many_threads_and_processes_never_take_more(new_budget):
    several = [new_budget() for _ in range(3)]
    with ThreadPoolExecutor(24) as pool:
        permits = list(pool.map(lambda i: several[i % 3].acquire(URL, 10), range(200)))
    assert sum(permit is not None for permit in permits) == 10


def test_a_permit_lives_as_long_as_its_process_holds_it(redis, budget):
    permit = budget.acquire(URL, 1)
    ends_ms = redis.zscore(keys.judge_permits(URL), permit)
    for num_lives in (1, 2):
        later_ms = ends_ms + num_lives * 1000 * TTL_S
        wait_until(lambda later_ms=later_ms: (redis.zscore(keys.judge_permits(URL), permit) or 0) > later_ms)
        assert budget.acquire(URL, 1) is None


def test_permits_are_renewed_again_after_any_error(budget, redis):
    """A server whose rights were changed for a moment, for example."""
    renew, refused = budget._renew, threading.Event()

    def refuse_once(**how):
        if not refused.is_set():
            refused.set()
            raise ResponseError("NOPERM this user has no permissions to run the 'evalsha' command")
        return renew(**how)

    budget._renew = refuse_once
    assert budget.acquire(URL, 1)
    assert refused.wait(TTL_S)
    time.sleep(2 * TTL_S)
    assert redis.zcard(keys.judge_permits(URL)) == 1


def test_a_permit_whose_process_is_gone_runs_out(new_budget, budget):
    gone = new_budget()
    assert gone.acquire(URL, 1)
    gone.close()
    assert budget.acquire(URL, 1) is None
    wait_until(lambda: budget.acquire(URL, 1))


def test_a_released_permit_is_not_brought_back_by_its_renewal(redis, budget):
    permit = budget.acquire(URL, 1)
    budget.close()  # its own renewals, so that they do not come between
    budget._renew(keys=[keys.judge_permits(URL)], args=[1000, permit])
    budget.release(permit)
    budget._drop_released(URL, [permit])
    assert redis.zcard(keys.judge_permits(URL)) == 0


def test_permits_leave_nothing_behind(redis, budget):
    budget.release(budget.acquire(URL, 1))
    assert budget.acquire(URL, 1)
    assert 0 < redis.pttl(keys.judge_permits(URL)) <= 1000 * TTL_S


def test_a_judge_without_a_permit_is_busy_and_asks_nothing(judge_server, make_judge, picture, budget, monkeypatch):
    monkeypatch.setattr(chat, "fleet_budget", lambda: budget)
    server = judge_server()
    judge = make_judge("vllm_evaluate", server, fleet_max_concurrent=1)
    permit = budget.acquire(server.url, 1)
    with pytest.raises(BusyError, match="fleet_max_concurrent"):
        judge.admit()
    (found,) = judge(["x"], image=[picture()]).rewards
    assert isinstance(found, BusyError)
    assert not server.questions
    budget.release(permit)
    judge.admit()
    assert judge(["x", "y"], image=[picture(), picture()]).rewards == [0.75] * 2
    wait_until(lambda: budget.has_room(server.url, 1))


def test_a_question_that_is_given_up_gives_its_permit_back(judge_server, make_judge, picture, budget, monkeypatch):
    monkeypatch.setattr(chat, "fleet_budget", lambda: budget)
    server = judge_server(lambda _: says_yes(0.5, delay_s=30))
    judge = make_judge("vllm_evaluate", server, fleet_max_concurrent=1, timeout_s=0.5)
    assert judge(["x"], image=[picture()]).rewards[0].kind == "timeout"
    wait_until(lambda: budget.has_room(server.url, 1))


def test_the_next_question_finds_the_permit_of_the_one_before_however_long_its_release_takes(
    judge_server, make_judge, picture, budget, monkeypatch
):
    release = budget.release

    def release_late(permit):
        time.sleep(0.2)
        release(permit)

    monkeypatch.setattr(budget, "release", release_late)
    monkeypatch.setattr(chat, "fleet_budget", lambda: budget)
    judge = make_judge("vllm_evaluate", judge_server(), fleet_max_concurrent=1)
    assert judge(["x", "y"], image=[picture(), picture()]).rewards == [0.75] * 2


def test_another_server_is_asked_if_one_is_full(judge_server, make_judge, picture, budget, monkeypatch):
    monkeypatch.setattr(chat, "fleet_budget", lambda: budget)
    full, free = judge_server(), judge_server()
    judge = make_judge("vllm_evaluate", full, free, fleet_max_concurrent=1)
    budget.acquire(full.url, 1)
    assert judge(["x"] * 3, image=[picture(i) for i in range(3)]).rewards == [0.75] * 3
    assert (len(full.questions), len(free.questions)) == (0, 3)


def test_without_a_budget_redis_is_not_asked(judge_server, make_judge, picture, monkeypatch):
    monkeypatch.setattr(chat, "fleet_budget", None)
    judge = make_judge("vllm_evaluate", judge_server())
    judge.admit()
    assert judge(["x"], image=[picture()]).rewards == [0.75]
    assert budgets.fleet_budget.take() is None


BUDGET = 6
NUM_SAMPLES = 120


def test_three_workers_one_of_them_killed_never_pass_the_budget(settings, workers, judge_server, picture):
    # What a killed worker had in flight goes on at this server for 0.4 s; its permits live for 2 s.
    server = judge_server(lambda _: says_yes(0.75, delay_s=0.4))
    fleet = workers("vlm", "vlm", "vlm", concurrency=8)
    reward = {
        "reward_model": "vllm_evaluate",
        "api_base_url": server.url,
        "vlm_model": MODEL,
        "fleet_max_concurrent": BUDGET,
    }
    with RewardClient.from_dict({"rewards": reward}, run="budget", settings=settings) as client:
        client.submit([Sample(prompt=f"p{i}", image=picture(i)) for i in range(NUM_SAMPLES)])
        wait_until(lambda: len(server.questions) > 20, 30.0)
        fleet[0].kill()
        batch = client.collect(120, progress=False)
    assert batch.rewards["vllm_evaluate"].tolist() == [0.75] * NUM_SAMPLES
    assert batch.failures == ()
    assert BUDGET - 1 <= server.most_in_flight <= BUDGET
    twice = len(server.questions) - len({q.text for q in server.questions})
    assert twice <= BUDGET, "only what the killed worker had in hand is asked again"


def test_a_busy_judge_keeps_nobody_else_waiting(settings, workers, judge_server, picture):
    go = threading.Event()

    def hold_back(_):
        assert go.wait(60)
        return says_yes(0.25)

    slow, quick = judge_server(hold_back), judge_server()
    workers("vlm", concurrency=4)
    number = itertools.count()
    base = {"reward_model": "vllm_evaluate", "vlm_model": MODEL}
    rewards = [
        {**base, "name": "slow", "api_base_url": slow.url, "fleet_max_concurrent": 1},
        {**base, "name": "quick", "api_base_url": quick.url},
    ]
    with RewardClient.from_dict({"rewards": rewards}, run="busy", settings=settings) as client:
        client.submit([Sample(prompt=f"p{next(number)}", image=picture(i)) for i in range(8)])
        wait_until(lambda: len(quick.questions) == 8, 60)
        assert len(slow.questions) <= 1
        go.set()
        batch = client.collect(60, progress=False)
    assert batch.rewards["slow"].tolist() == [0.25] * 8
    assert slow.most_in_flight == 1


def test_comparisons_of_groups_keep_within_the_budget(settings, workers, judge_server, picture):
    server = judge_server(lambda _: says("Verdict: tie", delay_s=0.1))
    workers("vlm")
    reward = {
        "reward_model": "pairwise_judge",
        "api_base_url": server.url,
        "vlm_model": MODEL,
        "fleet_max_concurrent": 2,
        "opponents": 2,
    }
    with RewardClient.from_dict({"rewards": reward}, run="pairs", settings=settings) as client:
        for group in range(3):
            images = [picture(10 * group + i) for i in range(6)]
            client.submit([Sample(prompt=f"p{group}", image=i, group=group) for i in images], group_size=6)
        batch = client.collect(60, progress=False)
    assert batch.rewards["pairwise_judge"].tolist() == [0.5] * 18
    assert server.most_in_flight == 2
    assert len(server.questions) < 1.2 * 3 * 6 * 2
