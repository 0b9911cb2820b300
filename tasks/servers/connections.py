"""Connections to Redis: timeouts that let no call hang, and retries that end at a deadline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import redis
from redis.connection import DefaultParser, PythonRespSerializer, parse_url
from redis.exceptions import ClusterDownError, TryAgainError
from redis.sentinel import MasterNotFoundError, Sentinel

from tasks.errors import EvictionError, RedisUnreachableError
from tasks.masking import without_password
from tasks.redis_urls import several_urls
from tasks.servers.large_replies import READ_BYTES, LargeReplies, Memory
from tasks.settings import Sentinels

SOCKET_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
HEALTH_CHECK_S = 10
SENTINEL_PORT = 26379

JOINED_BYTES = 6000
"""Parts of a command up to this size are put together before they are sent, as in redis-py."""


class NoReplicasError(redis.ResponseError):
    """Too few replicas follow a server with `min-replicas-to-write`: usual for seconds after a failover."""


class DiskError(redis.ResponseError):
    """A server cannot save to its disk, and takes no writes until it can."""


class BusyScriptError(redis.ResponseError):
    """A server runs somebody's script, for longer than its `busy-reply-threshold`."""


class NoQueueError(redis.ConnectionError):
    """The key of a queue has a value of another type: nothing can be put there or taken until somebody deletes it."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"the key {key!r} in the Redis for queues is no list, so that no message can be put there or taken; "
            "another program has written it: delete it"
        )


def is_wrong_type(error: BaseException) -> bool:
    """Whether a server refused a command since the key has a value of another type."""
    return "wrong kind of value" in str(error) or "WRONGTYPE" in str(error)


# These refusals pass by themselves, but redis-py raises a plain ResponseError for them, as for a bug of ours. All its
# parsers, in Celery's connections too, look the first word of a reply up in this one dict.
_CLASSES: dict[str, Any] = DefaultParser.EXCEPTION_CLASSES
for _code, _class in (
    ("NOREPLICAS", NoReplicasError),
    ("MISCONF", DiskError),
    ("BUSY", BusyScriptError),
):
    _CLASSES.setdefault(_code, _class)

FULL = (
    "Redis is full: it has reached its maxmemory and refuses to write; give it more, or make room "
    "(payloads belong on a server of their own: REWARDQ_PAYLOAD_URL)"
)

WHY_REFUSED: dict[type[Exception], str] = {
    redis.OutOfMemoryError: FULL,
    _CLASSES["NOREPLICAS"]: (
        "Redis refuses to write: fewer replicas follow it than its min-replicas-to-write asks for; it will take writes "
        "once they do"
    ),
    _CLASSES["MISCONF"]: (
        "Redis refuses to write: it cannot save to its disk; make room there (its log says more), or set "
        "`stop-writes-on-bgsave-error no`"
    ),
    _CLASSES[
        "BUSY"
    ]: "Redis is busy: it runs a script, and answers nothing else until that has ended",
}
"""By the error with which a server refuses for now: why, in words."""

REFUSED: tuple[type[Exception], ...] = tuple(WHY_REFUSED)

LOST: tuple[type[Exception], ...] = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.BusyLoadingError,
    redis.ReadOnlyError,
    ClusterDownError,
    TryAgainError,
    *REFUSED,
    ConnectionError,
    TimeoutError,
)
"""Errors of a server that is away, on its way back, full, or refuses for now. A retry helps."""

SERVES_NOT_NOW: tuple[type[Exception], ...] = (
    redis.ReadOnlyError,
    redis.BusyLoadingError,
    *REFUSED,
)
"""The errors among `LOST` with which a server answers: it is there."""

READ_ONLY = "it is a replica and takes no writes; right after a failover that passes, else the URL must name its master"

MAX_CLIENTS = (
    "it has as many clients as its `maxclients` allows; raise that, or end some"
)

NEARLY = 0.99
"""Share of its maxmemory from which a server may refuse a write."""

DEFAULT_VALUE_BYTES = 512 * 2**20
"""`proto-max-bulk-len` of a server whose configuration does not give another."""

DEFAULT_SENTINELS = Sentinels()


def connect(
    url: str, sentinels: Sentinels = DEFAULT_SENTINELS, **options: Any
) -> redis.Redis:
    """A client (a pool of connections, made at first use; safe between threads and after a fork).

    Args:
        url: `redis://`, `rediss://`, or `sentinel://host:26379/0;sentinel://...` with the server's user and password.
        sentinels: How these are asked.
        options: Of its connections.
    """
    options = {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_S,
        **options,
    }
    if url.startswith("sentinel://"):
        return _connect_by_sentinels(url, sentinels, options)
    client: redis.Redis = redis.Redis.from_url(url, **options)
    return client


def _connect_by_sentinels(
    url: str, sentinels: Sentinels, options: dict[str, Any]
) -> redis.Redis:
    """A client of the server that the sentinels of these URLs name; the first URL has its account and database."""
    given: list[dict[str, Any]] = []
    for one in several_urls(url):
        as_redis = one.replace("sentinel://", "redis://", 1)
        given.append(parse_url(as_redis))  # type: ignore[no-untyped-call]

    addresses = [
        (one.get("host", "localhost"), one.get("port", SENTINEL_PORT)) for one in given
    ]
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        addresses, sentinel_kwargs=for_sentinels(sentinels)
    )
    for name in ("db", "username", "password"):
        if name in given[0]:
            options[name] = given[0][name]
    master: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
        sentinels.master, **options
    )
    return master


SENTINEL_TIMEOUT_S = 1.0
"""A sentinel that is silent for so long is passed over. While the first sentinel hangs, each new connection waits so
long."""


class HiddenOptions(Mapping[str, Any]):
    """Options that no text of them shows: kombu and Celery hand all that a connection was given to whoever asks."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)

    def __getitem__(self, name: str) -> Any:
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

    def __repr__(self) -> str:
        return f"HiddenOptions({', '.join(self._options)})"


