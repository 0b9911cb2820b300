"""What we need of a Redis, asked of it once when a process starts, instead of at the first failure hours later.

Each command is sent as trainers or workers will send it, to a key of its own that lives for seconds and has the wrong
type for most of them: a server that lets the command pass answers WRONGTYPE and has changed nothing.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from typing import Any, Literal

import redis
from redis.exceptions import NoPermissionError, NoScriptError

from tasks import keys
from tasks.errors import RedisRefusalError, RedisUnreachableError
from tasks.servers.connections import (
    LOST,
    REFUSED,
    SERVES_NOT_NOW,
    NoQueueError,
    check_eviction,
    connect,
    is_wrong_type,
    why_away,
)
from tasks.servers.refusals import (
    NO_TLS,
    ConfiguredRedis,
    cluster,
    knock,
    no_tls,
    servers_of,
    unknown_command,
    without_files,
    words_for,
    words_for_rights,
)
from tasks.settings import Sentinels, Settings

Side = Literal["trainer", "worker", "clean"]
"""Who asks; `rewardq clean` uses results only."""

PROBE_TTL_MS = 10_000

_SCRIPT = """
local time = redis.call('TIME')
redis.call('SET', KEYS[1], time[1], 'PX', ARGV[1])
return redis.call('EXISTS', KEYS[2])
"""
"""Reads the clock and writes, which a server older than 5 refuses, with two keys, which a cluster has on two
servers."""

_NO_SCRIPT = "0" * 40
"""No script has this hash."""

Commands = Sequence[tuple[Any, ...]]


def check_servers(settings: Settings, side: Side, queues: Sequence[str] = ()) -> None:
    """Ask every Redis of a configuration for what one side needs of it, for the queues that it uses.

    Raises:
        RedisRefusalError: One will not serve us; says the variable or the right that is missing, and what to write.
        RedisUnreachableError: One is away, or cannot serve for now.
        EvictionError: One drops keys when it is full.
    """
    for server in servers_of(settings):
        if side == "clean" and server.role != RESULTS:
            continue
        try:
            ask(server, settings.sentinels, side, queues)
        except RedisRefusalError:  # a ConnectionError too, as those of LOST are
            raise
        except LOST as error:
            raise RedisUnreachableError(_unreachable(server, error)) from None


def ask(
    server: ConfiguredRedis,
    sentinels: Sentinels,
    side: Side,
    queues: Sequence[str] = (),
) -> None:
    """Ask one server.

    Raises:
        RedisRefusalError: As for `check_servers`.
        EvictionError: It drops keys when it is full.
        LOST: It is away, full, cannot serve for now, or a queue's key is no list (any of
            `tasks.servers.connections.LOST`).
    """
    missing = without_files(server)
    if missing is not None:
        raise RedisRefusalError(server.says(missing))
    # Asked before connecting: a TLS connection to a server without TLS would wait for half a minute.
    if server.url.startswith("rediss://") and knock(server) == NO_TLS:
        raise RedisRefusalError(server.says(no_tls(server)))
    with connect(server.url, sentinels) as client:
        try:
            _ask(client, server, side, queues)
        except (redis.RedisError, OSError) as error:
            words = words_for(error, server)
            if words is None:
                raise
            raise RedisRefusalError(server.says(words)) from None
        if side != "clean":
            check_eviction(client, server.url)


def _ask(
    client: Any, server: ConfiguredRedis, side: Side, queues: Sequence[str]
) -> None:
    name = f"{keys.PROBE}{secrets.token_hex(6)}"
    first, then = _COMMANDS[server.role](side, name)
    about, of_cluster, *answers = _answers(
        client, [("INFO", "server"), ("INFO", "cluster"), ("PING",), *first]
    )
    if isinstance(of_cluster, dict) and of_cluster.get("cluster_enabled"):
        raise RedisRefusalError(server.says(cluster(server)))

    # A worker only reads payloads, as a rule: a store that is full serves it.
    may_be_full = server.role == PAYLOADS and side == "worker"
    errors = _errors_among(answers, may_be_full)
    # Only if the first commands made their keys: the others would find no type to be refused by, and write for good.
    if not errors:
        errors = _errors_among(_answers(client, then), may_be_full)
    if server.role == QUEUES:
        errors += _errors_of_queues(client, queues)
    if server.role == QUEUES and side == "worker":
        errors += _errors_of_channels(client, server)
    version = about.get("redis_version", "") if isinstance(about, dict) else ""
    _raise_worst(errors, server, str(version))


def _errors_of_queues(client: Any, queues: Sequence[str]) -> list[Exception]:
    """What is wrong with the queues' own keys: a user may be allowed some names of keys only.

    Raises:
        NoQueueError: One is no list; somebody else has written it.
    """
    names: list[str] = []
    for queue in queues:
        names += keys.queue_lists(queue)
    answers = _answers(client, [("LLEN", name) for name in names])
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, Exception) and is_wrong_type(answer):
            raise NoQueueError(name)
    return _errors_among(answers, may_be_full=False)


def _answers(client: Any, commands: Commands) -> list[Any]:
    """The server's answers to these commands, errors among them, in one round trip."""
    with client.pipeline(transaction=False) as pipe:
        for command in commands:
            pipe.execute_command(*command)
        answers: list[Any] = pipe.execute(raise_on_error=False)
    for command, answer in zip(commands, answers, strict=True):
        if isinstance(answer, Exception):
            answer.add_note(str(command[0]))
    return answers


