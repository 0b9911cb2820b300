"""What trainers and workers must agree on, read once from `REWARDQ_*` variables."""

from __future__ import annotations

import grp
import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tasks.errors import SettingsError, nearest
from tasks.hosts import Origin, entries_of, may_be_asked, may_have_key, origin_of
from tasks.masking import SECRETS, passwords_in, without_password
from tasks.redis_urls import (
    has_known_scheme,
    tidied,
    what_is_wrong,
    with_account_in_front,
)

PREFIX = "REWARDQ_"
KEY_PREFIX = "REWARDQ_KEY_"
"""Variables of this prefix are API keys of judges; they are read by name on the worker, never here."""

OPENAI_KEY = "OPENAI_API_KEY"

_KEY_VARIABLE = re.compile(rf"{KEY_PREFIX}[A-Za-z0-9_]{{1,100}}")

_SERVICE_LINK = re.compile(
    r".*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO|START|END))?)"
)
"""Variables that Kubernetes (`enableServiceLinks`) and Docker (`--link`) set for a service whose name begins with
rewardq. Nobody wrote them."""

_DOCKER_LINK = re.compile(r".*_(ENV_\w+|NAME)")
"""More variables that Docker sets for a link: those of the other container, and both names, `/worker/rewardq-redis`."""

_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""How the value of the variable `<SERVICE>_PORT` of such a service begins."""


@dataclass(frozen=True, slots=True)
class Sentinels:
    """How the sentinels of `sentinel://` URLs are asked for their server."""

    master: str = "mymaster"
    """The name of the server among the sentinels."""
    password: str = field(default="", repr=False)
    """The sentinels' own password, where they want one."""


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """Settings of one process. Durations are seconds, sizes bytes; an unknown `REWARDQ_*` variable is an error."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, use_attribute_docstrings=True, extra="forbid"
    )

    broker_url: SecretStr = SecretStr("redis://localhost:6379/0")
    """Redis that carries the queues."""

    result_url: SecretStr = SecretStr("")
    """Redis that holds outcomes, claims and heartbeats; the broker's unless given."""

    payload_url: SecretStr = SecretStr("")
    """Where media and requests are stored: `redis://...` (the broker's server, next database, unless given; in
    production a second Redis without persistence, since a full broker stops its workers) or
    `file:///dev/shm/rewardq` (workers on the trainer's host)."""

    payload_group: str = ""
    """Group, by name or number, of the users that share a `file://` payload store. The folder is made for that group
    (mode 2770), and its members trust each other. Unless given, one user has the folder (mode 0700), and a folder that
    another user owns or may write to is refused."""

    sentinel_master: str = Sentinels().master
    """Name under which `sentinel://` URLs find their server: `sentinel monitor <name> ...` in the sentinels' files."""

    sentinel_password: SecretStr = SecretStr("")
    """Password of the sentinels themselves (`requirepass` in their files). The URLs have the password of the data."""

    result_ttl_s: Seconds = 86_400.0
    """How long a reward is an answer. An older ticket is scored anew; an abandoned one costs memory so long."""

    payload_ttl_s: Seconds = 900.0
    """How long media live in the store after their client last renewed them, as it does every minute. A trainer that is
    stopped for longer uploads them again; those of one that was killed take room for so long."""

    claim_ttl_s: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    """After a worker dies, its samples are free for others this much later. Lower recovers sooner, but a worker
    stopped for longer (a long garbage collection, a C call that holds the GIL) is taken for dead."""

    reconcile_s: Seconds = 2.0
    """How often a client looks for samples that are neither answered, claimed nor queued, and sends them again."""

    stop_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 8.0
    """How long a worker that is asked to stop (SIGTERM) may finish the samples that it is scoring; it gives the others
    back. Keep it below the time after which its container is killed (Docker: 10 s)."""

    max_store_bytes: Bytes = 8 * 2**30
    """Payload bytes in the store, of all clients, above which senders wait."""

    max_backlog: Annotated[int, Field(gt=0)] = 4_096
    """Samples accepted by `submit()` and not yet sent, above which `submit()` itself waits."""

    submit_timeout_s: Seconds = 1_800.0
    """How long `submit()` waits at most for its own backlog before it raises and queues nothing."""

    max_pixels: Annotated[int, Field(gt=0)] = 64 * 1024 * 1024
    """Pixels of one image (or frame) above which it is refused; docs/shapes.md says what models make of its shape."""

    check_media: bool = True
    """Whether `submit()` keeps a few values of each numpy array, PIL image and tensor in this host's memory, so that a
    buffer that is filled anew before it was sent is a failure and no wrong reward. Holds `submit()` for about 0.015 ms
    for each image of 1024x1024, as long again as everything else. A torch tensor counts its changes in any case."""

    sender_threads: Annotated[int, Field(ge=1, le=64)] = 2
    """Threads of a client that encode and upload media."""

    pool: Literal["threads", "solo"] = "threads"
    """Celery's worker pool. Threads: a model is loaded once, 32 judge calls cost 32 threads. CUDA is never forked."""

    device: str = ""
    """Device of local reward models on this worker (`cuda`, `cuda:1`, `cpu`); cuda if there is one, unless given."""

    modules: str = ""
    """Comma-separated modules of the user's that this worker may import reward models from."""

    preload: str = ""
    """Reward models to load before this worker takes tasks: comma-separated names (their defaults), or the YAML file of
    the rewards. Models of other workers' queues are left out; one that cannot be loaded ends the worker."""

    max_models: Annotated[int, Field(ge=0)] = 0
    """Local reward models kept in memory. One more replaces the least recently used model that no task is using, or
    waits until there is such a model. 0 keeps all."""

    hosts: str = ""
    """Comma-separated judge hosts that this worker may send API keys to, besides api.openai.com and OPENAI_BASE_URL. A
    key goes over https to the usual port: `judge.example`. Another port is written, `judge.example:8443`, and so is
    plain HTTP, which others on the way can read: `http://judge:8000`. Only this machine's own host (localhost) needs
    neither."""

    judge_hosts: str = ""
    """Comma-separated hosts that this worker may ask at all, as judges or reward servers, `judge` or `judge:8000`.
    Empty allows every host: then whoever can write to Redis can have this worker ask any server within its reach."""

    max_answer_bytes: Annotated[int, Field(ge=2**16)] = 16 * 2**20
    """Bytes of one answer of a judge or a reward server, after decompression, above which it is no answer. A judge that
    thinks for many thousand tokens with `top_logprobs` may need more; each request in flight may take several times as
    much memory."""

    server_token: SecretStr = SecretStr("")
    """Token of reward servers, which they want if they have the same variable. A worker sends it to servers on its own
    host and to those in REWARDQ_HOSTS."""

    @field_validator("broker_url", "result_url", "payload_url", mode="after")
    @classmethod
    def _a_url_we_speak(cls, secret: SecretStr, info: ValidationInfo) -> SecretStr:
        url = tidied(secret.get_secret_value())
        is_broker = info.field_name == "broker_url"
        if not url and not is_broker:
            return SecretStr(url)
        if info.field_name == "payload_url" and _is_folder(url):
            return SecretStr(url)
        if not has_known_scheme(url):
            raise ValueError(
                f"{without_password(url)!r} is not a URL this pipeline speaks; use redis://host:6379/0, "
                "rediss:// for TLS, sentinel://, or for payloads file:///dev/shm/rewardq"
            )
        moved = with_account_in_front(url)
        wrong = what_is_wrong(moved, is_broker)
        if wrong is not None:
            raise ValueError(f"{without_password(url)!r} is no URL of a Redis: {wrong}")
        return SecretStr(_with_checked_certificate(moved))

    @field_validator("hosts", "judge_hosts")
    @classmethod
    def _lists_of_hosts(cls, text: str) -> str:
        entries_of(text)
        return text

    @property
    def broker(self) -> str:
        """URL of the queues' Redis, with its password: to connect with, never to show."""
        return self.broker_url.get_secret_value()

    @field_validator("payload_group", mode="after")
    @classmethod
    def _a_group_of_this_host(cls, group: str) -> str:
        group = group.strip()
        if group and not group.isdecimal() and _gid_of(group) is None:
            raise ValueError(
                f"{group!r} is no group of this host; use the group's number, which is the same in containers"
            )
        return group

    @field_validator("server_token", mode="after")
    @classmethod
    def _a_token_for_a_header(cls, token: SecretStr) -> SecretStr:
        value = token.get_secret_value().strip()
        # The libraries that refuse to send it would show it in their error.
        if value and not (value.isascii() and value.isprintable() and " " not in value):
            raise ValueError("needs letters, digits and signs of ASCII only")
        return SecretStr(value)

    @property
    def results(self) -> str:
        """URL of the result backend, with its password."""
        return self.result_url.get_secret_value() or self.broker

    @property
    def payloads(self) -> str:
        """URL of the payload store, with its password."""
        return self.payload_url.get_secret_value() or _next_database(self.broker)

    @property
    def payload_gid(self) -> int | None:
        """Number of the group that shares a `file://` payload store; None if one user has it."""
        if not self.payload_group:
            return None
        if self.payload_group.isdecimal():
            return int(self.payload_group)
        return _gid_of(self.payload_group)

    @property
    def sentinels(self) -> Sentinels:
        """How the sentinels are asked for their server."""
        return Sentinels(
            self.sentinel_master, self.sentinel_password.get_secret_value()
        )

    @property
    def allowed_modules(self) -> tuple[str, ...]:
        """Modules this worker may import reward models from."""
        return tuple(m.strip() for m in self.modules.split(",") if m.strip())

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Hosts this worker may send a judge's API key to, as they are written."""
        return tuple(h.strip().lower() for h in self.hosts.split(",") if h.strip())

    def may_send_key(self, origin: Origin) -> bool:
        """Whether REWARDQ_HOSTS allows that a judge's API key is sent there."""
        return may_have_key(origin, entries_of(self.hosts))

    def may_ask(self, url: str) -> bool:
        """Whether REWARDQ_JUDGE_HOSTS, if it is set, allows that a server is asked."""
        entries = entries_of(self.judge_hosts)
        if not entries:
            return True
        origin = origin_of(url)
        return origin is not None and may_be_asked(origin, entries)


