"""Reward models that take a worker's slots away; each does so with the number 1 in an image, and scores the others."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from celery.backends.base import Backend
from celery.worker import state
from kombu.transport.virtual import QoS

import workers.scoring.context
from tests.reward_models import number_in
from workers import PointwiseRewardModel, RewardModelOutput


class _TakesSlots(PointwiseRewardModel):
    required_fields = ("image",)

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        numbers = [float(number_in(one)) for one in image]
        if 1 in numbers:
            self.take_slots()
        return RewardModelOutput(numbers)

    def take_slots(self) -> None:
        """Do the harm."""
        raise NotImplementedError


class BreaksTracer(_TakesSlots):
    """What Celery does after a task's body raises what its tracer lets pass."""

    required_fields = ("image",)

    def take_slots(self) -> None:
        def out_of_memory(_backend: Backend) -> None:
            raise MemoryError("planted")

        Backend.process_cleanup = out_of_memory


class LeaksSlots(_TakesSlots):
    """Celery counts tasks that nobody runs, as after an error that frees no slot."""

    required_fields = ("image",)
    leaked: list[Any] = []

    def take_slots(self) -> None:
        class Leaked:
            id = "leaked"

        self.leaked += [Leaked(), Leaked()]  # Celery holds them weakly
        for one in self.leaked:
            state.reserved_requests.add(one)


class Unacknowledged(_TakesSlots):
    """Kombu counts messages that nobody acknowledges, and takes no further one; all slots look free."""

    required_fields = ("image",)

    def take_slots(self) -> None:
        for qos in gc.get_objects():
            if isinstance(qos, QoS):
                for number in range(100):
                    qos._delivered[f"planted {number}"] = None


class Impatient(PointwiseRewardModel):
    """The number in the image. Once it is loaded, tasks of its worker wait a second at most for a Redis."""

    required_fields = ("image",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        workers.scoring.context.REDIS_AWAY_S = 1.0

    def __call__(self, prompt: Sequence[str], image: Any = None, **kwargs: Any) -> RewardModelOutput:
        return RewardModelOutput([float(number_in(one)) for one in image])
