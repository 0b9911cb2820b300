"""Errors that servers and gateways hand over, also inside an answer of 200, with the status that they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MARK = "rewardq_inner_error"
"""In `extensions` of an HTTP response: the `InnerError` whose status it was given."""

MAX_WORDS = 500
"""Characters of a server's answer that a reason repeats."""

REFUSED = 400
"""The status of an error that does not say whether to ask again: it is not asked again."""

BROKEN = 502
"""The status of a reply that broke off without a word: another request may bring it."""

_STATUS_OF_WORDS = (
    (429, r"rate.?limit|too.?many|exhausted|throttl|quota|\bqps\b|concurrency.?limit"),
    (
        503,
        r"overload|unavailable|capacity|\bbusy\b|try again|temporar|\bloading\b|warming up|not ready|starting up",
    ),
    (504, r"time.?out|timed out|deadline"),
    (404, r"not.?found|does not exist|no such model|unknown model"),
    (401, r"authenticat|api.?key|unauthorized"),
    (403, r"permission|forbidden"),
    (400, r"invalid|bad.?request|content.?filter|policy"),
    (502, r"bad.?gateway|upstream|provider.?error|engine|connection|disconnected"),
    (500, r"internal|server.?error|api.?error|out of memory|crash"),
)
"""What codes in words stand for; the first that fits counts."""

_CODES = (
    "code",
    "status_code",
    "http_status",
    "status",
    "error_code",
    "type",
    "errcode",
)
_MESSAGES = (
    "message",
    "msg",
    "detail",
    "error_msg",
    "status_msg",
    "error_message",
    "title",
    "errmsg",
    "error",
)

_FINE = ("0", "200", "ok", "success", "none", "no error")
"""Codes of an error that is none."""


@dataclass(frozen=True, slots=True)
class InnerError:
    """An error inside an answer of 200.

    Attributes:
        status: The HTTP status that says what to do about it.
        code: What the server called it; empty if it gave no code.
        words: What the server said.
    """

    status: int
    code: str
    words: str


def inner_error(content: bytes) -> InnerError | None:
    """The error in the body of an answer of 200; None if the body is a reply, or nothing that is known."""
    for body in _bodies(content):
        found = _error_in(body)
        if found is not None:
            return found
    return None


def said_in(content: bytes) -> str:
    """What the body of an error says: the message in its error; empty if it has none, or is no JSON."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    error = body.get("error") if isinstance(body, Mapping) else None
    return words_of(error or body)


def words_of(error: Any) -> str:
    """What an error says: its message, with what a gateway adds of the server behind it; empty if it says nothing."""
    if isinstance(error, list):
        if any(
            isinstance(one, Mapping) and "loc" in one for one in error
        ):  # FastAPI's say which field is wrong
            return json.dumps(error)
        return "; ".join(words for words in map(words_of, error) if words)
    if not isinstance(error, Mapping):
        return error if isinstance(error, str) else ""
    message = next(
        (words for name in _MESSAGES if (words := words_of(error.get(name)))), ""
    )
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    return f"{message}: {raw}" if raw and message else message or str(raw or "")


def cut(text: str) -> str:
    """The beginning of a text that a reason repeats."""
    return text if len(text) <= MAX_WORDS else f"{text[:MAX_WORDS]}..."


# --- private -------------------------------------------------------------------------------------


def _bodies(content: bytes) -> Iterator[Any]:
    """The JSON in a body: the whole, or the events of a stream that nobody asked for."""
    try:
        yield json.loads(content)
        return
    except (ValueError, RecursionError):
        pass
    for line in content.decode("utf-8", "replace").splitlines():
        if line.startswith("data:"):
            try:
                yield json.loads(line.removeprefix("data:"))
            except (ValueError, RecursionError):
                continue


def _error_in(body: Any) -> InnerError | None:
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, Mapping):
        return None
    choice = _choice(body)
    error = _first_error(body, choice)
    is_broken_off = choice.get("finish_reason") == "error"
    if error is not None:
        return _read(error, BROKEN if is_broken_off else REFUSED)
    if is_broken_off:
        return InnerError(BROKEN, "", "the reply ended with finish_reason 'error'")
    if choice or not words_of(body) or not _says_that_it_failed(body):
        return None
    return _read(body, REFUSED)


def _choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, Mapping) else {}


def _first_error(body: Mapping[str, Any], choice: Mapping[str, Any]) -> Any:
    """What stands under `error` or its kin, unless it says that there is none."""
    message = choice.get("message")
    places = (
        body.get("error"),
        choice.get("error"),
        message.get("error") if isinstance(message, Mapping) else None,
    )
    for error in (*places, body.get("errors")):
        if error and not _says_nothing_is_wrong(error):
            is_bare = error is True or (isinstance(error, str) and not choice)
            return body if is_bare else error  # its code stands beside it
    status = body.get("base_resp")  # MiniMax
    return status if isinstance(status, Mapping) and status.get("status_code") else None


def _says_nothing_is_wrong(error: Any) -> bool:
    """Whether an error is only the form of one, which some servers send with every answer."""
    if not isinstance(error, Mapping):
        return str(error).strip().casefold() in _FINE
    codes = [error[name] for name in _CODES if error.get(name) is not None]
    return not any(error.values()) or any(
        str(code).casefold() in _FINE for code in codes
    )


def _says_that_it_failed(body: Mapping[str, Any]) -> bool:
    """Whether a body without a choice is an error by its own words, and not something else."""
    return (
        any(name in body for name in (*_CODES[:5], "errcode", "detail", "success"))
        or body.get("object") == "error"
    )


def _read(error: Any, otherwise: int) -> InnerError:
    """The error; `otherwise` is its status if neither a code nor words tell one."""
    if isinstance(error, list) and error and isinstance(error[0], Mapping):
        words, error = words_of(error), error[0]
    else:
        words = words_of(error) or json.dumps(error)
    codes = (
        [error[name] for name in _CODES if error.get(name) not in (None, "")]
        if isinstance(error, Mapping)
        else []
    )
    code = str(codes[0]) if codes else ""
    numbers = [int(str(c)) for c in codes if re.fullmatch(r"[45]\d\d", str(c).strip())]
    if numbers:
        return InnerError(numbers[0], code, words)
    return InnerError(
        _status_of(" ".join(map(str, codes))) or _status_of(words) or otherwise,
        code,
        words,
    )


def _status_of(words: str) -> int | None:
    for status, pattern in _STATUS_OF_WORDS:
        if re.search(pattern, words, re.IGNORECASE):
            return status
    return None
