"""Why something is late: reasons by source. What one owner sets no other withdraws."""

from __future__ import annotations

import errno
import itertools

import pytest
import redis

from tasks.messages import Outcome
from tests.trainer.engine.by_hand import JUDGE, POINT, SINGLE, EngineByHand, in_flight, rewards_of
from tests.trainer.engine.test_loop import FakeBackend, eventually, loop_of
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.room import MEASURE_S
from trainer_client.engine.why_late import Source, WhyLate

(JUDGE_OF_ONE,) = (JUDGE.model_copy(update={"batch_size": 1}),)
PAIRS = [pytest.param(a, b, id=f"{a.name}-{b.name}") for a, b in itertools.permutations(Source, 2)]


@pytest.fixture
def why_late():
    """No reasons yet."""
    return WhyLate()


# --- the reasons ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_reason_that_is_withdrawn_leaves_that_of_another_source(why_late, first, second):
    why_late.set(first, "first")
    why_late.set(second, "second")
    why_late.withdraw(first)
    assert why_late.words() == "second"


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_source_that_has_no_reason_takes_none_from_another(why_late, first, second):
    why_late.set(second, "second")
    why_late.put(first, None)
    why_late.withdraw(first, "something")
    assert why_late.words() == "second"


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_sources_are_both_told_in_their_order_whichever_came_first(why_late, first, second):
    why_late.set(first, first.value)
    why_late.set(second, second.value)
    assert why_late.words() == "; ".join(s.value for s in Source if s in (first, second))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_who_asks_for_one_source_is_not_told_of_another(why_late, first, second):
    why_late.set(first, "first")
    why_late.set(second, "second")
    assert why_late.words(second) == "second"


@pytest.mark.parametrize("source", Source)
def test_a_reason_about_one_thing_leaves_that_of_the_same_source_about_another(why_late, source):
    why_late.set(source, "of this", "this")
    why_late.set(source, "of that", "that")
    why_late.withdraw(source, "this")
    assert why_late.words() == "of that"


def test_without_a_reason_there_are_no_words(why_late):
    assert why_late.words() is None
    why_late.put(Source.QUEUE, "")
    assert why_late.words() is None


def test_new_words_replace_the_old_ones_of_the_same_reason(why_late):
    why_late.set(Source.QUEUE, "old")
    why_late.put(Source.QUEUE, "new")
    assert why_late.words() == "new"


def test_the_same_words_are_said_once(why_late):
    why_late.set(Source.SENDING, "Redis is away", "pool")
    why_late.set(Source.SENDING, "Redis is away", "publish")
    assert why_late.words() == "Redis is away"


# --- through the state ----------------------------------------------------------------------------


def words_of(engine, *sources):
    return engine.state.why_late.words(*sources)


def test_a_note_of_a_worker_survives_the_upload_of_another_sample():
    engine = EngineByHand(SINGLE)
    engine.note(in_flight(engine, 1), "wire", detail="speaks wire 3")
    in_flight(engine, 2)
    assert words_of(engine) == "worker worker on queue gpu: speaks wire 3"


@pytest.mark.parametrize("reason", ["wire", "store", "error", "stale"])
def test_a_note_goes_when_its_reward_is_answered(reason):
    engine = EngineByHand(SINGLE)
    slot = in_flight(engine)
    engine.note(slot, reason)
    assert words_of(engine, Source.NOTE)
    engine.answer(slot)
    assert words_of(engine) is None


def test_a_note_goes_with_the_first_answer_of_its_reward_for_a_worker_serves_it():
    engine = EngineByHand(SINGLE)
    noted, answered = in_flight(engine, 1), in_flight(engine, 2)
    engine.note(noted, "wire")
    engine.answer(answered)
    assert not noted.is_done
    assert words_of(engine) is None


def test_a_note_goes_when_nobody_waits_for_its_reward_any_more():
    engine = EngineByHand(SINGLE)
    slots = [in_flight(engine, number) for number in (1, 2)]
    engine.note(slots[0], "wire")
    engine.give_up(slots[0])
    assert words_of(engine), "the other sample may wait for the same worker"
    engine.give_up(slots[1])
    assert words_of(engine) is None


def test_an_answer_of_one_reward_leaves_the_note_of_another():
    (other,) = rewards_of({"reward_model": "jpeg_compressibility", "batch_size": 1})
    engine = EngineByHand((*SINGLE, other))
    slot = in_flight(engine)
    engine.note(slot, "wire", of=SINGLE[0])
    engine.answer(slot, of=other)
    assert words_of(engine, Source.NOTE)


def test_a_full_store_is_a_reason_while_something_waits_for_room_and_withdraws_only_its_own():
    engine = EngineByHand(SINGLE, max_store_bytes=15)
    engine.note(in_flight(engine, 1), "wire", detail="speaks wire 3")
    engine.store_bytes = 10
    engine.submit(2)
    engine.run()
    engine.wait(MEASURE_S)
    assert "REWARDQ_MAX_STORE_BYTES is 15" in words_of(engine, Source.STORE_FULL)
    assert "speaks wire 3" in words_of(engine, Source.NOTE)
    engine.store_bytes = 0
    engine.wait(MEASURE_S)
    assert words_of(engine) == "worker worker on queue gpu: speaks wire 3"


