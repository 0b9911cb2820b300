"""What a sample raises while it is encoded, stored or packed is its own outcome, and no other sample's."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest
import redis
import torch
from PIL import Image

from tasks.errors import InvalidSampleError
from tasks.messages import Failure, GroupRequest, SampleRequest, ScoreRequest, unpack
from tasks.rewards import RewardConfig
from tasks.samples import Sample
from tests.trainer.engine.by_hand import BOTH, NOTHING_BESIDE, POINT, RANKED, EngineByHand, rewards_of
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine import requests
from trainer_client.engine.backend import Backend
from trainer_client.engine.encoding import SampleEncoder
from trainer_client.engine.model import Awaited, Delivery, GroupPlan
from trainer_client.engine.requests import RequestWriter, TaskNames, Times
from trainer_client.engine.states import SentBy, State
from trainer_client.steps.open_steps import OpenStep
from trainer_client.steps.submission import Submission

REFUSED = Failure(kind="failed", message="its media cannot be stored: MemoryError")


def refuse(engine: EngineByHand, content: int) -> None:
    """The payload of this content cannot be stored."""
    digest = f"digest{content}"
    store = next(a for a in engine.pending if isinstance(a, do.Store) and a.content.digest == digest)
    engine.pending.remove(store)
    engine.apply(ev.PayloadRefused(store.name, REFUSED))


# --- stored ----------------------------------------------------------------------------------------


def test_a_sample_whose_media_cannot_be_stored_fails_alone(engine):
    first, second = engine.submit(1), engine.submit(2)
    engine.run(but=[do.Store])
    refuse(engine, 1)
    assert first.outcome_for("PickScore").failure == REFUSED
    engine.collect(0)
    engine.run()
    assert engine.state_of(second) is State.IN_FLIGHT
    engine.answer(second)
    assert second.outcome_for("PickScore").reward == 0.5
    engine.stop_collecting()
    engine.give_up(first, second)
    engine.run()
    engine.assert_nothing_is_left()


def test_equal_samples_fail_together_and_an_equal_one_afterwards_is_tried_anew(single):
    first, twin = single.submit(1), single.submit(1)
    single.run(but=[do.Store])
    refuse(single, 1)
    assert first.is_done
    assert twin.is_done
    later = single.submit(1, step=1)
    single.run()
    assert single.state_of(later) is State.IN_FLIGHT


def test_a_sample_that_nobody_waits_for_any_more_may_be_refused_too(single):
    slot = single.submit(1)
    single.run(but=[do.Store])
    single.give_up(slot)
    refuse(single, 1)
    single.run()
    single.assert_nothing_is_left()


@pytest.mark.parametrize("rewards", [BOTH, (RANKED,)])
def test_a_group_is_ranked_without_the_member_whose_media_cannot_be_stored(rewards):
    engine = EngineByHand(rewards)
    slots = [engine.submit(n, "g", size=3) for n in (1, 2, 3)]
    engine.run(but=[do.Store])
    refuse(engine, 2)
    engine.run()
    group = engine.awaited(slots[0], RANKED).group
    assert [member.failure for member in group.members] == [None, REFUSED, None]
    assert group.members[1].media == {}
    if POINT in rewards:
        assert slots[1].outcome_for("PickScore").failure == REFUSED
        assert not slots[0].is_done_for("PickScore")


def put_with(error: BaseException) -> Any:
    class Store:
        def put(self, payloads, ttl_s):
            raise error

    made = object.__new__(Backend)
    made._store, made._payload_ttl_s = Store(), 1.0
    return made._put({"name": b"data"})


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), IsADirectoryError(errno.EISDIR, "Is a directory"), ValueError("odd entry")]
)
def test_what_is_no_servers_doing_is_told_to_the_sample_with_class_and_words(error):
    failure = put_with(error)
    assert failure.kind == "failed"
    assert f"its media cannot be stored: {type(error).__name__}: {error}" in failure.message


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("away"),
        redis.ResponseError("NOPERM"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        KeyboardInterrupt(),
        SystemExit(),
    ],
)
def test_what_a_server_raises_is_no_samples_doing(error):
    with pytest.raises(type(error)):
        put_with(error)


# --- packed ----------------------------------------------------------------------------------------

WRITER = RequestWriter("run", TaskNames("score", "group", "combine"))
TIMES = Times(0, 1)


@pytest.fixture
def _unpackable(monkeypatch):
    """Whatever has `bad` in its prompt cannot be packed."""
    pack = requests.pack

    def picky(message):
        if "bad" in str(message.model_dump()):
            raise RecursionError("too deep")
        return pack(message)

    monkeypatch.setattr(requests, "pack", picky)


def awaited(prompt: str) -> Awaited:
    return Awaited(f"address of {prompt[::-1]}", POINT, prompt=prompt, beside=NOTHING_BESIDE)


def delivery(*several: Awaited, parts: tuple[str, ...] = ()) -> Delivery:
    first = several[0]
    return Delivery("request", "label", first.spec, SentBy.US, list(several), 1.0, part_requests=parts)


@pytest.mark.usefixtures("_unpackable")
def test_of_a_request_of_several_the_sample_that_cannot_be_packed_is_left_out():
    good, bad, other = awaited("good"), awaited("bad"), awaited("other")
    composed = WRITER.compose(delivery(good, bad, other), TIMES)
    request = unpack(ScoreRequest, composed.requests["request"])
    assert [sample.prompt for sample in request.samples] == ["good", "other"]
    assert list(composed.refused) == [bad]
    assert "cannot be packed into a request: RecursionError: too deep" in composed.refused[bad].message


@pytest.mark.usefixtures("_unpackable")
def test_where_no_sample_can_be_packed_there_is_no_message():
    bad = awaited("bad")
    composed = WRITER.compose(delivery(bad), TIMES)
    assert (composed.message, composed.requests, list(composed.refused)) == (None, {}, [bad])


def group_of(*prompts: str) -> Awaited:
    members = tuple(SampleRequest(address=f"part {i}", prompt=p, media={}) for i, p in enumerate(prompts))
    plan = GroupPlan(members, {(0, i): i for i in range(len(members))})
    return Awaited("group's address", RANKED, group=plan)


@pytest.mark.usefixtures("_unpackable")
@pytest.mark.parametrize("parts", [(), ("request.0", "request.4")])
def test_a_group_goes_with_the_failure_of_the_member_that_cannot_be_packed(parts):
    group = group_of("good", "bad", "other", "more", "last")
    composed = WRITER.compose(delivery(group, parts=parts), TIMES)
    request = unpack(GroupRequest, composed.requests["request"])
    assert [member.failure is not None for member in request.members] == [False, True, False, False, False]
    assert request.members[1].address == "part 1"
    assert composed.refused == {}
    if parts:  # the four that are left fill one chunk
        assert [part.request for part in composed.message.header] == ["request.0"]
        assert set(composed.requests) == {"request", "request.0"}


def test_a_delivery_without_the_sample_that_could_not_be_packed_goes_on(engine):
    first, second = engine.submit(1), engine.submit(2)
    engine.run(but=[do.Publish])
    publish = engine.asked(do.Publish)[0]
    engine.pending.remove(publish)
    (sent,) = publish.deliveries
    engine.apply(ev.Published({sent: 1}, refused={engine.awaited(first): REFUSED}))
    assert first.outcome_for("PickScore").failure == REFUSED
    assert engine.state_of(second) is State.IN_FLIGHT


def test_publishing_goes_on_after_a_delivery_of_which_nothing_could_be_packed(single):
    first = single.submit(1)
    single.run(but=[do.Publish])
    publish = single.asked(do.Publish)[0]
    single.pending.remove(publish)
    (sent,) = publish.deliveries
    single.apply(ev.Published({sent: 0}, refused={single.awaited(first): REFUSED}))
    assert first.is_done
    second = single.submit(2)
    single.run()
    assert single.state_of(second) is State.IN_FLIGHT


# --- encoded ---------------------------------------------------------------------------------------

REWARDS = RewardConfig.from_dict({"rewards": [{"reward_model": "my_rewards.Mine"}]}).rewards


def encoded(sample: Sample, rewards=REWARDS, change=lambda: None):
    submission = Submission("train", rewards, [sample], None, 1, 0.0)
    submission.check(0, 0, 1, 10**6)
    (slot,) = submission.add_to(OpenStep(0)).slots
    change()
    return SampleEncoder("run", 0).encode(slot, slot.sample)


class Raising(torch.Tensor):
    error: BaseException = AttributeError("hostile detach")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == "detach":
            raise cls.error
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "error", [AttributeError("hostile"), MemoryError("none left"), ConnectionError("remote array"), OverflowError()]
)
def test_whatever_a_tensor_raises_is_its_samples_failure(monkeypatch, error):
    monkeypatch.setattr(Raising, "error", error)
    found = encoded(Sample(prompt="p", image=torch.full((3, 8, 8), 0.5).as_subclass(Raising)))
    assert found.problem.kind == "failed"
    assert f"sample 0 cannot be encoded: {type(error).__name__}" in found.problem.message
    assert set(found.identities) == {"my_rewards.Mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_an_interrupt_is_no_samples_failure(monkeypatch, error):
    monkeypatch.setattr(Raising, "error", error)
    with pytest.raises(type(error)):
        encoded(Sample(prompt="p", image=torch.full((3, 8, 8), 0.5).as_subclass(Raising)))


def test_an_error_of_any_length_and_no_unicode_is_told_in_short(monkeypatch):
    monkeypatch.setattr(Raising, "error", ValueError("\ud800" * 10**6))
    message = encoded(Sample(prompt="p", image=torch.full((3, 8, 8), 0.5).as_subclass(Raising))).problem.message
    assert len(message) < 1000
    message.encode()


def test_samples_that_fail_are_like_no_others():
    cut = Image.new("L", (4, 4))
    cut.info["transparency"] = b"\x80\xff"
    keys = {encoded(Sample(prompt="p", image=cut)).identities["my_rewards.Mine"].key for _ in range(2)}
    assert len(keys) == 1  # of one position
    good = encoded(Sample(prompt="p", image=Image.new("L", (4, 4))))
    assert good.identities["my_rewards.Mine"].key not in keys


def test_a_jpeg_that_cannot_be_made_fails_its_sample(monkeypatch):
    (jpeg,) = rewards_of({"reward_model": "jpeg_compressibility", "image_format": "jpeg"})
    with pytest.raises(InvalidSampleError, match="cannot be a JPEG"):
        encoded(Sample(prompt="p", image=np.zeros((4, 70_000, 3), np.uint8)), (jpeg,))
    monkeypatch.setattr("tasks.media.LONGEST_EDGE", {})  # as for a format whose bound nobody has listed
    found = encoded(Sample(prompt="p", image=np.zeros((4, 70_000, 3), np.uint8)), (jpeg,))
    assert found.problem.kind == "failed"


def test_an_array_that_is_filled_anew_after_submit_fails_its_sample_with_what_to_do():
    array = np.zeros((64, 64, 3), np.uint8)
    found = encoded(Sample(prompt="p", image=array), change=lambda: array.fill(7))
    assert found.problem.kind == "invalid"
    assert "sample 0: image: the array was changed after submit()" in found.problem.message
    assert "submit a copy, or call flush() before you reuse it" in found.problem.message


def test_metadata_and_samples_that_are_filled_anew_after_submit_are_as_they_were():
    sample = Sample(prompt="before", metadata={"n": 1})
    before = encoded(Sample(prompt="before", metadata={"n": 1}))

    def change():
        sample.prompt, sample.metadata["n"] = "after", 2

    found = encoded(sample, change=change)
    assert found.identities["my_rewards.Mine"].key == before.identities["my_rewards.Mine"].key
    assert found.identities["my_rewards.Mine"].beside.metadata == {"n": 1}
    assert found.prompt == "before"


def turned(orientation: int) -> Image.Image:
    image = Image.new("RGB", (4, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    return image


def test_an_orientation_that_is_not_applied_is_told_once():
    engine = EngineByHand((POINT,))
    hint = encoded(Sample(prompt="p", image=turned(6))).hint
    assert "sample 0: image: its file says EXIF orientation 6, which is not applied" in hint
    assert "PIL.ImageOps.exif_transpose" in hint
    assert encoded(Sample(prompt="p", image=turned(1))).hint == ""
    for number in (1, 2):
        slot = engine.submit(number)
        (encode,) = engine.asked(do.Encode)
        engine.pending.remove(encode)
        found = engine.result_of(encode).encoded
        found.hint = f"{hint} {number}"
        engine.apply(ev.SampleEncoded(slot, found))
    assert [one.words for one in engine.asked(do.Warn)] == [f"{hint} 1"]
