"""Background threads that encode samples, store their media, and send chunks, so that the trainer is not slowed."""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tasks import outcomes
from tasks.errors import InvalidSampleError
from tasks.messages import (
    Failure,
    SampleRequest,
)
from tasks.outcomes import ClientOutcomes
from tasks.payloads import PayloadStore
from tasks.rewards import RewardSpec
from tasks.samples import Sample, beside, identity_of, sample_key
from tasks.settings import Settings
from trainer_client.board import Board, Chunk, Entry, Place, Slot
from trainer_client.encoding import Encoded, encode
from trainer_client.groups import Groups, Member
from trainer_client.outgoing import Outgoing
from trainer_client.patience import EndedError, Patience
from trainer_client.uploads import Times, Uploads

log = logging.getLogger(__name__)

IDLE_S = 0.2
"""A chunk that is not full goes after this long without a new sample."""


class Sender:
    """Takes slots from `submit()` to messages under way.

    `sender_threads` threads encode and store, and wait while the payload store is full. One fills chunks and sends
    them. One does what makes room there, and so must not wait for it: it sends again what was lost, and passes on
    groups that were completed. A server that is away is waited for; the reason is on the board.
    """

    def __init__(
        self,
        settings: Settings,
        store: PayloadStore,
        results: ClientOutcomes,
        board: Board,
        run: str,
        rank: int,
        groups: Groups,
        outgoing: Outgoing,
    ) -> None:
        self._settings, self._store, self._outcomes, self._board = (
            settings,
            store,
            results,
            board,
        )
        self._run, self._rank = run, rank
        self._groups, self._outgoing = groups, outgoing
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._repairs: queue.SimpleQueue[Callable[[], None] | None] = (
            queue.SimpleQueue()
        )
        self._ready: queue.SimpleQueue[list[Entry] | None] = queue.SimpleQueue()
        self._filling: dict[tuple[Any, ...], list[Entry]] = {}
        self._hurrying = threading.Lock()
        self._num_hurries = self._num_jobs = 0
        self._releases: Counter[Place] = Counter()
        """Steps that someone waits for in `collect()`."""
        self.times = Times()
        self._patience = Patience(board)
        self._uploads = Uploads(
            settings, store, board, outgoing, self._patience, self.times
        )
        self._threads = [
            threading.Thread(
                target=self._guard, args=(loop,), name=f"rewardq-{name}", daemon=True
            )
            for name, loop in (
                *(
                    (f"encode-{i}", functools.partial(self._work, self._jobs))
                    for i in range(settings.sender_threads)
                ),
                ("repair", functools.partial(self._work, self._repairs)),
                ("send", self._send_loop),
            )
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, slots: Sequence[Slot]) -> None:
        """Encode and send these slots in the background."""
        self._board.count_unsent(len(slots))
        for slot in slots:
            self._do(self._jobs, functools.partial(self._encode_slot, slot))

    def send_again(self, entries: Sequence[Entry]) -> None:
        """Send entries whose message was lost, after storing what is gone of their media."""
        self._do(self._repairs, functools.partial(self._restore, entries))

    def send_same(self, chunk: Chunk, request: str) -> None:
        """Send the message of one of a chunk's requests again as it was."""
        self.soon(functools.partial(self._outgoing.send_same, chunk, request))

    def soon(self, call: Callable[[], None]) -> None:
        """Run `call`, which may run again, in the background; a server that is away is waited for."""
        self._do(self._repairs, functools.partial(self._patience.insist, call))

    def send_sealed(self, entries: Sequence[Entry]) -> None:
        """Send groups that this or another rank has completed, unless they are answered or another rank sent them."""
        self._do(self._repairs, functools.partial(self._pass_on_sealed, entries))

    @contextlib.contextmanager
    def hurry(self, releases: Iterable[Place] = ()) -> Iterator[None]:
        """Meanwhile chunks go although they are not full; of the steps in `releases` also what `async_reward: false`
        holds, and groups of unknown size."""
        releases = list(releases)
        with self._hurrying:
            self._num_hurries += 1
            self._releases.update(releases)
        self._ready.put([])
        try:
            yield
        finally:
            with self._hurrying:
                self._num_hurries -= 1
                self._releases -= Counter(releases)

    def close(self) -> None:
        """End the threads; what is not sent stays unsent."""
        self._patience.end()
        for _ in range(self._settings.sender_threads):
            self._jobs.put(None)
        self._repairs.put(None)
        self._ready.put(None)
        for thread in self._threads:
            thread.join(timeout=5.0)

    # --- encoding threads ------------------------------------------------------------------------

    def _work(self, jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (job := jobs.get()) is not None and not self._patience.is_ended:
            job()
            with self._hurrying:
                self._num_jobs -= 1
            self._ready.put([])

    def _do(
        self, jobs: queue.SimpleQueue[Callable[[], None] | None], job: Callable[[], Any]
    ) -> None:
        with self._hurrying:
            self._num_jobs += 1
        jobs.put(job)

    def _encode_slot(self, slot: Slot) -> None:
        """Encode a sample, find what is answered already, store its media for the rest, and pass that on."""
        new: list[Entry] = []
        sample = slot.sample
        if sample is not None:  # else abandoned meanwhile
            started = time.perf_counter()
            try:
                encoded = encode(slot)
            except InvalidSampleError as error:
                failure = Failure(kind="invalid", message=str(error))
                self._board.fail(slot, failure)
                self._join_groups(slot, sample, {}, [], failure)
            else:
                new = self._board.join(
                    slot, sample, self._wanted(slot, sample, encoded)
                )
                self.times.add("encode_s", started)
                new = self._without_answered(new)
                self._uploads.store(slot, encoded, new)
                carried = self._join_groups(slot, sample, encoded, new, None)
                new = [e for e in new if e not in carried]
        self._pass_on(new, num_encoded=1)

    def _pass_on(self, new: list[Entry], num_encoded: int = 0) -> None:
        """To the sending thread."""
        self._board.count_unsent(len(new) - num_encoded)
        self._ready.put(new)

    def _join_groups(
        self,
        slot: Slot,
        sample: Sample,
        encoded: Mapping[str, Encoded],
        new: Sequence[Entry],
        failure: Failure | None,
    ) -> set[Entry]:
        """Put a sample into the groups of its groupwise rewards; returns those of its new entries that they carry."""
        carried: set[Entry] = set()
        for spec in (s for s in slot.rewards if s.is_groupwise):
            key, address = self._key_and_address(
                slot, sample, encoded, spec.part, is_fit=failure is None
            )
            holder = Entry(address="", spec=spec.part)
            self._uploads.store(slot, encoded, [holder])
            own = (
                [e for e in new if e.address == address]
                if self._groups.may_carry and spec.how == "rank"
                else []
            )
            own = [e for e in own if e not in carried and e.spec.async_reward]
            carried.update(own)
            request = SampleRequest(
                address=address,
                prompt=sample.prompt,
                media=holder.media,
                failure=failure,
                **beside(sample, spec).as_fields(),
            )
            self._pass_on_sealed(
                self._patience.insist(
                    functools.partial(
                        self._groups.add, spec, Member(slot, key, request, holder, own)
                    )
                )
            )
        return carried

    def _pass_on_sealed(self, entries: Sequence[Entry]) -> None:
        """Groups that are complete go on, unless their outcome is there or another rank sent them."""
        if entries:
            left = self._without_answered(entries)
            for entry in left:
                self._ask_for_next_attempts(entry)
            self._board.watch(
                [e for e in left if e.sent_number], self._settings.reconcile_s
            )
            self._pass_on([e for e in left if not e.sent_number])

    def _ask_for_next_attempts(self, group: Entry) -> None:
        """Parts that failed before are tried again with the group."""
        for name in ("members", "comparisons"):
            parts = getattr(group, name)
            found = self._patience.insist(
                functools.partial(self._outcomes.look_up, [p.address for p in parts])
            )
            setattr(
                group,
                name,
                tuple(
                    p.model_copy(update={"attempt": o.attempt + 1})
                    if o is not None and not o.is_final
                    else p
                    for p, o in zip(parts, found, strict=True)
                ),
            )

    def _key_and_address(
        self,
        slot: Slot,
        sample: Sample,
        encoded: Mapping[str, Encoded],
        spec: RewardSpec,
        *,
        is_fit: bool = True,
    ) -> tuple[str, str]:
        """The key of a sample for a reward, and where its outcome goes. One that is not fit is like no other."""
        digests = {name: e.identity() for name, e in encoded.items()}
        place = (
            (slot.split, slot.step, self._rank, slot.index)
            if spec.counts_slot or not is_fit
            else ()
        )
        key = sample_key(
            sample.prompt, digests, sample.metadata, place, identity_of(sample, spec)
        )
        return key, outcomes.address(self._run, spec.fingerprint, key)

    def _wanted(
        self, slot: Slot, sample: Sample, encoded: Mapping[str, Encoded]
    ) -> dict[str, tuple[RewardSpec, str]]:
        """The address of this sample's outcome for each pointwise reward."""
        return {
            spec.name: (spec, self._key_and_address(slot, sample, encoded, spec)[1])
            for spec in slot.rewards
            if not spec.is_groupwise
        }

    def _without_answered(self, entries: Sequence[Entry]) -> list[Entry]:
        """Take the rewards that are there already; ask for another attempt where a failure is, but for one that other
        ranks have asked for."""
        found = self._patience.insist(
            lambda: self._outcomes.look_up([e.address for e in entries])
        )
        hits = {}
        for entry, outcome in zip(entries, found, strict=True):
            is_final = outcome is not None and outcome.is_final
            if outcome is not None and not is_final:
                entry.attempt = outcome.attempt + 1
            if entry.group_key and not is_final and self._board.is_wanted(entry):
                self._patience.insist(functools.partial(self._groups.ask, entry))
            if outcome is not None and (is_final or outcome.attempt >= entry.attempt):
                hits[entry] = outcome
        self._board.answer(hits, is_hit=True)
        return [e for e in entries if e not in hits]

    def _restore(self, entries: Sequence[Entry]) -> None:
        """Bring back what is gone of the media of entries that are to be sent again."""
        entries = [e for e in entries if self._board.is_wanted(e)]
        names = list(dict.fromkeys(p.name for e in entries for p in e.payloads))
        gone = set(
            self._patience.insist(
                lambda: self._store.renew(names, self._settings.payload_ttl_s)
            )
        )
        self._pass_on(
            [
                e
                for e in entries
                if self._uploads.bring_back(
                    e, {p.digest: p.name for p in e.payloads if p.name in gone}
                )
            ]
        )

    # --- the sending thread ----------------------------------------------------------------------

    def _send_loop(self) -> None:
        try:
            while True:
                try:
                    new = self._ready.get(
                        timeout=IDLE_S if self._filling or self._releases else None
                    )
                except queue.Empty:
                    new = []
                    is_idle = True
                else:
                    is_idle = False
                if new is None or self._patience.is_ended:
                    return
                self._fill(new)
                may_hurry, released = self._may_hurry()
                if may_hurry and released:
                    self._release_groups(released)
                self._send(
                    self._take_chunks(released, all_of_them=is_idle or may_hurry)
                )
        finally:
            self._outgoing.disconnect()

    def _may_hurry(self) -> tuple[bool, set[Place]]:
        """Whether someone waits, and nothing is being encoded that could still fill a chunk; and the steps released."""
        with self._hurrying:
            return (
                self._num_hurries > 0 and self._num_jobs == 0 and self._ready.empty(),
                set(self._releases),
            )

    def _release_groups(self, released: set[Place]) -> None:
        """Someone waits in `collect()`: seal groups of unknown size; let go what waits for one that does not fill."""
        self._pass_on_sealed(self._groups.release(released))
        overdue = self._groups.take_overdue()
        if overdue:
            self._pass_on(overdue)

    def _fill(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            slot = entry.slots[0] if entry.slots else None
            if slot is None:  # abandoned
                self._board.count_unsent(-1)
                continue
            by_itself = id(entry) if entry.members else 0
            key = (
                entry.spec.fingerprint,
                slot.split,
                slot.step,
                by_itself,
                entry.spec.async_reward,
            )
            self._filling.setdefault(key, []).append(entry)
            if not entry.spec.async_reward:
                self._board.count_unsent(
                    -1
                )  # held until collect(), which nobody waits for before

    def _take_chunks(
        self, released: set[Place], *, all_of_them: bool
    ) -> list[list[Entry]]:
        """Full chunks, and the others too if `all_of_them`; what `async_reward: false` holds goes once its step, or
        that of another slot that needs the same, is released."""
        taken = []
        for key, filled in list(self._filling.items()):
            is_held = not key[-1]
            if is_held and not released:
                continue
            wanted = [e for e in filled if self._board.is_wanted(e)]
            if not is_held and len(wanted) < len(filled):
                self._board.count_unsent(len(wanted) - len(filled))
            due = [
                e
                for e in wanted
                if not is_held or any(s.place in released for s in list(e.slots))
            ]
            left = _without(wanted, due)
            size = 1 if not due or due[0].members else due[0].spec.batch_size
            while len(due) >= size or (due and all_of_them):
                taken.append(due[:size])
                del due[:size]
            self._filling[key] = left + due
            if not self._filling[key]:
                del self._filling[key]
        return taken

    def _send(self, chunks: Sequence[list[Entry]]) -> None:
        if not chunks:
            return
        started = time.perf_counter()
        num_counted = sum(e.spec.async_reward for c in chunks for e in c)
        with_carried = [
            [*c, *(e for e in c[0].carried if self._board.is_wanted(e))]
            for c in chunks
            if c
        ]
        self._patience.insist(lambda: self._send_once(with_carried))
        self._board.count_unsent(-num_counted)
        self.times.add("send_s", started)

    def _send_once(self, chunks: Sequence[Sequence[Entry]]) -> None:
        for chunk in self._outgoing.send(chunks):
            self._groups.tell_number(chunk)

    # --- both ------------------------------------------------------------------------------------

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except EndedError:
            return
        except (
            BaseException
        ) as error:  # a bug of ours must end every wait, not only this thread
            log.exception("a sender's thread ended")
            self._board.break_with(error)


def _without(entries: Sequence[Entry], taken: Sequence[Entry]) -> list[Entry]:
    gone = set(taken)
    return [e for e in entries if e not in gone]