def for_sentinels(sentinels: Sentinels) -> HiddenOptions:
    """Options of connections to the sentinels themselves: a sentinel that is away or hangs is passed over at once.

    (redis-py would ask each ten times: seconds for every new connection while the first sentinel is down.)
    """
    account = {"password": sentinels.password} if sentinels.password else {}
    bounds = {
        "socket_timeout": SENTINEL_TIMEOUT_S,
        "socket_connect_timeout": SENTINEL_TIMEOUT_S,
    }
    return HiddenOptions({**bounds, "retry": None, **account})


def connect_for_media(
    url: str, sentinels: Sentinels = DEFAULT_SENTINELS, memory: Memory = bytearray
) -> redis.Redis:
    """As `connect`, for values of megabytes: a buffer is sent from where it lies, and read to where it stays.

    redis-py with hiredis copies a value twice to send it; its other packer, written in Python, does not.

    Args:
        url, sentinels: As for `connect`.
        memory: Gives the buffers that large values are read into.
    """
    packer = PythonRespSerializer(JOINED_BYTES, _encode)
    return connect(
        url,
        sentinels,
        command_packer=packer,
        parser_class=partial(LargeReplies, memory=memory),
        protocol=2,
        socket_read_size=READ_BYTES,
    )


def _encode(value: bytes | memoryview | str | int) -> bytes | memoryview:
    return value if isinstance(value, bytes | memoryview) else str(value).encode()


def check_reachable(client: Any, url: str, role: str) -> None:
    """Ask the server for a sign of life.

    Raises:
        RedisUnreachableError: Says the URL without its password, the role of this server, and what to start.
    """
    try:
        client.ping()
    except redis.AuthenticationError as error:
        raise RedisUnreachableError(
            f"{role} at {without_password(url)} refuses this user: {error}"
        ) from None
    except REFUSED as error:  # MISCONF refuses a PING as well
        raise RedisUnreachableError(
            f"{role} at {without_password(url)}: {why_away(error)}"
        ) from None
    except (redis.RedisError, OSError) as error:
        raise RedisUnreachableError(
            f"no {role} answers at {without_password(url)} ({error}); start one (redis-server, or `rewardq up "
            "rewards.yaml`) or point REWARDQ_BROKER_URL at the one you have"
        ) from None


def check_eviction(client: Any, url: str) -> None:
    """Refuse a server that drops keys when its memory is full: all of ours have a TTL, and are the first to go.

    Raises:
        EvictionError: Says the policy found, and the setting to change.
    """
    memory = _memory_of(client)
    policy = memory.get("maxmemory_policy", "noeviction")
    if memory.get("maxmemory", 0) and policy != "noeviction":
        raise EvictionError(
            f"the Redis at {without_password(url)} has maxmemory-policy {policy} and drops keys when it is full; "
            "set `maxmemory-policy noeviction` in its configuration (or `redis-cli config set maxmemory-policy "
            "noeviction`), so that senders wait instead"
        )


def is_nearly_full(client: Any) -> bool:
    """Whether a server is within a hundredth of its maxmemory, where it takes some writes and refuses others."""
    memory = _memory_of(client)
    most = memory.get("maxmemory", 0)
    return bool(most) and memory["used_memory"] > NEARLY * most


def maxmemory_of(client: Any) -> int | None:
    """Bytes that a server may hold; None if it has no bound of its own, or does not say."""
    return int(_memory_of(client).get("maxmemory", 0)) or None


def most_value_bytes(client: Any) -> int:
    """Bytes of the largest value that a server takes (`proto-max-bulk-len`); its default if this user may not ask.

    An ACL user is not to look into a server's configuration, and each try would be in the server's log.
    """
    if client.get_connection_kwargs().get("username"):
        return DEFAULT_VALUE_BYTES
    try:
        found = client.config_get("proto-max-bulk-len")
    except LOST:
        raise
    except redis.ResponseError:
        found = {}
    return int(found.get("proto-max-bulk-len", DEFAULT_VALUE_BYTES))


def _memory_of(client: Any) -> dict[str, Any]:
    """The section `memory` of a server's INFO; empty if this user may not ask."""
    try:
        memory: dict[str, Any] = client.info("memory")
    except LOST:
        raise
    except redis.ResponseError:
        return {}
    return memory


def why_away(error: BaseException) -> str:
    """What is wrong with a server, by its `error`: an error of `LOST`, or an error of Celery's with such a cause."""
    for cause in (error, error.__cause__, error.__context__):
        for kind, words in WHY_REFUSED.items():
            if isinstance(cause, kind):
                return words
    if isinstance(error, NoQueueError):
        return str(error)
    if isinstance(error, MasterNotFoundError):
        # Its text has all that redis-py knows of each sentinel, and at its end what each said last.
        return f"Redis is away: {str(error).partition(' : ')[0]}; what the sentinels said: {str(error)[-200:]}"
    if isinstance(error, redis.AuthenticationError):
        # The server served this user before: else the process would not have come so far.
        return f"Redis refuses this user now: {error}; is the user and password in REWARDQ_BROKER_URL still right?"
    if isinstance(error, redis.ReadOnlyError):
        return f"Redis is away: {READ_ONLY}"
    if "max number of clients reached" in str(error):
        return f"Redis is away: {MAX_CLIENTS}"
    return f"Redis is away: {error}"
