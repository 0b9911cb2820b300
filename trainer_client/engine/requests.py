"""What workers are told: the requests of a delivery, and the messages that name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tasks.messages import GroupRequest, SampleRequest, ScoreRequest, pack
from tasks.rewards import RewardSpec
from trainer_client.engine.model import Awaited, Delivery, GroupPlan


@dataclass(slots=True)
class Message:
    """One message to publish."""

    task: str
    label: str
    request: str
    queue: str
    number: int = 0
    header: list[Message] = field(default_factory=list)
    """Of a chord's body: the messages before it."""


@dataclass(frozen=True, slots=True)
class TaskNames:
    """Names of the Celery tasks that score a chunk, score a group within one chunk, and combine a larger group."""

    score: str
    group: str
    combine: str


@dataclass(frozen=True, slots=True)
class Times:
    """When requests are put together, and after what nobody waits for them; milliseconds on Redis's clock."""

    sent_ms: int
    deadline_ms: int


class RequestWriter:
    """Composes the requests of one run."""

    def __init__(self, run: str, tasks: TaskNames) -> None:
        self._run, self._tasks = run, tasks

    def compose(
        self, delivery: Delivery, times: Times
    ) -> tuple[Message, dict[str, bytes]]:
        """The message of a delivery, and the requests to store for it, by name.

        A group that is larger than a chunk is a chord: its parts in the header, what combines them in the body.
        """
        first, spec = delivery.awaited_when_sent[0], delivery.spec
        if first.group is None or not spec.is_combined:
            samples = tuple(sample_request(a) for a in delivery.awaited_when_sent)
            request = self._chunk(
                delivery.request, delivery.label, spec, samples, times
            )
            message = Message(
                self._tasks.score, delivery.label, delivery.request, spec.queue
            )
            return message, {delivery.request: pack(request)}

        group = self._group(delivery, first, first.group, times)
        if not delivery.part_requests:
            message = Message(
                self._tasks.group, delivery.label, delivery.request, spec.queue
            )
            return message, {delivery.request: pack(group)}
        return self._chord(delivery, group, times)

    def again(self, delivery: Delivery, request: str) -> Message:
        """The message of one of its requests, as it was; what was a chord goes as one task."""
        is_group = delivery.spec.is_combined and request == delivery.request
        task = self._tasks.group if is_group else self._tasks.score
        return Message(task, delivery.label, request, delivery.spec.queue)

    def _chord(
        self, delivery: Delivery, group: GroupRequest, times: Times
    ) -> tuple[Message, dict[str, bytes]]:
        spec = delivery.spec
        body = Message(
            self._tasks.combine, delivery.label, delivery.request, spec.queue
        )
        requests = {delivery.request: pack(group)}
        for at, name in enumerate(delivery.part_requests):
            own = group.parts[at * spec.batch_size : (at + 1) * spec.batch_size]
            label = f"{spec.part.reward_model} x {len(own)} of {delivery.label}"
            requests[name] = pack(self._chunk(name, label, spec.part, own, times))
            body.header.append(Message(self._tasks.score, label, name, spec.queue))
        return body, requests

    def _chunk(
        self,
        name: str,
        label: str,
        spec: RewardSpec,
        samples: Sequence[SampleRequest],
        times: Times,
    ) -> ScoreRequest:
        return ScoreRequest(
            id=name,
            run=self._run,
            label=label,
            sent_ms=times.sent_ms,
            deadline_ms=times.deadline_ms,
            reward=spec.call,
            samples=tuple(samples),
        )

    def _group(
        self, delivery: Delivery, awaited: Awaited, plan: GroupPlan, times: Times
    ) -> GroupRequest:
        spec = delivery.spec
        return GroupRequest(
            id=delivery.request,
            run=self._run,
            label=delivery.label,
            sent_ms=times.sent_ms,
            deadline_ms=times.deadline_ms,
            reward=spec.part.call,
            how="wins" if spec.how == "wins" else "rank",
            ties=spec.options.get("ties", "mean"),
            address=awaited.address,
            attempt=awaited.attempt,
            members=plan.members,
            comparisons=plan.comparisons,
            pairs=plan.pairs,
            shared_key=plan.shared_key,
        )


def sample_request(awaited: Awaited) -> SampleRequest:
    """An outcome as workers are told it; that of a group names its members."""
    beside = awaited.beside.as_fields() if awaited.beside is not None else {}
    return SampleRequest(
        address=awaited.address,
        prompt=awaited.prompt,
        media=awaited.media,
        attempt=awaited.attempt,
        members=awaited.group.members if awaited.group is not None else (),
        shared_key=awaited.group.shared_key if awaited.group is not None else "",
        **beside,
    )
