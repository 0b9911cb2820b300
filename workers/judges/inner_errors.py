"""Errors of servers and gateways, also those inside an answer of 200, with the HTTP status that they stand for."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INNER_ERROR = "rewardq_inner_error"
"""The key, in `extensions` of an HTTP response, of the `InnerError` whose status the response was given."""

MAX_WORDS = 500
"""How many characters of a server's answer a reason repeats."""

REFUSED = 400
"""The status of an error that does not say whether a retry may help: the request is not retried."""

BROKEN = 502
"""The status of a reply that broke off without a reason: a retry may bring a whole reply."""

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
"""HTTP statuses, and the words in codes and messages that stand for them; the first pattern that matches counts."""

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

_SIGNS_OF_FAILURE = (
    "code",
    "status_code",
    "http_status",
    "status",
    "error_code",
    "errcode",
    "detail",
    "success",
)
"""Keys that a body without a choice has only if it is an error."""

_FINE = ("0", "200", "ok", "success", "none", "no error")
"""Codes by which an error says that nothing is wrong."""


@dataclass(frozen=True, slots=True)
class InnerError:
    """An error inside an answer of 200.

    Attributes:
        status: The HTTP status, which decides whether to retry.
        code: The server's code of the error; empty if it gave none.
        words: The server's message.
    """

    status: int
    code: str
    words: str


def inner_error(content: bytes) -> InnerError | None:
    """The error in the body of an answer of 200; None if the body is a reply, or nothing that we know."""
    for body in _bodies(content):
        with contextlib.suppress(
            RecursionError
        ):  # of a body that is nested deeper than any server means
            found = _error_in(body)
            if found is not None:
                return found
    return None


def said_in(content: bytes) -> str:
    """The message in the body of an error; empty if the body has none, or is no JSON."""
    try:
        body = json.loads(content)
        error = body.get("error") if isinstance(body, Mapping) else None
        return words_of(error or body)
    except (ValueError, RecursionError):
        return ""


def words_of(error: Any) -> str:
    """The message of an error, and behind it what a gateway repeats of the server; empty if there is no message."""
    if isinstance(error, list):
        return _words_of_several(error)
    if isinstance(error, Mapping):
        return _words_of_mapping(error)
    return error if isinstance(error, str) else ""


def cut(text: str) -> str:
    """The beginning of a text, as much as a reason repeats."""
    return text if len(text) <= MAX_WORDS else f"{text[:MAX_WORDS]}..."


# --- private -------------------------------------------------------------------------------------


def _words_of_several(errors: list[Any]) -> str:
    for one in errors:
        is_of_fastapi = isinstance(one, Mapping) and "loc" in one
        if is_of_fastapi:  # `loc` says which field is wrong, and the message does not
            return json.dumps(errors)
    return "; ".join(filter(None, map(words_of, errors)))


def _words_of_mapping(error: Mapping[str, Any]) -> str:
    message = ""
    for name in _MESSAGES:
        message = words_of(error.get(name))
        if message:
            break

    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None
    if message and raw:
        return f"{message}: {raw}"
    return message or str(raw or "")


def _bodies(content: bytes) -> Iterator[Any]:
    """The JSON in a body: the whole body, or the events of a stream, which some servers send unasked."""
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
    is_broken_off = choice.get("finish_reason") == "error"
    error = _first_error(body, choice)
    if error is not None:
        return _read(error, BROKEN if is_broken_off else REFUSED)
    if is_broken_off:
        return InnerError(BROKEN, "", "the reply ended with finish_reason 'error'")
    if not choice and _says_that_it_failed(body):
        return _read(body, REFUSED)
    return None


def _choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, Mapping) else {}


def _first_error(body: Mapping[str, Any], choice: Mapping[str, Any]) -> Any:
    """The error of a body, its choice or its message; None if there is none, or if it says that nothing is wrong."""
    message = choice.get("message")
    of_message = message.get("error") if isinstance(message, Mapping) else None
    for error in (
        body.get("error"),
        choice.get("error"),
        of_message,
        body.get("errors"),
    ):
        if error and not _says_nothing_is_wrong(error):
            # an error that is only `true` or a text has its code beside it, in the body
            is_bare = error is True or (isinstance(error, str) and not choice)
            return body if is_bare else error

    status = body.get("base_resp")  # MiniMax
    has_failed = isinstance(status, Mapping) and status.get("status_code")
    return status if has_failed else None


def _says_nothing_is_wrong(error: Any) -> bool:
    """Whether an error is only the form of an error, which some servers send with every answer."""
    if not isinstance(error, Mapping):
        return str(error).strip().casefold() in _FINE
    if not any(error.values()):
        return True
    codes = [error[name] for name in _CODES if error.get(name) is not None]
    return any(str(code).casefold() in _FINE for code in codes)


def _says_that_it_failed(body: Mapping[str, Any]) -> bool:
    """Whether a body without a choice is an error by its own words, and not something else."""
    if not words_of(body):
        return False
    if body.get("object") == "error":
        return True
    return any(name in body for name in _SIGNS_OF_FAILURE)


def _read(error: Any, otherwise: int) -> InnerError:
    """The error; its status is `otherwise` if neither a code nor words stand for a status."""
    words = words_of(error)
    if isinstance(error, list) and error and isinstance(error[0], Mapping):
        error = error[0]  # whose codes count
    else:
        words = words or json.dumps(error)

    codes = _codes_of(error)
    status = (
        _status_in(codes)
        or _status_of(" ".join(codes))
        or _status_of(words)
        or otherwise
    )
    return InnerError(status, codes[0] if codes else "", words)


def _codes_of(error: Any) -> list[str]:
    if not isinstance(error, Mapping):
        return []
    codes = [error.get(name) for name in _CODES]
    return [str(code) for code in codes if code not in (None, "")]


def _status_in(codes: Sequence[str]) -> int | None:
    """The first code that is an HTTP status itself."""
    for code in codes:
        if re.fullmatch(r"[45]\d\d", code.strip()):
            return int(code)
    return None


def _status_of(words: str) -> int | None:
    """The HTTP status that words stand for."""
    for status, pattern in _STATUS_OF_WORDS:
        if re.search(pattern, words, re.IGNORECASE):
            return status
    return None
