"""How the URL of a Redis must be: checked where it is read, because libraries take its parts in silence later.

redis-py takes database 0 for a path that is no number and localhost for a host that is missing; kombu raises a
TypeError for an option that it does not know. None of the texts here repeats what may be a part of a password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote_plus, urlsplit

from redis.connection import URL_QUERY_ARGUMENT_PARSERS

from tasks.errors import nearest

SCHEMES = ("redis", "rediss", "sentinel")

TLS_OPTIONS = (
    "ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile", "ssl_password",
)  # fmt: skip
"""Options of a `rediss://` URL; each of the three libraries that read it knows them."""

OTHER_OPTIONS = (
    "client_name", "db", "health_check_interval", "max_connections", "retry_on_timeout", "socket_connect_timeout",
    "socket_keepalive", "socket_read_size", "socket_timeout",
)  # fmt: skip
"""Options of a URL for results or payloads; kombu, which reads the broker's, takes none of them."""

CERTIFICATE_CHECKS = (
    "required",
    "optional",
    "none",
    "CERT_REQUIRED",
    "CERT_OPTIONAL",
    "CERT_NONE",
)

_PARSERS: Mapping[str, Any] = URL_QUERY_ARGUMENT_PARSERS

ENCODE = "a password with one of / ? # @ % in it is written percent-encoded (%2F %3F %23 %40 %25)"

_BETWEEN_URLS = re.compile(r";(?=\w+://)")


def several_urls(url: str) -> list[str]:
    """The URLs in one text: several sentinels have `;` between their URLs."""
    return _BETWEEN_URLS.split(url)


def has_known_scheme(url: str) -> bool:
    """Whether every URL in the text is one of a Redis."""
    return all(
        re.match(rf"({'|'.join(SCHEMES)})://", part) for part in several_urls(url)
    )


def tidied(url: str) -> str:
    """Without space around it (a secret that was read from a file ends with a new line), and without a second slash.

    Celery's own pages write `redis://localhost:6379//` for database 0, which its result backend cannot read.
    """
    return re.sub(r"//(?=$|\?)", "/", url.strip())


def with_account_in_front(url: str) -> str:
    """The URL with a user and password of its query where libraries hide them: in front of the host.

    `redis://host/0?password=x` becomes `redis://:x@host/0`. Celery, Flower and kombu show a query as it is.
    """
    return ";".join(map(_account_in_front, several_urls(url)))


def _account_in_front(url: str) -> str:
    front, question, query = url.partition("?")
    pairs = query.split("&") if question else []
    account = dict.fromkeys(("username", "password"), "")
    others = []
    for pair in pairs:
        name, _equals, value = pair.partition("=")
        if name in account:
            account[name] = quote(unquote_plus(value), safe="")
        else:
            others.append(pair)
    scheme, separator, rest = front.partition("://")
    has_account = any(account.values())
    if not has_account or "@" in rest:
        return url  # two accounts in one URL are refused by `what_is_wrong`
    front = f"{scheme}{separator}{account['username']}:{account['password']}@{rest}"
    return f"{front}?{'&'.join(others)}" if others else front


def what_is_wrong(url: str, is_broker: bool) -> str | None:
    """Why this URL (of a known scheme) leads to no Redis, or to another than it seems to; None if nothing is wrong.

    Args:
        url: One, or several of sentinels.
        is_broker: Kombu reads it, which takes no options but those of TLS.
    """
    for one in several_urls(url):
        wrong = _wrong_in_one(urlsplit(one), is_broker)
        if wrong is not None:
            return wrong
    return None


def _wrong_in_one(parts: SplitResult, is_broker: bool) -> str | None:
    return (
        _wrong_password(parts)
        or _wrong_address(parts)
        or _wrong_database(parts)
        or _wrong_options(parts, _options_of(parts.scheme, is_broker))
    )


def _wrong_password(parts: SplitResult) -> str | None:
    """A password that ends the host too early; the rest of it would be taken for a path, or be dropped."""
    is_cut = "@" in parts.path or ("@" in parts.query and "@" not in parts.netloc)
    if is_cut or parts.fragment:
        return f"it falls apart before its host; {ENCODE}"
    if parts.username and parts.password is None:
        return (
            f"it has a user and no password: {parts.scheme}://:password@host:6379/0 is one with a password alone, and "
            f"{parts.scheme}://user:@host:6379/0 one of a user who needs none"
        )
    names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    if {"username", "password"} & set(names):
        return "it has an account in front of its host and another in its query; write one of them"
    return None


def _wrong_address(parts: SplitResult) -> str | None:
    host, _colon, port = parts.netloc.rpartition("@")[2].rpartition(":")
    if re.search(r"\s", host):
        return f"there is a space in its host, {host!r}"
    try:
        _ = parts.port
        name = parts.hostname
    except ValueError:
        if not host:
            return f"it has no host; {ENCODE}"
        return f"its port must be a number from 0 to 65535, found {port!r}"
    if not name:
        return f"it names no host; this machine is {parts.scheme}://localhost:6379/0"
    return None


def _wrong_database(parts: SplitResult) -> str | None:
    database = parts.path.removeprefix("/")
    if not database or re.fullmatch(r"\d+", database, re.ASCII):
        return None
    return f"its database must be a number, as in {parts.scheme}://host:6379/0; found {database!r}"


def _options_of(scheme: str, is_broker: bool) -> tuple[str, ...]:
    if scheme == "sentinel":
        return ()
    of_tls = TLS_OPTIONS if scheme == "rediss" else ()
    others = () if is_broker else OTHER_OPTIONS
    return (*of_tls, *others)


def _wrong_options(parts: SplitResult, known: tuple[str, ...]) -> str | None:
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            return _unknown(name, parts.scheme, known)
        if name == "ssl_cert_reqs" and value not in CERTIFICATE_CHECKS:
            return f"ssl_cert_reqs must be required, optional or none, found {value!r}"
        parse = _PARSERS.get(name)
        if parse is not None:
            try:
                parse(value)
            except (TypeError, ValueError):
                return f"its option {name} cannot be {value!r}"
    return None


def _unknown(name: str, scheme: str, known: tuple[str, ...]) -> str:
    if scheme == "redis" and name in TLS_OPTIONS:
        return f"{name} is for TLS, and the URL begins with redis://; a server with TLS is rediss://"
    if name in OTHER_OPTIONS:
        return f"it can have no option {name}: the broker's URL says where the server is, and nothing else"
    return f"it has an option {name!r} that is not known{nearest(name, known)}; known: {', '.join(known) or 'none'}"
