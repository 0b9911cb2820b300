"""What workers are told: the requests of a delivery, and the messages that name them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tasks.media import digest
from tasks.messages import Failure, GroupRequest, SampleRequest, ScoreRequest, pack
from tasks.rewards import RewardSpec
from trainer_client.engine.model import Awaited, Delivery, GroupPlan
from trainer_client.texts import words_of


@dataclass(slots=True)
class Message:
    """One message to publish."""

    task: str
    label: str
    request: str
    queue: str
    digest: str = ""
    """Of the request's bytes. Empty if it is not known: the process that sent the request ended before its ticket said
    it."""
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


@dataclass(frozen=True, slots=True)
class Composed:
    """What is to be published of one delivery."""

    message: Message | None
    """None if nothing of the delivery can be packed."""
    requests: dict[str, bytes]
    """To be stored before the message goes, by name."""
    refused: dict[Awaited, Failure] = field(default_factory=dict)
    """Outcomes whose sample cannot be packed, and why."""


class RequestWriter:
    """Composes the requests of one run."""

    def __init__(self, run: str, tasks: TaskNames) -> None:
        self.run, self._tasks = run, tasks

    def compose(self, delivery: Delivery, times: Times) -> Composed:
        """The message of a delivery, and the requests to store for it.

        A group that is larger than a chunk is a chord: its parts in the header, what combines them in the body. A
        sample that cannot be packed is left out, and a member of a group is put in with its failure.
        """
        try:
            return self._compose(delivery, times, sample_request)
        except Exception:
            # One sample's doing, perhaps: each is packed by itself, which would be slow for all.
            return self._compose_packable(delivery, times)

    def _compose_packable(self, delivery: Delivery, times: Times) -> Composed:
        refused: dict[Awaited, Failure] = {}

        def packable(awaited: Awaited) -> SampleRequest | None:
            try:
                return without_unpackable_members(sample_request(awaited))
            except Exception as error:
                refused[awaited] = _cannot_be_packed(error)
                return None

        try:
            composed = self._compose(delivery, times, packable)
        except Exception as error:
            failure = _cannot_be_packed(error)
            return Composed(
                None, {}, dict.fromkeys(delivery.awaited_when_sent, failure)
            )
        return replace(composed, refused=refused)

    def _compose(
        self,
        delivery: Delivery,
        times: Times,
        request_of: Callable[[Awaited], SampleRequest | None],
    ) -> Composed:
        first, spec = delivery.awaited_when_sent[0], delivery.spec
        label, name = delivery.label, delivery.request
        if first.group is None or not spec.is_combined:
            found = [request_of(awaited) for awaited in delivery.awaited_when_sent]
            samples = [sample for sample in found if sample is not None]
            if not samples:
                return Composed(None, {})
            request = pack(self._chunk(name, label, spec, samples, times))
            message = self._message(self._tasks.score, delivery, request)
            return Composed(message, {name: request})

        group = self._group(delivery, first, first.group, times)
        if request_of is not sample_request:
            members = tuple(map(packable_member, group.members))
            group = group.model_copy(update={"members": members})
        if not delivery.part_requests:
            request = pack(group)
            message = self._message(self._tasks.group, delivery, request)
            return Composed(message, {name: request})
        return self._chord(delivery, group, times)

    def again(self, delivery: Delivery, request: str) -> Message:
        """The message of one of its requests, as it was; what was a chord goes as one task."""
        is_group = delivery.spec.is_combined and request == delivery.request
        task = self._tasks.group if is_group else self._tasks.score
        known = delivery.digests.get(request, "")
        return Message(task, delivery.label, request, delivery.spec.queue, known)

    @staticmethod
    def _message(task: str, delivery: Delivery, request: bytes) -> Message:
        """The message of a delivery's own request, of these bytes."""
        queue = delivery.spec.queue
        return Message(task, delivery.label, delivery.request, queue, digest(request))

    def _chord(self, delivery: Delivery, group: GroupRequest, times: Times) -> Composed:
        spec = delivery.spec
        requests = {delivery.request: pack(group)}
        body = self._message(self._tasks.combine, delivery, requests[delivery.request])
        for at, name in enumerate(delivery.part_requests):
            own = group.parts[at * spec.batch_size : (at + 1) * spec.batch_size]
            if not own:  # of members that cannot be packed there is nothing to score
                continue
            label = f"{spec.part.reward_model} x {len(own)} of {delivery.label}"
            data = pack(self._chunk(name, label, spec.part, own, times))
            requests[name] = data
            part = Message(self._tasks.score, label, name, spec.queue, digest(data))
            body.header.append(part)
        if not body.header:
            body.task = self._tasks.group
        return Composed(body, requests)

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
            run=self.run,
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
            run=self.run,
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


def packable_member(member: SampleRequest) -> SampleRequest:
    """A member of a group as it is, or as one that failed if it cannot be packed: the others are scored without it."""
    try:
        pack(member)
    except Exception as error:
        return SampleRequest(
            address=member.address,
            prompt="",
            media={},
            attempt=member.attempt,
            failure=_cannot_be_packed(error),
        )
    return member


def without_unpackable_members(sample: SampleRequest) -> SampleRequest:
    """A sample's request, in which members that cannot be packed have failed. Raises if it cannot be packed itself."""
    members = tuple(map(packable_member, sample.members))
    sample = sample.model_copy(update={"members": members})
    pack(sample)
    return sample


def _cannot_be_packed(error: Exception) -> Failure:
    words = f"the sample cannot be packed into a request: {words_of(error)}"
    return Failure(kind="failed", message=words)


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
