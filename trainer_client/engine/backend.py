"""The I/O of the engine: carries out one action, and returns the event that is its result.

It decides nothing and remembers nothing but connections. Whatever a server raises goes to the caller, who makes the
call again: each may run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from tasks import media
from tasks.errors import WireError
from tasks.groups import GroupSlots
from tasks.messages import (
    Failure,
    GroupRequest,
    MediaRef,
    Outcome,
    SampleRequest,
    ScoreRequest,
    unpack,
)
from tasks.outcomes import ClientOutcomes, QueueState, key_of
from tasks.payloads import PayloadStore
from tasks.samples import Sample
from tasks.servers.connections import LOST
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.broker import Broker
from trainer_client.engine.encoding import Content, EncodedSample
from trainer_client.engine.model import Awaited, Delivery, Slot
from trainer_client.engine.publisher import Publisher
from trainer_client.engine.server_errors import is_of_server
from trainer_client.texts import words_of

SURELY_FITS_BYTES = 2**20
"""The store is not asked for its size because of a sample that has no more."""


class Encoder(Protocol):
    """Encodes samples."""

    def encode(self, slot: Slot, sample: Sample) -> EncodedSample:
        """A sample as it travels."""


class Backend:
    """The servers, as one client uses them. Safe between threads.

    Args:
        outcomes, store, groups: The result backend, the payload store, and of several ranks the slots of groups.
        publisher: Sends messages.
        inspector: A connection to the broker of its own, for what is asked of its queues.
        encoder: Encodes samples of this rank.
        rank, client_id: Who asks for a group's attempt.
        payload_ttl_s: As the setting of this name.
    """

    def __init__(  # noqa: PLR0913  (wires parts)
        self,
        *,
        outcomes: ClientOutcomes,
        store: PayloadStore,
        groups: GroupSlots | None,
        publisher: Publisher,
        inspector: Broker,
        encoder: Encoder,
        rank: int,
        client_id: str,
        payload_ttl_s: float,
    ) -> None:
        self._outcomes, self._store, self._groups = outcomes, store, groups
        self._publisher, self._inspector = publisher, inspector
        self._encoder = encoder
        self._rank, self._client_id = rank, client_id
        self._payload_ttl_s = payload_ttl_s

    def perform(self, action: do.Action) -> ev.Event:
        """Carry out an action; raises what its server raises."""
        return _CALLS[type(action)](self, action)

    # --- encode and store ------------------------------------------------------------

    def _encode(self, action: do.Encode) -> ev.Event:
        slot = action.slot
        sample = slot.sample
        if sample is None:  # given up meanwhile
            return ev.SampleEncoded(slot, EncodedSample("", {}))
        encoded = self._encoder.encode(slot, sample)
        if encoded.num_bytes > SURELY_FITS_BYTES:
            self._check_capacity(slot, encoded)
        return ev.SampleEncoded(slot, encoded)

    def _check_capacity(self, slot: Slot, encoded: EncodedSample) -> None:
        """A sample that never fits into the store is invalid: a store that is full for now is waited for."""
        try:
            capacity = self._store.capacity_bytes()
        except LOST:  # storing waits for it; encoding need not
            return
        if capacity is not None and encoded.num_bytes > capacity:
            words = (
                f"sample {slot.index}: its media have {encoded.num_bytes} bytes, and the payload store holds "
                f"{capacity} bytes in all (maxmemory of its Redis, or the size of its file system); "
                "give it more, or send less"
            )
            encoded.problem = Failure(kind="invalid", message=words)
            encoded.contents.clear()

    def _store_payload(self, action: do.Store) -> ev.Event:
        failure = self._put({action.name: action.content.data})
        if failure is not None:
            return ev.PayloadRefused(action.name, failure)
        return ev.PayloadStored(action.name)

    def _put(self, payloads: Mapping[str, Any]) -> Failure | None:
        """Store media; returns what their sample is told if they cannot be stored. Raises what the server raises."""
        try:
            self._store.put(payloads, self._payload_ttl_s)
        except Exception as error:
            # Something else than the server: no memory, or an odd entry of that name in the payload folder.
            if is_of_server(error):
                raise
            words = f"its media cannot be stored: {words_of(error)}"
            return Failure(kind="failed", message=words)
        return None

    def _restore(self, action: do.Restore) -> ev.Event:
        names: dict[str, None] = {}
        for lost in action.lost:
            names.update(dict.fromkeys(lost.digest_of))
        gone = set(self._store.renew(list(names), self._payload_ttl_s))
        problems: dict[Awaited, Failure | None] = {}
        for lost in action.lost:
            missing = {d: name for name, d in lost.digest_of.items() if name in gone}
            problem = self._bring_back(lost.slots, missing) if missing else None
            problems[lost.awaited] = problem
        return ev.Restored(problems, frozenset(gone))

    def _bring_back(
        self, slots: Sequence[Slot], missing: Mapping[str, str]
    ) -> Failure | None:
        """Store again what is gone (digest to name) of these samples' media; returns why that cannot be done."""
        samples = [(slot, slot.sample) for slot in slots]
        holders = [(slot, sample) for slot, sample in samples if sample is not None]
        if not holders:
            words = (
                "its media left the payload store, and this process does not hold them"
            )
            return Failure(kind="failed", message=words)
        found: dict[str, Content] = {}
        for slot, sample in holders:
            encoded = self._encoder.encode(slot, sample)
            if encoded.problem is not None:
                words = (
                    f"its media had to be sent a second time: {encoded.problem.message}"
                )
                return encoded.problem.model_copy(update={"message": words})
            found |= encoded.all_contents()
        if not missing.keys() <= found.keys():
            words = "its media were changed after submit(), and had to be sent a second time"
            return Failure(kind="invalid", message=words)
        payloads = {name: found[digest].data for digest, name in missing.items()}
        return self._put(payloads)

    # --- publish ---------------------------------------------------------------------

    def _publish(self, action: do.Publish) -> ev.Event:
        sent = self._publisher.publish(action.deliveries)
        for delivery, number in sent.numbers.items():
            if number:
                self._tell_other_ranks(delivery, number)
        return ev.Published(sent.numbers, sent.digests, sent.refused)

    def _publish_again(self, action: do.PublishAgain) -> ev.Event:
        number = self._publisher.publish_again(action.delivery, action.request)
        return ev.Published({action.delivery: number})

    def _tell_other_ranks(self, delivery: Delivery, number: int) -> None:
        """Which message was sent for a group."""
        if self._groups is None:
            return
        for awaited in delivery.awaited_when_sent:
            if awaited.group is not None and awaited.group.shared_key:
                self._groups.set_number(awaited.group.shared_key, number)

    # --- look up ---------------------------------------------------------------------

    def _look_up(self, action: do.LookUp) -> ev.Event:
        found = self._find(action.addresses)
        return ev.OutcomesFound(found, action.purpose)

    def _find(self, addresses: Sequence[str]) -> dict[str, Outcome | None]:
        if not addresses:
            return {}
        return dict(zip(addresses, self._outcomes.look_up(addresses), strict=True))

    def _look_up_group(self, action: do.LookUpGroup) -> ev.Event:
        group, plan = action.group, action.group.group
        assert plan is not None
        outcome = self._outcomes.look_up([group.address])[0]
        if outcome is not None and outcome.is_final:
            return ev.GroupLookedUp(group, outcome, group.attempt, 0, {})

        attempt, number = self._ask_attempt(action, outcome)
        parts: dict[str, Outcome | None] = {}
        is_answered = outcome is not None and outcome.attempt >= attempt
        if not is_answered:
            addresses = [one.address for one in (*plan.members, *plan.comparisons)]
            parts = self._find(addresses)
        return ev.GroupLookedUp(group, outcome, attempt, number, parts)

    def _ask_attempt(
        self, action: do.LookUpGroup, outcome: Outcome | None
    ) -> tuple[int, int]:
        """Which attempt of a group this rank asks for, and the number of the message sent for it (0: none)."""
        group, plan = action.group, action.group.group
        following = group.attempt if outcome is None else outcome.attempt + 1
        if self._groups is None or plan is None or not plan.shared_key:
            return following, 0

        first = following
        if outcome is not None and outcome.shared_key == plan.shared_key:
            # It is what the other ranks had, or get: also where Redis was emptied meanwhile, and does not know any more
            # that they have asked.
            first = outcome.attempt
        return self._groups.ask(
            plan.shared_key,
            key_of(group.address),
            self._rank,
            self._client_id,
            following,
            action.question,
            first,
        )

    def _read_numbers(self, action: do.ReadNumbers) -> ev.Event:
        states = {q: self._outcomes.queue_state(q, 1) for q in action.queues}
        return ev.NumbersRead(
            sent={queue: state.sent for queue, state in states.items()},
            taken={queue: state.consumed for queue, state in states.items()},
        )

    def _read_notes(self, action: do.ReadNotes) -> ev.Event:
        found = self._outcomes.notes([request for _, request in action.requests])
        notes = []
        for (delivery, request), note in zip(action.requests, found, strict=True):
            if note is not None:
                notes.append((delivery, request, note))
        if not notes:
            return ev.NotesRead([], "")
        identity = self._store.identity()
        self._outcomes.drop_notes([request for _, request, _ in notes])
        return ev.NotesRead(notes, identity)

    # --- upkeep ----------------------------------------------------------------------

    def _inspect(self, action: do.InspectDeliveries) -> ev.Event:
        queues = sorted({one.delivery.spec.queue for one in action.suspicions})
        states = {queue: self._state_of(queue) for queue in queues}
        queued: list[Delivery] = []
        awaited: list[Awaited] = []
        for one in action.suspicions:
            if states[one.delivery.spec.queue].holds(one.number):
                queued.append(one.delivery)
            else:
                awaited += one.awaited
        workers = self._outcomes.workers() if awaited else []
        claimed = self._claimed(awaited)
        # After the claims: an answer that ends a claim between the two is seen.
        unclaimed = [
            a.address for a in awaited if claimed.isdisjoint(a.in_hand_addresses)
        ]
        return ev.DeliveriesInspected(
            suspicions=action.suspicions,
            in_queue=frozenset(queued),
            claimed=claimed,
            workers=workers,
            outcomes=self._find(unclaimed),
        )

    def _state_of(self, queue: str) -> QueueState:
        return self._outcomes.queue_state(queue, self._inspector.num_waiting(queue))

    def _claimed(self, awaited: Iterable[Awaited]) -> frozenset[str]:
        addresses: dict[str, None] = {}
        for one in awaited:
            addresses.update(dict.fromkeys(one.in_hand_addresses))
        if not addresses:
            return frozenset()
        found = self._outcomes.claimed(list(addresses))
        pairs = zip(addresses, found, strict=True)
        return frozenset(address for address, is_claimed in pairs if is_claimed)

    def _measure_store(self, action: do.MeasureStore) -> ev.Event:
        num_bytes = self._store.bytes_in_use()
        has_messages = None
        if action.queues:
            has_messages = any(self._inspector.num_waiting(q) for q in action.queues)
        return ev.StoreMeasured(num_bytes, has_messages)

    def _renew(self, action: do.Renew) -> ev.Event:
        self._store.renew(action.names, self._payload_ttl_s)
        return ev.Renewed()

    def _free(self, action: do.Free) -> ev.Event:
        self._store.free(action.names)
        return ev.Freed()

    def _check_request(self, action: do.CheckRequest) -> ev.Event:
        gone = self._store.renew([action.delivery.request], self._payload_ttl_s)
        is_shared: dict[Awaited, bool | None] = {}
        if gone and self._groups is not None and action.shared_keys:
            slots = self._groups.filled_slots(list(action.shared_keys.values()))
            for awaited, filled in zip(action.shared_keys, slots, strict=True):
                ranks = {rank for rank, _ in filled}
                is_shared[awaited] = ranks != {self._rank} if ranks else None
        return ev.RequestChecked(action.delivery, not gone, is_shared)

    def _read_requests(self, action: do.ReadRequests) -> ev.Event:
        payloads = []
        for one in action.requests:
            for address, sample in self._samples_of(one):
                if address not in action.slots_of:
                    continue
                for ref in _refs_of(sample):
                    payloads.append((address, ref.name, ref.digest))
        return ev.RequestsRead(payloads, action.slots_of)

    def _samples_of(self, request: do.SentRequest) -> list[tuple[str, SampleRequest]]:
        """The samples of a request that is still there, each with the address of the outcome that needs it."""
        data = self._store.get([request.name])[0]
        if data is None or (request.digest and media.digest(data) != request.digest):
            return []
        try:
            if request.is_group:
                group = unpack(GroupRequest, data)
                return [(group.address, member) for member in group.members]
            samples = unpack(ScoreRequest, data).samples
        except WireError:
            # Of another version of this package: workers say so, in a note.
            return []
        found = []
        for sample in samples:
            found += [(sample.address, one) for one in sample.members or (sample,)]
        return found

    # --- groups over ranks -----------------------------------------------------------

    def _register(self, action: do.RegisterMember) -> ev.Event:
        assert self._groups is not None
        member = action.member
        assert member.request is not None
        found = self._groups.register(
            action.shared_key,
            action.position,
            member.key,
            member.request,
            action.group_size,
            member.spec.fingerprint,
        )
        return ev.MemberRegistered(member, found)

    def _read_digests(self, action: do.ReadDigests) -> ev.Event:
        assert self._groups is not None
        found = self._groups.digests(action.shared_keys)
        return ev.DigestsRead(dict(zip(action.shared_keys, found, strict=True)))

    def _read_members(self, action: do.ReadMembers) -> ev.Event:
        assert self._groups is not None
        members = self._groups.members(action.shared_key)
        return ev.MembersRead(action.shared_key, action.digest, members)

    def _put_groups_back(self, action: do.PutGroupsBack) -> ev.Event:
        """Other ranks may not have the answer yet, and the media of this rank's members are freed."""
        assert self._groups is not None
        groups = action.groups
        are_there = self._outcomes.are_there([group.address for group in groups])
        digests = self._groups.digests([group.shared_key for group in groups])
        lost = []
        for group, is_there, found in zip(groups, are_there, digests, strict=True):
            if not is_there:
                self._outcomes.put_back(group.address, group.outcome)
            if not found:
                self._groups.put_back(
                    group.shared_key,
                    group.digest,
                    self._rank,
                    self._client_id,
                    group.attempt,
                )
                lost.append(group.shared_key)
        return ev.GroupsPutBack(frozenset(lost))


def _refs_of(sample: SampleRequest) -> list[MediaRef]:
    refs: list[MediaRef] = []
    for one in sample.media.values():
        refs += one if isinstance(one, tuple) else (one,)
    return refs


_CALLS: dict[type[Any], Callable[[Backend, Any], ev.Event]] = {
    do.Encode: Backend._encode,
    do.Store: Backend._store_payload,
    do.Restore: Backend._restore,
    do.LookUp: Backend._look_up,
    do.LookUpGroup: Backend._look_up_group,
    do.ReadNumbers: Backend._read_numbers,
    do.ReadNotes: Backend._read_notes,
    do.Publish: Backend._publish,
    do.PublishAgain: Backend._publish_again,
    do.InspectDeliveries: Backend._inspect,
    do.MeasureStore: Backend._measure_store,
    do.Renew: Backend._renew,
    do.Free: Backend._free,
    do.CheckRequest: Backend._check_request,
    do.ReadRequests: Backend._read_requests,
    do.RegisterMember: Backend._register,
    do.ReadDigests: Backend._read_digests,
    do.ReadMembers: Backend._read_members,
    do.PutGroupsBack: Backend._put_groups_back,
}
