"""Masks secrets in what people read: passwords in URLs, values of names such as `token=`, and secrets known by value.

Three nets, since none catches everything: a URL is known by its form, a parameter by its name, and a key that a server
repeats only by its value.
"""

from __future__ import annotations

import re
import threading
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"

MIN_SECRET_CHARS = 6
"""A shorter value is not looked for in texts: it would be found within usual words, and is no secret for long."""

_NAMES = (
    r"(?:[\w-]*[_-])?(?:password|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|signature|credential|sig|jwt)"
)
"""Names of parameters whose values are secrets: of URLs, of presigned links (`X-Amz-Signature`, `sig`), of logs."""

_PARAMETER = re.compile(rf"(?i)(?<![\w-])({_NAMES}=)[^\s&;,'\"<>)}}\]]+")
_QUERY = re.compile(rf"(?i)([?&;](?:{_NAMES}|key|auth|pass)=)[^&\s]*")
_AUTHORIZATION = re.compile(r"(?i)\b(bearer|basic)\s+(?!\*)[\w.~+/=-]{6,}")
_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_BETWEEN_URLS = re.compile(r";(?=\w+://)")


def without_password(url: Any) -> str:
    """`url` with `***` for each secret in it: a password, a lone user (often a token), a parameter of such a name.

    Args:
        url: A text, or a pydantic `SecretStr`; several sentinels have `;` between their URLs.
    """
    text = url.get_secret_value() if hasattr(url, "get_secret_value") else url
    return ";".join(map(_without_password, _BETWEEN_URLS.split(text)))


def masked(text: str) -> str:
    """A text of any kind (a log line, a reason, a traceback) with `***` for each secret in it."""
    text = SECRETS.masked(text)
    if "://" in text:
        text = _URL.sub(lambda found: without_password(found[0]), text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\1{MASK}", text)
    return _AUTHORIZATION.sub(rf"\1 {MASK}", text)


class Secrets:
    """The secrets of this process by value: passwords of its URLs and keys of judges. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pattern: re.Pattern[str] | None = None
        self._values: frozenset[str] = frozenset()

    def add(self, *values: str) -> None:
        """Mask these values from now on, and the ways in which URLs and JSON write them."""
        written: set[str] = set()
        for value in values:
            written |= {value, unquote(value), quote(value, safe=""), _in_json(value)}
        new = {one for one in written if len(one) >= MIN_SECRET_CHARS}
        with self._lock:
            if new <= self._values:
                return
            self._values |= new
            longest_first = sorted(self._values, key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def masked(self, text: str) -> str:
        """A text with `***` for each value."""
        return text if self._pattern is None else self._pattern.sub(MASK, text)


SECRETS = Secrets()
"""Those of this process."""


def passwords_in(url: str) -> list[str]:
    """The passwords in a URL, or in several URLs of sentinels."""
    found = []
    for one in _BETWEEN_URLS.split(url):
        user, at, _host = one.partition("://")[2].rpartition("@")
        password = user.partition(":")[2] if ":" in user else user
        if at and password:
            found.append(password)
    return found


# --- private -------------------------------------------------------------------------------------


def _without_password(url: str) -> str:
    before, at, host = _QUERY.sub(rf"\1{MASK}", url).rpartition("@")
    scheme, separator, account = before.partition("://")
    user, colon, password = account.partition(":")
    if not colon and user:
        return f"{scheme}{separator}{MASK}{at}{host}"
    shown = f":{MASK}" if password else colon
    return f"{scheme}{separator}{user}{shown}{at}{host}"


def _in_json(value: str) -> str:
    """A value as it stands within a JSON text: servers repeat what they were sent."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("/", "\\/")
