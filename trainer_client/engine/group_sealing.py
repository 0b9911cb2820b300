"""Groups on their way: members join, over ranks through Redis, a sealed group gets its outcome to await."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tasks.groups import digest
from tasks.messages import Outcome, SampleRequest
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.core import Core
from trainer_client.engine.groups import Group, Groups
from trainer_client.engine.losses import LossPolicy
from trainer_client.engine.model import (
    Awaited,
    Delivery,
    Member,
)
from trainer_client.engine.polling import Polling
from trainer_client.engine.sending import Sending
from trainer_client.engine.states import (
    SentBy,
    State,
)


class Sealing:
    """Does what the life of a group (`groups.Groups`) leads to."""

    def __init__(
        self,
        core: Core,
        groups: Groups,
        sending: Sending,
        losses: LossPolicy,
        polling: Polling,
    ) -> None:
        self._core, self._groups, self._sending = core, groups, sending
        self._losses, self._polling = losses, polling
        self._is_putting_back = False

    @property
    def is_shared(self) -> bool:
        """Whether other ranks have members of the same groups."""
        return self._groups.is_shared

    def shared_keys_of(self, concerned: Iterable[Awaited]) -> dict[Awaited, str]:
        """Where the slots of these groups are in Redis; nothing on one rank."""
        if not self._groups.is_shared:
            return {}
        keys = {}
        for awaited in concerned:
            if awaited.spec.is_groupwise and awaited.slots:
                slot = awaited.slots[0]
                keys[awaited] = self._groups.name_shared_key(slot, awaited.spec)
        return keys

    def add_member(self, member: Member) -> None:
        """Its media are stored, or it cannot be scored: it is a member of its group now."""
        slot = member.slot
        if slot.is_given_up:
            self._core.payloads.release(member)
            self._sending.go_alone(member.carried)  # others may await them too
            return
        member.request = self._member_request(member)
        reason = self._groups.why_given_up(slot)
        group = self._groups.add(member, self._core.now)
        if reason is not None:
            self._core.fail_reward(slot, member.spec, reason)
        elif self._groups.is_shared:
            self._register(group, member)
        elif group.is_full:
            self._seal(group)

    def _member_request(self, member: Member) -> SampleRequest:
        """What workers are told of a member."""
        return SampleRequest(
            address=member.address,
            prompt=member.prompt,
            media=member.media,
            failure=member.failure,
            **member.beside.as_fields(),
        )

    def _seal(self, group: Group) -> None:
        members = list(group.members.items())
        self._join_group(group, self._groups.seal(group), dict(members))

    def _join_group(
        self, group: Group, sealed: Awaited, members: Mapping[Any, Member]
    ) -> None:
        """Let the members of this rank await the outcome of their sealed group."""
        awaited = group.awaited = self._known_or_new(group, sealed)
        is_new = awaited is sealed
        left_behind: dict[Awaited, None] = {}
        for position, member in members.items():
            index = sealed.group.index_of.get(position) if sealed.group else None
            if index is not None:
                self._join_member(group, awaited, member, index, left_behind)
        for before in left_behind:
            self._leave_behind(before, awaited)
        if not awaited.slots:
            self._sending.give_up(awaited)
        elif is_new:
            self._core.num_group_calls += 1
            question = self._core.new_name("question")
            self._core.act(do.LookUpGroup(awaited, question))

    def _known_or_new(self, group: Group, sealed: Awaited) -> Awaited:
        """What the members of a sealed group await: `sealed`, unless the same is awaited here, or answered, already."""
        known = self._core.awaited.get(sealed.address)
        if known is not None:
            if known.group is not None and sealed.group is not None:
                known.group.take_media_of(sealed.group)
            return known
        if group.awaited is not None and group.has_answer_of(sealed.address):
            return group.awaited  # a member that came late gets what the others got
        self._core.add(sealed, State.LOOKING_UP)
        return sealed

    def _leave_behind(self, before: Awaited, awaited: Awaited) -> None:
        """A group was sealed anew: what it was before has the payloads of those of its members that stayed the same."""
        if not awaited.is_ended:
            for payload in before.payloads:
                self._core.payloads.share(payload, awaited)
        if not before.slots:
            self._sending.give_up(before)

    def _join_member(
        self,
        group: Group,
        awaited: Awaited,
        member: Member,
        index: int,
        left_behind: dict[Awaited, None],
    ) -> None:
        slot, name = member.slot, group.spec.name
        if slot.is_given_up:
            self._core.payloads.release(member)
            return
        if slot.problem is not None:
            return
        before = slot.awaited.get(name)
        if before is not None and before.outcome is not None:
            self._core.payloads.release(member)
            return
        if before is not None and before is not awaited:
            self._core.leave(slot, before)
            left_behind[before] = None

        # Of equal members in other slots, the order is the same.
        slot.member_index[name] = index
        self._core.join(slot, awaited)
        self._core.set_awaited(slot, {**slot.awaited, name: awaited})
        if awaited.is_ended:
            self._core.payloads.release(member)
        else:
            self._core.payloads.hand_over(member, awaited)
        carried, member.carried = member.carried, []
        if awaited.state is State.LOOKING_UP and awaited.group is not None:
            awaited.group.carried += carried
        else:  # a group of equal members is on its way already, without these
            self._sending.go_alone(carried)

    def on_group_looked_up(self, event: ev.GroupLookedUp) -> None:
        """It is known what Redis has of a sealed group."""
        self._core.num_group_calls -= 1
        group, outcome = event.group, event.outcome
        if group.is_ended or group.group is None:
            return
        group.attempt = event.attempt
        if outcome is not None and group.accepts(outcome):
            self._sending.answer(group, outcome, is_hit=True)
            return
        plan = group.group
        plan.members = _next_attempts(plan.members, event.parts)
        plan.comparisons = _next_attempts(plan.comparisons, event.parts)
        if event.number:
            self._watch_other_ranks(group, event.number)
        else:
            self._sending.accumulate(group)

    def _watch_other_ranks(self, group: Awaited, number: int) -> None:
        """Another rank has sent this group: its message is looked after here too."""
        delivery = Delivery(
            request=self._core.new_name("other-rank"),
            label="",
            spec=group.spec,
            sent_by=SentBy.OTHER_RANK,
            awaited=[group],
            pause_s=self._losses.look_every_s,
            number=number,
        )
        self._losses.sent(delivery, self._core.now)
        self._core.take_up(delivery, State.IN_FLIGHT)

    def _register(self, group: Group, member: Member) -> None:
        self._core.num_group_calls += 1
        member.num_registrations += 1
        position = self._groups.position_of(member)
        self._core.act(
            do.RegisterMember(group.shared_key, position, member, group.size or 0)
        )

    def on_registered(self, event: ev.MemberRegistered) -> None:
        """A member is in its slot over ranks, or is refused."""
        self._core.num_group_calls -= 1
        member, found = event.member, event.found
        member.num_registrations -= 1
        slot = member.slot
        group = self._groups.of_member(member)
        if group is None or slot.is_given_up:
            return
        if found.state in ("full", "scored", "size"):
            failure = self._groups.refuse(group, member, found)
            self._core.fail_reward(slot, member.spec, failure)
            self._core.payloads.release(member)
        elif found.state == "sealed":
            self._read_if_changed(group, found.digest)

    def _read_if_changed(self, group: Group, found: str) -> None:
        """A group is sealed: read its members, unless these are known already."""
        is_joined = all(group.has_joined(m) for m in group.members.values())
        if group.is_reading or (found == group.digest and is_joined):
            return
        group.is_reading = True
        self._core.num_group_calls += 1
        self._core.act(do.ReadMembers(group.shared_key, found))

    def read_digests(self) -> None:
        """Ask which groups the ranks have sealed."""
        keys = [group.shared_key for group in self._groups.unanswered()]
        if keys:
            self._polling.digests.asked()
            self._core.act(do.ReadDigests(keys))

    def on_digests(self, event: ev.DigestsRead) -> None:
        """It is known which groups are sealed."""
        self._polling.digests.answered()
        for shared_key, found in event.digests.items():
            group = self._groups.of_shared_key(shared_key)
            if found and group is not None and group.is_awaited:
                self._read_if_changed(group, found)

    def on_members(self, event: ev.MembersRead) -> None:
        """The members of a sealed group are known."""
        self._core.num_group_calls -= 1
        group = self._groups.of_shared_key(event.shared_key)
        if group is None:
            return
        group.is_reading = False
        found = digest([key for key, _ in event.members.values()])
        if found != event.digest or not event.members:
            return  # changed between the two questions: the next one tells
        self._join_group(
            group,
            self._groups.seal_shared(group, event.members),
            dict(group.members),
        )

    def put_groups_back(self) -> None:
        """Let an emptied Redis know again what this rank knows."""
        for group in self._groups.unanswered():
            for member in list(group.members.values()):
                # While Redis is away the last registration waits: one more each time would be many after an hour.
                if not member.num_registrations:
                    self._register(group, member)
        if self._is_putting_back:
            return
        answered = []
        for group in self._groups.answered():
            awaited = group.awaited
            if awaited is not None and awaited.outcome is not None:
                answered.append(
                    do.AnsweredGroup(
                        shared_key=group.shared_key,
                        digest=group.digest,
                        address=awaited.address,
                        attempt=awaited.attempt,
                        outcome=awaited.outcome,
                    )
                )
        if answered:
            self._is_putting_back = True
            self._core.act(do.PutGroupsBack(answered))

    def on_put_back(self, event: ev.GroupsPutBack) -> None:
        """Some groups had to be put back: their members follow."""
        self._is_putting_back = False
        for shared_key in event.lost:
            group = self._groups.of_shared_key(shared_key)
            for member in list(group.members.values()) if group else ():
                self._register(group, member)  # type: ignore[arg-type]

    def on_incomplete(self, event: ev.GroupsIncomplete) -> None:
        """Groups get no further member."""
        told = self._groups.give_up_incomplete(event.split, event.step, event.words)
        for group, member, failure in told:
            self._core.fail_reward(member.slot, group.spec, failure)

    def release_groups(self) -> None:
        """Somebody collects, and nothing is on its way: groups are as large as they are, and keep nobody waiting."""
        if not self._core.released or not self._core.is_quiet:
            return
        for group in self._groups.of_unknown_size(self._core.released):
            self._seal(group)
        self._sending.go_alone(self._groups.take_overdue(self._core.now))


def _next_attempts(
    parts: tuple[SampleRequest, ...], found: Mapping[str, Outcome | None]
) -> tuple[SampleRequest, ...]:
    """Parts that failed before are tried again with the group."""
    asked = []
    for part in parts:
        outcome = found.get(part.address)
        if outcome is not None and not outcome.is_final:
            part = part.model_copy(update={"attempt": outcome.attempt + 1})
        asked.append(part)
    return tuple(asked)
