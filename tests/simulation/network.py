"""The network between processes and servers. It delays and cuts; servers go away, refuse, hang, are emptied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.exceptions import ReadOnlyError

from tasks.servers.connections import SOCKET_TIMEOUT_S, DiskError, NoReplicasError
from tests.simulation.world import Process, World

SHORTEST_S, USUAL_S = 0.0002, 0.002
"""A call and its reply travel so long each, usually."""

CONNECT_S = 0.001
"""A server that is away is found to be so after this long."""

NEED_ROOM = frozenset(
    [
        "claim",
        "write",
        "start_alone",
        "take",
        "leave_note",
        "beat",
        "number",
        "check_room",
        "put",
        "register",
        "ask",
        "put_back",
        "set_number",
        "publish",
    ]
)
"""Calls that a server refuses while it takes no writes; it still answers, and still drops keys."""

ASK_NOTHING_OF_NOTHING = frozenset(
    {"extend", "write", "release", "look_up", "notes", "drop_notes", "claimed", "get", "free"}
)
"""Calls that the real classes do not make when they have nothing to ask for."""

REFUSALS: tuple[Exception, ...] = (
    redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
    ReadOnlyError("You can't write against a read only replica."),
    NoReplicasError("NOREPLICAS Not enough good replicas to write."),
    DiskError("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk."),
)


@dataclass
class Weather:
    """How bad the network is while faults are drawn. Shares of all calls."""

    until: float = 0.0
    cut_before: float = 0.0
    cut_after: float = 0.0
    slow: float = 0.0
    slow_s: float = 0.1
    message_lost: float = 0.0
    message_repeated: float = 0.0


@dataclass
class Server:
    """One Redis server, with what is kept there."""

    world: World
    name: str
    flushes: list[Callable[[], None]] = field(default_factory=list)
    disconnects: list[Callable[[], None]] = field(default_factory=list)
    away_until: float = 0.0
    hangs_until: float = 0.0
    refuses_until: float = 0.0
    refusal: Exception = REFUSALS[0]
    last_hit: float = -1.0
    """When it last was away, refused, or was emptied."""

    def go_away(self, seconds: float, is_emptied: bool) -> None:
        """It is restarted, or cannot be reached from anywhere."""
        self.away_until = max(self.away_until, self.world.now + seconds)
        for call in self.disconnects:
            call()
        if is_emptied:
            self.flush()

    def flush(self) -> None:
        """It is emptied."""
        self.last_hit = self.world.now
        for call in self.flushes:
            call()

    def hit_since(self, then: float) -> bool:
        """Whether a fault has hit it since `then`, or does now."""
        return max(self.last_hit, self.away_until, self.hangs_until, self.refuses_until) >= then


class Connection:
    """How one process reaches one server."""

    def __init__(self, process: Process, server: Server, weather: Weather) -> None:
        self.process, self.server, self._weather = process, server, weather
        self._world = process.world
        self._random = process.random

    def call(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the server do something for the thread that calls.

        Raises:
            redis.ConnectionError: The server could not be reached, or its reply was lost: then it may be done.
        """
        world, weather = self._world, self._weather
        is_bad = world.now < weather.until
        draw = self._random.random() if is_bad else 1.0
        world.sleep(self._travel_s(is_bad))
        if draw < weather.cut_before:
            raise self.lost(name, "before")
        self._wait_for_server(name)
        if self.server.refuses_until > world.now and name in NEED_ROOM:
            self.process.hit()
            raise self.server.refusal
        result = method(*args, **kwargs)
        if world.trace is not None:
            world.say(self.process, name, args, result)
        world.sleep(self._travel_s(is_bad))
        if weather.cut_before <= draw < weather.cut_before + weather.cut_after:
            raise self.lost(name, "after")
        return result

    def lost(self, name: str, when: str) -> Exception:
        """The error of a call that a fault has hit."""
        self.process.hit()
        self._world.say(self.process, "is cut off", name, when)
        return redis.ConnectionError("Connection closed by server.")

    def _wait_for_server(self, name: str) -> None:
        world, server = self._world, self.server
        if max(server.away_until, self.process.cut_off_until) > world.now:
            world.sleep(CONNECT_S)
            raise self.lost(name, "away")
        if server.hangs_until > world.now:
            answers_in_s = server.hangs_until - world.now
            world.sleep(min(SOCKET_TIMEOUT_S, answers_in_s))
            if answers_in_s > SOCKET_TIMEOUT_S:
                self.process.hit()
                raise redis.TimeoutError("Timeout reading from socket")

    def _travel_s(self, is_bad: bool) -> float:
        draw = self._random.random()
        if is_bad and draw < self._weather.slow:
            return self._weather.slow_s * self._random.random()
        return SHORTEST_S + USUAL_S * draw * draw


class Remote:
    """A server's object as a process sees it: the same methods, each a call over the network."""

    def __init__(self, target: Any, connection: Connection) -> None:
        self._target, self._connection = target, connection

    def __getattr__(self, name: str) -> Any:
        method, connection = getattr(self._target, name), self._connection

        def call(*args: Any, **kwargs: Any) -> Any:
            if name in ASK_NOTHING_OF_NOTHING and not args[0]:
                return method(*args, **kwargs)
            return connection.call(name, method, args, kwargs)

        setattr(self, name, call)
        return call