def test_a_store_that_was_not_measured_yet_is_no_reason():
    engine = EngineByHand(SINGLE)
    engine.submit(1)
    engine.run(but=[do.MeasureStore])
    assert words_of(engine) is None


def test_a_full_store_is_no_reason_any_more_when_what_waits_is_given_up():
    engine = EngineByHand(SINGLE, max_store_bytes=15)
    engine.store_bytes = 10
    slot = engine.submit(1)
    engine.run()
    assert words_of(engine, Source.STORE_FULL)
    engine.give_up(slot)
    assert words_of(engine) is None


def test_a_judges_budget_is_a_reason_until_nothing_waits_for_a_permit():
    engine = EngineByHand((JUDGE_OF_ONE,))
    slot = in_flight(engine)
    engine.note(slot, "busy", detail="all 4 permits are taken")
    assert words_of(engine) == "all 4 permits are taken"
    engine.wait(0.5)
    engine.wait(0.1)
    assert not engine.state.throttle
    assert words_of(engine) is None


@pytest.mark.parametrize("ends", ["answered", "given up", "restored"])
def test_a_budget_is_no_reason_any_more_when_the_last_that_waited_is(ends):
    engine = EngineByHand((JUDGE_OF_ONE,))
    slot = in_flight(engine)
    engine.note(slot, "busy")
    if ends == "answered":
        engine.answer(slot)
    elif ends == "given up":
        engine.give_up(slot)
    else:
        engine.note(slot, "gone")
    assert words_of(engine) is None


def test_the_budget_of_one_judge_leaves_that_of_another():
    (other,) = rewards_of(
        {
            "reward_model": "vllm_evaluate",
            "name": "other",
            "vlm_model": "other",
            "api_base_url": "http://judge/v1",
            "batch_size": 1,
        }
    )
    engine = EngineByHand((JUDGE_OF_ONE, other))
    slot = in_flight(engine)
    engine.note(slot, "busy", of=JUDGE_OF_ONE, detail="this judge")
    engine.note(slot, "busy", of=other, detail="that judge")
    engine.answer(slot, of=JUDGE_OF_ONE)
    assert words_of(engine) == "that judge"


SUCCESSES = {
    "a sample is stored and sent": lambda engine, _: in_flight(engine, 2),
    "an answer of another reward": lambda engine, slot: engine.answer(slot, of=JUDGE_OF_ONE),
    "a poll that finds nothing": lambda engine, _: engine.wait(1.0),
    "outcomes that nobody awaits": lambda engine, _: engine.put_outcome("elsewhere", Outcome(reward=1.0)),
    "a tick": lambda engine, _: engine.apply(ev.Tick()),
}


@pytest.mark.parametrize("source", Source)
@pytest.mark.parametrize("success", SUCCESSES)
def test_an_ordinary_success_withdraws_no_reason_of_another_owner(success, source):
    """The state sets `STORE_FULL` anew with each event: only that of another owner stays."""
    engine = EngineByHand((SINGLE[0], JUDGE_OF_ONE))
    slot = in_flight(engine)
    about = POINT.fingerprint if source in (Source.NOTE, Source.BUDGET) else "somebody else's"
    engine.state.why_late.set(source, "a reason", about)
    SUCCESSES[success](engine, slot)
    assert words_of(engine) == "a reason"


# --- through the loop -----------------------------------------------------------------------------

SOURCE_OF_LANE = {
    do.Lane.POOL: Source.SENDING,
    do.Lane.PUBLISH: Source.SENDING,
    do.Lane.POLL: Source.POLLING,
    do.Lane.UPKEEP: Source.POLLING,
}


@pytest.mark.parametrize("lane", do.Lane)
def test_a_server_that_is_away_is_a_reason_of_its_lane_until_the_call_is_made(lane):
    source, is_away = SOURCE_OF_LANE[lane], True

    def call():
        if is_away:
            raise redis.ConnectionError("no route to host")

    with loop_of(FakeBackend()) as loop:
        loop.do_once(lane, call)
        eventually(lambda: loop.state.why_late.words(source))
        others = [other for other in Source if other is not source]
        assert loop.state.why_late.words(*others) is None
        is_away = False
        eventually(lambda: loop.state.why_late.words() is None)


@pytest.mark.parametrize(("away", "answers"), list(itertools.permutations(do.Lane, 2)), ids=lambda lane: lane.name)
def test_a_lane_whose_server_answers_does_not_withdraw_the_reason_of_another(away, answers):
    def fail():
        raise redis.ConnectionError("no route to host")

    with loop_of(FakeBackend()) as loop:
        loop.do_once(away, fail)
        eventually(lambda: loop.state.why_late.words(SOURCE_OF_LANE[away]))
        num_calls = []
        loop.do_once(answers, lambda: num_calls.append(1))
        eventually(lambda: num_calls)
        assert loop.state.why_late.words(SOURCE_OF_LANE[away])


def test_a_disk_without_room_is_said_as_that():
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with loop_of(FakeBackend()) as loop:
        loop.do_once(do.Lane.POOL, fail)
        eventually(lambda: loop.state.why_late.words())
        assert "sending waits for room in the payload store" in loop.state.why_late.words()
