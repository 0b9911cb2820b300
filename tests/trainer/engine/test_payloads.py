"""Who uses which payload: stored once, freed with its last user."""

from __future__ import annotations

import itertools

import pytest

from tests.trainer.engine.by_hand import content_of
from tests.trainer.engine.parts import new_awaited
from trainer_client.engine.encoding import Content
from trainer_client.engine.payloads import PayloadLedger
from trainer_client.engine.states import PayloadStage


class CheckedLedger(PayloadLedger):
    """Stores as the engine does."""

    def __init__(self) -> None:
        numbers = itertools.count()
        super().__init__(lambda digest: f"{next(numbers)}.{digest}", part_bytes=1000)

    def store(self, payload):
        payload.stage = PayloadStage.STORING
        return self.stored(payload.name)


@pytest.fixture
def ledger():
    """Without payloads; its invariants are checked in the end."""
    ledger = CheckedLedger()
    yield ledger
    ledger.check()


@pytest.fixture
def users():
    """Two outcomes that need media."""
    return new_awaited("first"), new_awaited("second")


def test_equal_content_is_one_payload_and_stored_once(ledger, users):
    first, second = users
    payload, is_new = ledger.use(content_of(1), first)
    same, is_new_again = ledger.use(content_of(1), second)
    assert payload is same
    assert (is_new, is_new_again) == (True, False)
    assert len(ledger) == 1


def test_a_payload_is_freed_with_its_last_user(ledger, users):
    first, second = users
    payload, _ = ledger.use(content_of(1), first)
    ledger.use(content_of(1), second)
    ledger.store(payload)
    ledger.release(first)
    assert ledger.take_to_free() == []
    ledger.release(second)
    assert ledger.take_to_free() == [payload.name]
    assert ledger.take_to_free() == [], "a name is given once"


def test_a_user_that_needs_the_same_content_twice_is_one_user(ledger, users):
    first, _ = users
    payload, _ = ledger.use(content_of(1), first)
    ledger.use(content_of(1), first)
    assert first.payloads == [payload]
    ledger.release(first)
    assert len(ledger) == 0


def test_what_was_never_stored_is_not_freed(ledger, users):
    first, _ = users
    ledger.use(content_of(1), first)
    ledger.release(first)
    assert len(ledger) == 0
    assert ledger.take_to_free() == []


def test_what_is_released_on_its_way_into_the_store_is_freed_once_it_has_arrived(ledger, users):
    first, _ = users
    payload, _ = ledger.use(content_of(1), first)
    payload.stage = PayloadStage.STORING
    ledger.release(first)
    assert ledger.take_to_free() == []
    assert ledger.stored(payload.name) is None
    assert ledger.take_to_free() == [payload.name]


def test_what_is_needed_again_on_its_way_into_the_store_stays(ledger, users):
    first, second = users
    payload, _ = ledger.use(content_of(1), first)
    payload.stage = PayloadStage.STORING
    ledger.release(first)
    same, is_new = ledger.use(content_of(1), second)
    assert (same, is_new) == (payload, False)
    assert ledger.stored(payload.name) is payload
    assert ledger.take_to_free() == []


def test_content_that_was_freed_and_comes_again_gets_another_name(ledger, users):
    first, second = users
    payload, _ = ledger.use(content_of(1), first)
    ledger.store(payload)
    ledger.release(first)
    again, is_new = ledger.use(content_of(1), second)
    assert is_new
    assert again.name != payload.name
    assert ledger.take_to_free() == [payload.name]


def test_what_one_hands_over_the_other_needs_from_then_on(ledger, users):
    giver, taker = users
    payload, _ = ledger.use(content_of(1), giver)
    ledger.store(payload)
    ledger.hand_over(giver, taker)
    assert (giver.payloads, taker.payloads) == ([], [payload])
    assert ledger.take_to_free() == []
    ledger.release(taker)
    assert ledger.take_to_free() == [payload.name]


def test_the_bytes_of_a_payload_are_kept_until_it_is_stored(ledger, users):
    first, _ = users
    payload, _ = ledger.use(content_of(1), first)
    assert ledger.content_of(payload.name) == content_of(1)
    ledger.store(payload)
    assert payload.content is None
    assert first.has_media_stored


def test_only_what_is_in_the_store_is_in_use_there(ledger, users):
    first, _ = users
    stored, _ = ledger.use(content_of(1), first)
    ledger.use(content_of(2), first)
    ledger.store(stored)
    assert ledger.names_in_use() == [stored.name]
    assert not first.has_media_stored


def test_a_payload_of_an_earlier_process_lives_as_long_as_it_is_needed(ledger, users):
    first, second = users
    ledger.use_foreign("earlier.digest1", "digest1", first)
    ledger.use_foreign("earlier.digest1", "digest1", second)
    assert ledger.names_in_use() == ["earlier.digest1"]
    ledger.release(first)
    assert ledger.take_to_free() == []
    ledger.release(second)
    assert ledger.names_in_use() == []
    assert ledger.take_to_free() == [], "another ticket of that process may need it"
    ledger.free_kept()
    assert ledger.take_to_free() == ["earlier.digest1"]
    ledger.free_kept()
    assert ledger.take_to_free() == [], "a name is given once"


def test_a_payload_of_an_earlier_process_that_is_needed_again_is_not_freed(ledger, users):
    first, second = users
    ledger.use_foreign("earlier.digest1", "digest1", first)
    ledger.release(first)
    ledger.keep_unused(["earlier.digest1", "earlier.digest2"])
    ledger.free_unused(["earlier.digest1", "own.digest3"])
    ledger.use_foreign("earlier.digest1", "digest1", second)
    ledger.keep_unused(["earlier.digest1"])
    ledger.free_kept()
    assert ledger.take_to_free() == ["own.digest3", "earlier.digest2"]
    assert ledger.names_in_use() == ["earlier.digest1"]


def test_content_is_stored_under_an_own_name_also_if_an_earlier_process_has_stored_it(ledger, users):
    first, second = users
    ledger.use_foreign("earlier.digest1", "digest1", first)
    payload, is_new = ledger.use(content_of(1), second)
    assert is_new
    assert payload.name != "earlier.digest1"


def test_requests_are_freed_with_the_rest(ledger):
    ledger.free_later(["request", "request.0"])
    assert ledger.take_to_free() == ["request", "request.0"]


def test_what_is_larger_than_a_part_has_a_name_that_says_in_how_many_it_lies(ledger, users):
    small, large = (Content(bytes(size), f"of {size}", (size,), "raw") for size in (1000, 2001))
    assert ledger.use(small, users[0])[0].name == "0.of 1000"
    assert ledger.use(large, users[0])[0].name == "1.of 2001.of3"