def _errors_among(answers: Sequence[Any], may_be_full: bool) -> list[Exception]:
    """The errors that matter: not those that say that a command was let pass, or would be at another time."""
    harmless_now = REFUSED if may_be_full else ()
    errors: list[Exception] = []
    for answer in answers:
        is_error = isinstance(answer, Exception) and not _is_harmless(answer)
        if is_error and not isinstance(answer, harmless_now):
            errors.append(answer)
    return errors


def _raise_worst(
    errors: Sequence[Exception], server: ConfiguredRedis, version: str
) -> None:
    """Raise the worst error: rights that are missing first, then outages that may pass, then all other refusals."""
    rights = [error for error in errors if isinstance(error, NoPermissionError)]
    if rights:
        raise RedisRefusalError(server.says(words_for_rights(rights, server)))
    for error in errors:
        if isinstance(error, LOST):
            raise error
    if errors:
        raise RedisRefusalError(server.says(_words_for_first(errors, server, version)))


def _words_for_first(
    errors: Sequence[Exception], server: ConfiguredRedis, version: str
) -> str:
    error = errors[0]
    if "unknown" in str(error).lower():
        return unknown_command(_command_in(str(error)), version)
    words = words_for(error, server)
    return words or f"it answers {str(error)!r} to {', '.join(error.__notes__)}"


def _command_in(said: str) -> str:
    quoted = said.split("'")
    if len(quoted) > 2 and "from script" not in said:
        return quoted[1].upper()
    return "a command of a script"


def _is_harmless(error: Exception) -> bool:
    return is_wrong_type(error) or isinstance(error, NoScriptError)


QUEUES, RESULTS, PAYLOADS = (
    "Redis for queues",
    "Redis for results",
    "Redis for payloads",
)


_TOGETHER: Commands = [("MULTI",), ("EXEC",)]


def _scripts(name: str) -> Commands:
    return [
        ("EVAL", _SCRIPT, 2, name, f"{name}.other", PROBE_TTL_MS),
        ("EVALSHA", _NO_SCRIPT, 0),
        ("SCRIPT", "LOAD", "return 1"),
        ("SCRIPT", "EXISTS", _NO_SCRIPT),
    ]


def _for_queues(side: Side, name: str) -> tuple[Commands, Commands]:
    """The commands that kombu sends: queues are lists, bindings sets; scripts of a worker keep their deadlines."""
    binding = f"{keys.BROKER}_kombu.binding.{name}"
    first = [
        ("SET", name, "1", "PX", PROBE_TTL_MS),
        ("SET", binding, "1", "PX", PROBE_TTL_MS),
    ]
    both = [("LPUSH", name, "1"), ("LLEN", name), ("SADD", binding, "1"), *_TOGETHER]
    if side == "trainer":
        return first, both
    return first, [
        *both,
        ("BRPOP", name, 1),
        ("SREM", binding, "1"),
        ("ZADD", name, "GT", 1, "1"),
        ("DEL", binding),
        ("LLEN", f"{keys.BROKER}{name.removeprefix(keys.PROBE)}.reply.celery.pidbox"),
        *_scripts(name),
    ]


