"""The broker: queues of messages by name, with two priorities; what a worker has taken is gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tasks.celery_app import PRIORITY_FIRST, PRIORITY_USUAL
from tests.simulation.network import Connection, Server
from tests.simulation.world import Process, Thread, World


@dataclass(frozen=True, slots=True)
class Chord:
    """Of a message of a chord's header: once all of them have been done, the body is sent."""

    name: str
    size: int
    body: Message


@dataclass(frozen=True, slots=True)
class Message:
    """A task's message."""

    task: str
    label: str
    queue: str
    request: str
    wire: int
    store: str
    number: int = 0
    priority: int = PRIORITY_USUAL
    num_returns: int = 0
    digest: str = ""
    chord: Chord | None = None


@dataclass(eq=False)
class _Waiting:
    """A worker's slot that waits for a message."""

    thread: Thread
    names: Sequence[str]
    message: Message | None = None
    is_disconnected: bool = False

    def __repr__(self) -> str:
        return "a slot"


@dataclass
class Queues:
    """What waits in a broker.

    Args:
        copies: How often a message that was published comes, and with which delays.
    """

    world: World
    server: Server
    copies: Callable[[Message], Sequence[float]] = lambda _message: (0.0,)
    _waiting: list[_Waiting] = field(default_factory=list)
    _messages: dict[tuple[str, int], deque[Message]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server.flushes.append(self._messages.clear)
        self.server.disconnects.append(self._disconnect)

    def publish(self, messages: Sequence[Message]) -> None:
        """Put messages into their queues."""
        for message in messages:
            delays = self.copies(message)
            if delays != (0.0,):
                self.world.say(self.world.current.process, "broker", message.request, "comes after", delays)
            for delay_s in delays:
                if delay_s:
                    self._put_later(message, delay_s)
                else:
                    self.put(message)

    def put(self, message: Message) -> None:
        """Put a message where a worker takes it: into the hands of the one that has waited longest, if one does."""
        for waiting in self._waiting:
            if message.queue in waiting.names and not waiting.thread.process.is_dead:
                self._waiting.remove(waiting)
                waiting.message = message
                self.world.wake(waiting.thread, self.world.now)
                return
        self._messages.setdefault((message.queue, message.priority), deque()).append(message)

    def num_waiting(self, queue: str) -> int:
        """How many messages wait in a queue."""
        return sum(len(self._messages.get((queue, priority), ())) for priority in (PRIORITY_FIRST, PRIORITY_USUAL))

    def take(self, connection: Connection, names: Sequence[str]) -> Message:
        """The next message of these queues, as BRPOP: waits for one. From then on it is in no queue.

        Raises:
            redis.ConnectionError: The connection was cut; a message may be lost.
        """
        waiting = _Waiting(self.world.current, names)
        try:
            message: Message | None = connection.call("pop", self._pop_or_wait, (names, waiting), {})
            if message is None:
                message = self._wait(connection, waiting)
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
        return message

    def _pop_or_wait(self, names: Sequence[str], waiting: _Waiting) -> Message | None:
        message = self._pop(names)
        if message is None:
            self._waiting.append(waiting)
        return message

    def _wait(self, connection: Connection, waiting: _Waiting) -> Message:
        while waiting.message is None and not waiting.is_disconnected:
            self.world.park(float("inf"))
        if waiting.is_disconnected:
            raise connection.lost("pop", "while it waited")
        # It travels to the worker: where that is cut off, it is lost.
        message: Message = connection.call("is given", lambda given: given, (waiting.message,), {})
        return message

    def _pop(self, names: Sequence[str]) -> Message | None:
        for priority in (PRIORITY_FIRST, PRIORITY_USUAL):
            for name in names:
                messages = self._messages.get((name, priority))
                if messages:
                    return messages.popleft()
        return None

    def leave(self, process: Process) -> None:
        """A process waits for messages no more."""
        for waiting in [w for w in self._waiting if w.thread.process is process]:
            self._waiting.remove(waiting)
            waiting.is_disconnected = True
            self.world.wake(waiting.thread, self.world.now)

    def _put_later(self, message: Message, delay_s: float) -> None:
        def put() -> None:
            self.world.sleep(delay_s)
            self.put(message)

        self.world.nobody.spawn(put, "late message")

    def _disconnect(self) -> None:
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.is_disconnected = True
            self.world.wake(one.thread, self.world.now)


@dataclass
class Chords:
    """In the result backend: how many messages of each chord's header are done (as Celery's backend counts them)."""

    counts: dict[str, int] = field(default_factory=dict)

    def begin(self, chords: Sequence[Chord]) -> None:
        """Chords are about to be sent."""
        for chord in chords:
            self.counts[chord.name] = 0

    def part_done(self, chord: Chord) -> bool:
        """Count a message of the header; whether it was the last."""
        self.counts[chord.name] = self.counts.get(chord.name, 0) + 1
        if self.counts[chord.name] < chord.size:
            return False
        del self.counts[chord.name]
        return True


def body_of(message: Message, request: str, num_returns: int) -> Message:
    """The body of a chord, as a worker sends it."""
    return replace(message, request=request, number=0, priority=PRIORITY_FIRST, num_returns=num_returns, chord=None)
