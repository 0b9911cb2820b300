from __future__ import annotations

import pytest

from tasks.errors import InvalidSampleError
from tasks.samples import Sample
from trainer_client.engine.model import Slot
from trainer_client.steps.open_steps import OpenSteps


def slots(num, step):
    return [Slot("train", step.number, step.num_submitted + i, "g", None, {}, (), 0.0) for i in range(num)]


def submit(steps, num, number=None):
    step = steps.open("train", number)
    step.count_members([Sample(group="g")] * num, 8)
    new = slots(num, step)
    step.add(new, 0.1)
    return new


def test_each_collect_begins_a_step():
    steps = OpenSteps(world_size=1)
    for number in range(3):
        submitted = submit(steps, 8)
        assert steps.number("train") == number
        steps.close("train", submitted)
    assert steps.get("train") is None
    assert steps.number("eval") == 0


def test_a_step_that_tickets_have_emptied_ends_with_the_next_submit():
    steps = OpenSteps(world_size=1)
    for number in range(3):  # the same group of 8 each time: in one step it would be too large
        submitted = submit(steps, 8)
        assert steps.number("train") == number
        assert [slot.index for slot in submitted] == list(range(8))
        steps.take_out("train", submitted)


def test_a_step_that_tickets_have_emptied_goes_on_under_its_number():
    steps = OpenSteps(world_size=2)
    steps.take_out("train", submit(steps, 4, number=5))
    assert [slot.index for slot in submit(steps, 4, number=5)] == [4, 5, 6, 7]
    with pytest.raises(InvalidSampleError, match="would have 9 members"):
        submit(steps, 1, number=5)


def test_a_step_of_which_a_ticket_took_a_part_stays_open():
    steps = OpenSteps(world_size=1)
    first, second = submit(steps, 2), submit(steps, 3)
    steps.take_out("train", first)
    step = steps.open("train", None)
    assert step.slots == second
    with pytest.raises(InvalidSampleError, match="step 0 of split 'train' is still open"):
        steps.open("train", 1)


def test_what_was_submitted_while_a_step_was_collected_is_the_next_collects():
    steps = OpenSteps(world_size=1)
    first = submit(steps, 2)
    second = submit(steps, 3)
    steps.close("train", first)
    step = steps.get("train")
    assert step.slots == second
    assert step.submit_s == 0.0


def test_a_step_that_was_given_up_is_not_numbered_again():
    steps = OpenSteps(world_size=1)
    submitted = submit(steps, 2)
    assert steps.give_up("train").slots == submitted
    assert submit(steps, 1)[0].step == 1


def test_tickets_that_overlap_leave_nothing_behind_in_their_step():
    step = OpenSteps(world_size=1).open("train", None)
    waiting = []
    for number in range(6):
        new = [Slot("train", 0, number * 4 + i, "fox", Sample("fox"), {}, (), 0.0) for i in range(4)]
        step.count_members(new, 8, is_strict=False)
        assert step.find_mixed_group(new) is None
        step.add(new, 0.1)
        waiting.append(new)
        if len(waiting) > 1:
            step.remove(waiting.pop(0))
    assert step.members["fox"] == 4
    step.remove(waiting.pop())
    assert (step.members, step.group_sizes) == ({}, {})
    step.count_members([Sample(group=n) for n in range(100)], None, is_strict=False)
    assert (step.members, step.group_sizes) == ({}, {})