def _gid_of(group: str) -> int | None:
    """The number of a group of this host."""
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by `given`.

    Raises:
        SettingsError: A `REWARDQ_*` variable is unknown (the nearest is named) or its value is wrong.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name, value in os.environ.items():
        if not name.startswith(PREFIX) or name.upper() in known:
            continue
        if not _is_no_setting(name, value):
            raise SettingsError(
                f"unknown variable {name}{nearest(name, known)}; known: {', '.join(sorted(known))}"
            )
    try:
        settings = Settings(**given)
    except ValidationError as error:
        raise SettingsError("; ".join(map(_line, error.errors()))) from None
    _remember_secrets(settings)
    return settings


def _remember_secrets(settings: Settings) -> None:
    """Let the process mask its own secrets by value: passwords, the token of reward servers, the keys of judges."""
    for url in (settings.broker, settings.results, settings.payloads):
        SECRETS.add(*passwords_in(url))
    SECRETS.add(settings.sentinels.password, settings.server_token.get_secret_value())
    for name, value in os.environ.items():
        if is_key_variable(name):
            SECRETS.add(value)


def is_key_variable(name: str) -> bool:
    """Whether a variable may hold the API key of a judge: OPENAI_API_KEY or REWARDQ_KEY_*."""
    return name == OPENAI_KEY or _KEY_VARIABLE.fullmatch(name) is not None


