"""The open steps and the tickets of one client, whose engine is a fake that resumes tickets slowly."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tasks.errors import TicketError
from tasks.rewards import RewardConfig
from tasks.samples import Sample
from trainer_client.session.client_steps import ClientSteps
from trainer_client.steps.submission import Submission

CONFIG = RewardConfig.from_dict({"rewards": [{"reward_model": "jpeg_compressibility"}]})


class SlowEngine:
    """Resumes a ticket once `may_resume` is set."""

    client_id = "this"

    def __init__(self):
        self.num_resumed = 0
        self.is_resuming, self.may_resume = threading.Event(), threading.Event()

    def resume(self, ticket, config):
        self.num_resumed += 1
        self.is_resuming.set()
        assert self.may_resume.wait(10)
        return [f"slot {i} of a process that is gone" for i in range(ticket.num_samples)]

    def give_up(self, slots):
        pass


class Process:
    run, launch, rank = "run", "one", 0


def submit(steps, num, client_id="this"):
    samples = [Sample(image=np.zeros((8, 8, 3), np.uint8))] * num
    submission = Submission("train", CONFIG.of("train"), samples, None, steps.new_ticket_number(), 0.0)
    submission.check(steps.num_submitted("train"), 0, 1, 10**6)
    return steps.issue(submission, steps.add(submission, None), Process, client_id)


def wanted(steps, engine, ticket, run="run"):
    return steps.wanted_of_ticket(engine, CONFIG, run, ticket).slots


def test_a_ticket_lists_its_samples_by_their_indices_in_the_step():
    steps = ClientSteps(world_size=1)
    first, second = submit(steps, 2), submit(steps, 3)
    assert (first.start, first.stop, second.start, second.stop) == (0, 2, 2, 5)
    assert [slot.index for slot in second.slots] == [2, 3, 4]
    assert wanted(steps, SlowEngine(), second) == list(second.slots)


def test_two_threads_that_collect_a_ticket_resume_it_once_and_keep_nobody_from_submitting():
    engine, steps = SlowEngine(), ClientSteps(world_size=1)
    ticket = submit(ClientSteps(world_size=1), 2, client_id="one that is gone")
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(wanted, steps, engine, ticket) for _ in range(2)]
        assert engine.is_resuming.wait(10)
        submit(steps, 3)
        assert steps.num_pending("train") == 3
        engine.may_resume.set()
        assert found[0].result(10) == found[1].result(10)
    assert len(found[0].result()) == 2
    assert engine.num_resumed == 1


def test_a_ticket_that_was_collected_is_resumed_anew():
    engine, steps = SlowEngine(), ClientSteps(world_size=1)
    engine.may_resume.set()
    ticket = submit(ClientSteps(world_size=1), 1, client_id="one that is gone")
    steps.close(steps.wanted_of_ticket(engine, CONFIG, "run", ticket))
    wanted(steps, engine, ticket)
    assert engine.num_resumed == 2


def test_a_ticket_of_another_run_is_refused():
    steps = ClientSteps(world_size=1)
    with pytest.raises(TicketError, match="this ticket is of run 'run', this client of 'other'"):
        wanted(steps, SlowEngine(), submit(steps, 1), run="other")


def test_only_groups_of_samples_that_are_collected_are_given_up():
    """The engine would remember the others for ever, and tell samples of a later step of the same number."""
    ranked = RewardConfig.from_dict({"rewards": [{"reward_model": "PickScore_Rank"}]})
    steps = ClientSteps(world_size=1)
    tickets = []
    for group in ("by its ticket", "by its step"):
        samples = [Sample(prompt="a", image=np.zeros((8, 8, 3), np.uint8), group=group)]
        submission = Submission("train", ranked.of("train"), samples, 2, steps.new_ticket_number(), 0.0)
        submission.check(0, 0, 1, 10**6)
        tickets.append(steps.issue(submission, steps.add(submission, None), Process, "this"))
    steps.close(steps.wanted_of_ticket(SlowEngine(), ranked, "run", tickets[0]))
    step = steps.wanted_of_step(SlowEngine(), ranked, "train", None)
    assert set(step.incomplete) == {"by its ticket", "by its step"}
    assert set(step.given_up_groups) == {"by its step"}
