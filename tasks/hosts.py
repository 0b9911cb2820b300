"""Lists of hosts that an operator writes for a worker: which servers may be sent a key, and which may be asked."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")

_USUAL_PORTS = {"http": 80, "https": 443}

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|[0-9a-f:.]+")
"""A host name or an address, in lower case; names in other letters are written as `xn--...`, as DNS has them."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request goes."""

    scheme: str
    host: str
    port: int

    @property
    def shown(self) -> str:
        """As an entry of a list that allows exactly this origin."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.scheme == "https":
            return host if self.port == 443 else f"{host}:{self.port}"
        if self.host in LOOPBACK:
            return f"{host}:{self.port}"
        return f"http://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class HostEntry:
    """One entry of a list: `host`, `host:port`, `https://host:port` or `http://host:port`."""

    scheme: str
    """Empty where the entry has none."""
    host: str
    port: int | None


def origin_of(url: str) -> Origin | None:
    """Where a URL leads; None if that is not certain: libraries read odd URLs in different ways."""
    if re.search(r"[\\\s\x00-\x1f\x7f]", url):
        return None
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        return None
    if parts.scheme not in _USUAL_PORTS or not _NAME.fullmatch(host):
        return None
    return Origin(parts.scheme, host, port or _USUAL_PORTS[parts.scheme])


def entries_of(text: str) -> tuple[HostEntry, ...]:
    """The entries of a list with commas between them.

    Raises:
        ValueError: One is no host; says which.
    """
    entries = []
    for written in text.split(","):
        if written.strip():
            entries.append(_entry(written.strip().lower()))
    return tuple(entries)


def may_have_key(origin: Origin, entries: Iterable[HostEntry]) -> bool:
    """Whether a list allows that a key is sent to an origin.

    An entry without a scheme means https, and without a port the usual one, so that neither another process of that
    host nor somebody on the way gets the key. This machine's own host needs neither.
    """
    return any(_allows_key(entry, origin) for entry in entries)


def may_be_asked(origin: Origin, entries: Iterable[HostEntry]) -> bool:
    """Whether a list allows that an origin is asked: an entry without a port or a scheme means any."""
    return any(_matches(entry, origin) for entry in entries)


# --- private -------------------------------------------------------------------------------------


def _entry(written: str) -> HostEntry:
    scheme, separator, rest = written.rpartition("://")
    host, port, is_bare = "", None, False
    with contextlib.suppress(ValueError):
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname or "", parts.port
        is_bare = not (parts.path.strip("/") or parts.query or parts.username)
    if not _NAME.fullmatch(host) or not is_bare or scheme not in ("", *_USUAL_PORTS):
        raise ValueError(
            f"{written!r} is no host; write host, host:8000 or http://host:8000, with commas between them"
        )
    return HostEntry(scheme if separator else "", host, port)


def _matches(entry: HostEntry, origin: Origin) -> bool:
    is_scheme = entry.scheme in ("", origin.scheme)
    port = entry.port
    if port is None and entry.scheme:
        port = _USUAL_PORTS[entry.scheme]
    return entry.host == origin.host and is_scheme and port in (None, origin.port)


def _allows_key(entry: HostEntry, origin: Origin) -> bool:
    if entry.host in LOOPBACK:
        return _matches(entry, origin)
    scheme = entry.scheme or "https"
    port = entry.port or _USUAL_PORTS[scheme]
    return _matches(HostEntry(scheme, entry.host, port), origin)