def _is_no_setting(name: str, value: str) -> bool:
    """Whether a variable with our prefix is no setting: a judge's key, or the address of somebody's service."""
    if name.startswith(KEY_PREFIX) or _SERVICE_LINK.fullmatch(name):
        return True
    if name.endswith("_PORT") and _ADDRESS.match(value):
        return True
    if name.endswith("_NAME"):
        return value.startswith("/")
    return _DOCKER_LINK.fullmatch(name) is not None


def _line(error: Any) -> str:
    """What is wrong with the value of a variable."""
    name = PREFIX + ".".join(str(part) for part in error["loc"]).upper()
    words = str(error["msg"])
    if error["type"] == "value_error":  # one of ours, which says what was found
        return f"{name}: {words.removeprefix('Value error, ')}"
    return f"{name}: {words} (found {_shown(error)})"


def _shown(error: Any) -> str:
    """The offending value, without a URL's password."""
    found = error.get("input")
    return without_password(found if isinstance(found, SecretStr) else str(found))


def _with_checked_certificate(url: str) -> str:
    """A `rediss://` URL that says so: the certificate is checked, which Celery wants to be told."""
    if not url.startswith("rediss://") or "ssl_cert_reqs=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"


def _is_folder(url: str) -> bool:
    parts = urlsplit(url)
    is_here = parts.netloc in ("", "localhost")
    return parts.scheme == "file" and is_here and len(parts.path) > 1


def _next_database(url: str) -> str:
    """The same server's next database: media apart from the queues, so that each can be looked at alone."""
    parts = urlsplit(url)
    database = parts.path.strip("/") or "0"
    if parts.scheme not in ("redis", "rediss") or not database.isdigit():
        return url
    return urlunsplit(parts._replace(path=f"/{int(database) + 1}"))
