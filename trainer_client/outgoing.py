"""From entries to messages under way: requests in the payload store, task messages and chords in the queues."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kombu.exceptions import ChannelError

from tasks.celery_app import COMBINE, GROUP, PRIORITY_FIRST, PRIORITY_USUAL, SCORE
from tasks.messages import (
    WIRE_VERSION,
    GroupRequest,
    SampleRequest,
    ScoreRequest,
    pack,
)
from tasks.outcomes import ClientOutcomes
from tasks.payloads import PayloadStore
from tasks.rewards import RewardSpec
from tasks.settings import Settings
from trainer_client.board import Board, Chunk, Entry

MESSAGES_A_BATCH = 200
"""Messages handed to Redis in one transaction."""


@dataclass(slots=True)
class _Post:
    """One message to publish."""

    task: str
    label: str
    request: str
    queue: str
    number: int = 0
    header: list[_Post] = field(default_factory=list)
    """Of a chord's body: the messages before it."""


class Outgoing:
    """Sends chunks and groups. Calls may run again: a message sent twice is scored once."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        store: PayloadStore,
        results: ClientOutcomes,
        board: Board,
        run: str,
    ) -> None:
        self._app, self._settings, self._store, self._outcomes = (
            app,
            settings,
            store,
            results,
        )
        self._board, self._run = board, run
        self._lock = threading.Lock()
        self._connection: Any = None

    def send(self, chunks_of_entries: Sequence[Sequence[Entry]]) -> list[Chunk]:
        """Reserve numbers, store the requests, register the chunks on the board, publish.

        A group entry is a chunk of its own; entries after it are those of its parts that it carries.
        """
        now_ms = self._outcomes.now_ms()
        chunks = [self._chunk(entries) for entries in chunks_of_entries]
        posts, requests = [], {}
        for chunk in chunks:
            post, own_requests = self._post(chunk, now_ms)
            posts.append(post)
            requests.update(own_requests)
        self._number(chunks, posts)
        self._store.put(requests, self._settings.payload_ttl_s)
        self._board.send(chunks)
        self._publish(posts)
        return chunks

    def send_same(self, chunk: Chunk, request: str) -> None:
        """Publish the message of one of a chunk's requests again as it was; what was a chord goes as one task."""
        chunk.number = self._outcomes.number(chunk.spec.queue, 1)
        is_group = chunk.spec.how in ("rank", "wins") and request == chunk.request
        self._publish(
            [
                _Post(
                    GROUP if is_group else SCORE,
                    chunk.label,
                    request,
                    chunk.spec.queue,
                    chunk.number,
                )
            ]
        )

    def num_waiting(self, queue: str) -> int:
        """How many messages wait in a queue."""
        with self._lock:
            return num_in_queue(self._connect(), queue)

    def disconnect(self) -> None:
        """Give back the broker's connection; the next call makes a new one."""
        if self._connection is not None:
            self._connection.release()
            self._connection = None

    # --- requests --------------------------------------------------------------------------------

    def _chunk(self, entries: Sequence[Entry]) -> Chunk:
        first = entries[0]
        slot = first.slots[0] if first.slots else None
        place = (
            f", run {self._run} step {slot.step}"
            if slot is not None
            else f", run {self._run}"
        )
        now = time.monotonic()
        # One that is sent again keeps its grown pause.
        pause_s = max(
            (e.chunk.pause_s for e in entries if e.chunk),
            default=self._settings.reconcile_s,
        )
        num_samples = len(first.members) or len(entries)
        return Chunk(
            request=self._new_request(),
            label=f"{first.spec.reward_model.rpartition('.')[2]} x {num_samples}{place}",
            spec=first.spec,
            number=0,
            entries=list(entries),
            sent_at=now,
            look_at=now + self._settings.reconcile_s,
            pause_s=pause_s,
        )

    def _post(self, chunk: Chunk, now_ms: int) -> tuple[_Post, dict[str, bytes]]:
        """The message of a chunk, and the requests to store for it."""
        first, spec = chunk.entries[0], chunk.spec
        times = {
            "sent_ms": now_ms,
            "deadline_ms": now_ms + round(1000 * self._settings.result_ttl_s),
        }
        if spec.how in ("each", "model"):
            samples = tuple(sample_request(e) for e in chunk.entries)
            request = self._score_request(
                chunk.request, chunk.label, spec, samples, times
            )
            return _Post(SCORE, chunk.label, chunk.request, spec.queue), {
                chunk.request: pack(request)
            }
        group = GroupRequest(
            id=chunk.request,
            run=self._run,
            label=chunk.label,
            reward=spec.part.call,
            how="wins" if spec.how == "wins" else "rank",
            ties=spec.options.get("ties", "mean"),
            address=first.address,
            attempt=first.attempt,
            members=first.members,
            comparisons=first.comparisons,
            pairs=first.pairs,
            **times,
        )
        requests = {chunk.request: pack(group)}
        parts, size = group.parts, spec.batch_size
        if len(parts) <= size:
            return _Post(GROUP, chunk.label, chunk.request, spec.queue), requests
        body = _Post(COMBINE, chunk.label, chunk.request, spec.queue)
        for start in range(0, len(parts), size):
            own = parts[start : start + size]
            header = self._score_request(
                f"{chunk.request}.{start}",
                f"{spec.part.reward_model} x {len(own)} of {chunk.label}",
                spec.part,
                own,
                times,
            )
            requests[header.id] = pack(header)
            body.header.append(_Post(SCORE, header.label, header.id, spec.queue))
        chunk.more_requests = tuple(post.request for post in body.header)
        return body, requests

    def _score_request(
        self,
        name: str,
        label: str,
        spec: RewardSpec,
        samples: tuple[SampleRequest, ...],
        times: dict[str, int],
    ) -> ScoreRequest:
        return ScoreRequest(
            id=name,
            run=self._run,
            label=label,
            reward=spec.call,
            samples=samples,
            **times,
        )

    def _new_request(self) -> str:
        return self._board.new_name(f"request-{uuid.uuid4().hex[:8]}")

    def _number(self, chunks: Sequence[Chunk], posts: Sequence[_Post]) -> None:
        """Give every message its number; a chunk has that of its last message but the body."""
        for queue in {p.queue for p in posts}:
            own = [
                (c, p) for c, p in zip(chunks, posts, strict=True) if p.queue == queue
            ]
            number = self._outcomes.number(
                queue, sum(len(p.header) or 1 for _, p in own)
            )
            for chunk, post in own:
                for message in post.header or (post,):
                    message.number = chunk.number = number
                    number += 1

    # --- messages --------------------------------------------------------------------------------

    def _publish(self, posts: Sequence[_Post]) -> None:
        store_id = self._store.identity()
        with self._lock:
            try:
                producer = self._app.amqp.Producer(self._connect(), auto_declare=False)
                with producer.batch(MESSAGES_A_BATCH):
                    for post in posts:
                        if post.header:
                            self._publish_chord(producer, post, store_id)
                        else:
                            self._publish_one(producer, post, store_id)
            except BaseException:
                self.disconnect()
                raise

    def _connect(self) -> Any:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
        return self._connection

    def _publish_chord(self, producer: Any, body: _Post, store_id: str) -> None:
        """A Celery chord, put together by hand: `chord().apply_async()` leaves result objects behind, one for each
        header, that ask the result backend when they are collected. The body is immutable: what the header returns
        does not travel to it."""
        group_id = uuid.uuid4().hex
        args = [body.label, body.request, WIRE_VERSION, store_id]
        last = self._app.signature(
            body.task, args=args, immutable=True, queue=body.queue, priority=PRIORITY_FIRST, argsrepr=body.label,
            kwargsrepr="", ignore_result=True,
        )  # fmt: skip
        self._app.backend.set_chord_size(group_id, len(body.header))
        for index, post in enumerate(body.header):
            self._publish_one(
                producer,
                post,
                store_id,
                group_id=group_id,
                group_index=index,
                chord=dict(last),
            )

    def _publish_one(
        self, producer: Any, post: _Post, store_id: str, **options: Any
    ) -> None:
        self._app.send_task(
            post.task,
            args=[post.label, post.request, WIRE_VERSION, post.number, store_id],
            queue=post.queue,
            producer=producer,
            argsrepr=post.label,
            kwargsrepr="",
            priority=PRIORITY_USUAL,
            ignore_result=True,
            retry=False,
            **options,
        )


def num_in_queue(connection: Any, queue: str) -> int:
    """How many messages wait in a queue, by a connection to its broker."""
    try:
        declared = connection.default_channel.queue_declare(queue, passive=True)
    except ChannelError:  # no such list in Redis: the queue is empty
        return 0
    return int(declared.message_count)


def sample_request(entry: Entry) -> SampleRequest:
    """An entry as workers are told it; that of a group names its members."""
    return SampleRequest(
        address=entry.address,
        prompt=entry.prompt,
        media=entry.media,
        attempt=entry.attempt,
        members=entry.members,
        **(entry.beside.as_fields() if entry.beside is not None else {}),
    )
