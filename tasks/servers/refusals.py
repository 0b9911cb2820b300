"""Why a server will not serve us, in words: what is missing, and which variable or right to set.

Only refusals that waiting does not mend. `tasks.servers.connections` has the words for a server that is away, full or
on its way back.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
from redis.exceptions import (
    ClusterCrossSlotError,
    InvalidResponse,
    MovedError,
    NoPermissionError,
)

from tasks import keys
from tasks.masking import without_password
from tasks.redis_urls import several_urls
from tasks.servers.connections import SERVES_NOT_NOW
from tasks.settings import Settings

OLDEST = "6.2"
"""Redis that Celery's queues need: kombu's scripts say `ZADD ... GT`."""

KNOCK_TIMEOUT_S = 3.0
"""How long a port may take to say what it speaks."""

NO_TLS, TLS, WEB = "no TLS", "TLS", "HTTP"


@dataclass(frozen=True, slots=True)
class ConfiguredRedis:
    """One Redis of a configuration."""

    role: str
    """Its purpose, as errors name it: `Redis for queues`."""
    variable: str
    """The variable that names it."""
    url: str
    is_next_database: bool = False
    """The variable is not set: it is the broker's server, and the next database there."""

    @property
    def shown(self) -> str:
        """Its URL without the password."""
        return without_password(self.url)

    @property
    def parts(self) -> SplitResult:
        """Of its URL; of the first where sentinels have several, which has the account and the database."""
        return urlsplit(several_urls(self.url)[0])

    @property
    def user(self) -> str:
        """The ACL user."""
        return unquote(self.parts.username or "default")

    @property
    def database(self) -> int:
        """Its number."""
        return int(self.parts.path.strip("/") or 0)

    def says(self, words: str) -> str:
        """One line on this server."""
        return f"{self.role} at {self.shown} ({self.variable}): {words}"


def servers_of(settings: Settings) -> list[ConfiguredRedis]:
    """The Redis servers that `settings` names. A server that has two roles is listed twice."""
    results_by = "REWARDQ_RESULT_URL" if settings.result_url else "REWARDQ_BROKER_URL"
    servers = [
        ConfiguredRedis("Redis for queues", "REWARDQ_BROKER_URL", settings.broker),
        ConfiguredRedis("Redis for results", results_by, settings.results),
    ]
    if not settings.payloads.startswith("file:"):
        payloads = ConfiguredRedis(
            "Redis for payloads",
            "REWARDQ_PAYLOAD_URL",
            settings.payloads,
            is_next_database=not settings.payload_url,
        )
        servers.append(payloads)
    return servers


def words_for(error: BaseException, server: ConfiguredRedis) -> str | None:
    """Why this server will not serve us, and what to set; None for what waiting may mend."""
    if isinstance(error, redis.AuthenticationError):
        return _wrong_user(str(error), server)
    if isinstance(error, NoPermissionError):
        return words_for_rights([error], server)
    if isinstance(error, MovedError | ClusterCrossSlotError):
        return cluster(server)
    if isinstance(error, InvalidResponse):
        return _no_redis(server)
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return _other_language(str(error), server)
    if isinstance(error, redis.ResponseError):
        return _refused_in_general(str(error), server)
    return None


def may_be_for_good(error: BaseException) -> bool:
    """Whether an error says that a server that served us refuses for good: its user, its rights, its commands.

    Redis answers with many errors, errors of scripts among them: this is a reason to ask it again, and no more.
    """
    if isinstance(error, SERVES_NOT_NOW):
        return False
    return isinstance(error, redis.AuthenticationError | redis.ResponseError)


def words_for_rights(errors: Iterable[BaseException], server: ConfiguredRedis) -> str:
    """Rights that the user lacks, all in one: commands, keys, channels, and the ACL rule that gives each."""
    said = [str(error) for error in errors]
    together = "; ".join(said)
    commands = _commands_refused(said)
    lacks: list[str] = []
    rules: list[str] = []
    if commands:
        lacks.append(f"run {', '.join(commands).upper()}")
        rules += [f"+{name}" for name in commands]
    if "channel" in together:
        lacks.append("use channels, by which Celery's workers hear of each other")
        rules.append("allchannels")
    if " key" in together:
        lacks.append(f"use the keys of rewardq, {keys.ROOT}*")
        rules.append(f"~{keys.ROOT}*")
    if not rules:
        return f"it refuses the user {server.user!r}: {together}"

    or_else = ""
    if "select" in commands and server.is_next_database:
        or_else = f", or set REWARDQ_PAYLOAD_URL={_same_database(server)}, the broker's own database"
    rule = f"`ACL SETUSER {server.user} {' '.join(rules)}`"
    return f"the user {server.user!r} may not {', nor '.join(lacks)}: {rule}{or_else}"


def _commands_refused(said: Iterable[str]) -> list[str]:
    """The commands that a server's answers name, sorted."""
    commands: set[str] = set()
    for text in said:
        found = re.search(r"run the '([\w|]+)' command", text)
        if found is not None:
            commands.add(found[1])
    return sorted(commands)


def cluster(server: ConfiguredRedis) -> str:
    """Of a server in cluster mode."""
    return (
        "it is in cluster mode, where Celery's queues and our scripts, which use several keys at once, cannot work; "
        f"point {server.variable} at a Redis with `cluster-enabled no` (sentinel:// where it must fail over)"
    )


def unknown_command(command: str, version: str) -> str:
    """Of a server that lacks a command, or knows it by another name."""
    return (
        f"it (version {version or 'unknown'}) does not know {command}: `rename-command` in its configuration has taken "
        f"it away, or it is older than {OLDEST}; give it back, or use Redis {OLDEST} or newer"
    )