def _for_results(side: Side, name: str) -> tuple[Commands, Commands]:
    """The commands for outcomes, claims, groups and the registry of a run; our scripts call some of them."""
    other = f"{name}.other"
    if side == "clean":  # it makes no key, not even for a moment
        return [], [
            ("SCAN", 0, "MATCH", name, "COUNT", 1),
            ("MGET", name, other),
            ("HGETALL", name),
            ("HDEL", name, "1"),
            ("UNLINK", name, other),
        ]
    first = [("SET", name, "1", "PX", PROBE_TTL_MS)]
    both = [
        ("MGET", name, other),
        ("GETRANGE", name, 0, 1),
        ("EXISTS", other),
        ("DEL", other),
        ("PEXPIRE", name, PROBE_TTL_MS),
        ("HGET", name, "1"),
        ("HSET", name, "1", "1"),
        ("HSETNX", name, "1", "1"),
        ("HDEL", name, "1"),
        ("HINCRBY", name, "1", 1),
        ("ZADD", name, 1, "1"),
        ("ZREM", name, "1"),
        ("ZREMRANGEBYSCORE", name, 0, 0),
        ("TIME",),
        ("GET", f"{keys.ROOT}celery-taskset-meta-{name}"),
        *_scripts(name),
    ]
    if side == "worker":
        return first, [
            *both,
            ("ZSCORE", name, "1"),
            ("ZCARD", name),
        ]
    return first, [
        *both,
        ("HGETALL", name),
        ("HKEYS", name),
        ("HMGET", name, "1"),
        ("ZRANGEBYSCORE", name, 0, 0),
        ("ZREVRANGE", name, 0, 0),
        ("INCRBY", name, 0),
        ("PTTL", name),
        ("UNLINK", other),
        *_TOGETHER,
    ]


def _for_payloads(_side: Side, name: str) -> tuple[Commands, Commands]:
    """The commands for media and their ledger. A worker needs them too: it drops media that arrive damaged."""
    other = f"{name}.other"
    return [("SET", name, "1", "PX", PROBE_TTL_MS)], [
        ("GET", name),
        ("STRLEN", name),
        ("EXISTS", other),
        ("DEL", other),
        ("PEXPIRE", name, PROBE_TTL_MS),
        ("PTTL", name),
        ("ZADD", name, 1, "1"),
        ("ZREM", name, "1"),
        ("ZRANGEBYSCORE", name, 0, 0),
        ("INCRBY", name, 0),
        ("DECRBY", name, 0),
        ("EVAL", _SCRIPT, 2, name, other, PROBE_TTL_MS),
        ("UNLINK", name),
    ]


_COMMANDS = {QUEUES: _for_queues, RESULTS: _for_results, PAYLOADS: _for_payloads}
"""By role: the commands that are sent first, and the commands that are sent once the first have made their keys."""


def _errors_of_channels(client: Any, server: ConfiguredRedis) -> list[Exception]:
    """A worker's missing rights to channels, asked with the names that Celery uses; listeners are sent nothing."""
    prefix = f"{keys.BROKER}/{server.database}."
    names = [f"{prefix}celery.pidbox", f"{prefix}celeryev/worker.*"]
    errors: list[Exception] = []
    with contextlib.closing(client.pubsub(ignore_subscribe_messages=False)) as channels:
        for ask_for, command in (
            (channels.psubscribe, "PSUBSCRIBE"),
            (channels.punsubscribe, "PUNSUBSCRIBE"),
        ):
            try:
                ask_for(*names)
                for _ in names:
                    channels.get_message(timeout=CHANNEL_TIMEOUT_S)
            except redis.ResponseError as error:
                error.add_note(command)
                errors.append(error)
    try:
        client.publish(f"{prefix}{keys.PROBE}", b"")
    except redis.ResponseError as error:
        # This channel is ours alone, and need not be allowed.
        if "channel" not in str(error):
            error.add_note("PUBLISH")
            errors.append(error)
    return errors


CHANNEL_TIMEOUT_S = 5.0
"""How long a server may take to confirm a subscription."""


def _unreachable(server: ConfiguredRedis, error: BaseException) -> str:
    if isinstance(
        error, (NoQueueError, *SERVES_NOT_NOW)
    ) or "max number of clients" in str(error):
        return server.says(why_away(error))
    return (
        f"no {server.role} answers at {server.shown} ({error}); start one (redis-server, or `rewardq up rewards.yaml`) "
        f"or point {server.variable} at the one you have"
    )