def without_files(server: ConfiguredRedis) -> str | None:
    """A file of a certificate or key that the URL names and this host does not have."""
    for name, value in parse_qsl(urlsplit(server.url).query):
        is_file_name = name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
        if is_file_name and not Path(value).is_file():
            return f"{server.variable} names {name}={value}, and this host has no such file"
    return None


def _wrong_user(said: str, server: ConfiguredRedis) -> str:
    if "Authentication required" in said:
        advice = f"it wants a password; write it in {server.variable}, redis://:PASSWORD@host:6379/0 or user:PASSWORD@"
    elif server.user != "default" and not server.parts.password:
        advice = f"{server.variable} has a user and no password; a password without a user is redis://:PASSWORD@host"
    else:
        advice = (
            f"its password in {server.variable} is wrong (percent-encode / ? # @ % in it), or `ACL SETUSER` has not "
            f"set {server.user!r} on"
        )
    return f"it refuses this user: {said.rstrip('.')}; {advice}"


def _refused_in_general(said: str, server: ConfiguredRedis) -> str | None:
    if "DB index is out of range" in said:
        return _no_database(server)
    if "cluster mode" in said or "CROSSSLOT" in said:
        return cluster(server)
    if "protected mode" in said:
        return (
            "it is in protected mode and serves its own host only; give it a password (`requirepass`) and write that "
            f"in {server.variable}, or set `protected-mode no` where its network is closed"
        )
    if "unknown command" in said and "SENTINEL" in said.upper().partition(", with")[0]:
        return (
            "what answers there is a Redis itself and no sentinel, whose port is 26379 as a rule; name the sentinels "
            f"in {server.variable}, or write redis:// for this one"
        )
    unknown = re.search(r"unknown command '?`?\"?([\w|]+)", said, re.IGNORECASE)
    if unknown:
        return unknown_command(unknown[1].upper(), "")
    if "NOPROTO" in said or "non deterministic" in said:
        return f"it is older than {OLDEST}, which is needed: {said}"
    return None


def _no_database(server: ConfiguredRedis) -> str:
    number = server.database
    if server.is_next_database:
        return (
            f"it has no database {number}, the next after the broker's, where media go unless REWARDQ_PAYLOAD_URL is "
            f"set; set REWARDQ_PAYLOAD_URL={_same_database(server)} (the broker's own) or to another Redis, or start "
            f"this one with `databases {max(16, number + 1)}`"
        )
    return (
        f"it has no database {number}; name a lower one in {server.variable} (0 is always there), or start it with "
        f"`databases {max(16, number + 1)}`"
    )


def _same_database(server: ConfiguredRedis) -> str:
    """The broker's own URL, of a server that is its next database."""
    return urlsplit(server.shown)._replace(path=f"/{server.database - 1}").geturl()


def _no_redis(server: ConfiguredRedis) -> str:
    speaks = knock(server)
    if speaks == TLS:
        return _needs_tls(server)
    what = "a web server (HTTP)" if speaks == WEB else "another program"
    return f"what answers there is no Redis but {what}; {server.variable} needs the port of a Redis, 6379 as a rule"


def _other_language(said: str, server: ConfiguredRedis) -> str | None:
    if "CERTIFICATE_VERIFY_FAILED" in said:
        details = said.partition("certificate verify failed")[2]
        reason = details.partition("(_ssl")[0].strip(" :.")
        return (
            f"certificate verify failed: {reason or said}; name its authority in {server.variable}, "
            "?ssl_ca_certs=/path/ca.pem, and the host as the certificate does"
        )
    speaks = knock(server)
    is_tls = server.url.startswith("rediss://")
    if speaks == NO_TLS and is_tls:
        return no_tls(server)
    if speaks == TLS and not is_tls:
        return _needs_tls(server)
    return _no_redis(server) if speaks == WEB else None


def no_tls(server: ConfiguredRedis) -> str:
    """Of a server without TLS at a URL that wants it."""
    return f"it speaks without TLS, and the URL begins with rediss://; write redis:// in {server.variable}"


def _needs_tls(server: ConfiguredRedis) -> str:
    return (
        f"it wants TLS, and the URL begins with redis://; write rediss:// in {server.variable} (with "
        "?ssl_ca_certs=/path/ca.pem where its authority is your own)"
    )


def knock(server: ConfiguredRedis) -> str | None:
    """What a port speaks, by trying: a Redis without TLS, TLS, or HTTP; None if it says nothing that tells."""
    parts = urlsplit(server.url)
    if parts.scheme not in ("redis", "rediss"):
        return None
    address = (parts.hostname or "localhost", parts.port or 6379)
    attempts = [_speaks_plainly, _speaks_tls]
    if parts.scheme == "rediss":
        attempts.reverse()
    for speaks in attempts:
        try:
            found = speaks(address)
        except OSError:
            continue
        if found is not None:
            return found
    return None


def _speaks_tls(address: tuple[str, int]) -> str | None:
    """TLS, if a handshake succeeds. Whose certificate it is does not matter here: nothing is said over it."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(address, KNOCK_TIMEOUT_S) as plain,
        context.wrap_socket(plain),
    ):
        return TLS


def _speaks_plainly(address: tuple[str, int]) -> str | None:
    with socket.create_connection(address, KNOCK_TIMEOUT_S) as plain:
        plain.sendall(b"PING\r\n\r\n")
        answer = plain.recv(64)
    if answer.startswith((b"+", b"-")):
        return NO_TLS
    return WEB if b"HTTP" in answer or answer.lstrip().startswith(b"<") else None
