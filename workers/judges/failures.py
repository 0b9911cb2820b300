"""Why a question to a judge has no reply: which errors are the server's, and the reason in words."""

from __future__ import annotations

import platform
from typing import Any

import openai

from tasks.servers.http_urls import DEFAULT_JUDGE_URL
from workers.base import Unscored
from workers.judges.client import NO_KEY, Requests
from workers.judges.endpoints import Endpoint
from workers.judges.inner_errors import INNER_ERROR, InnerError, cut, said_in
from workers.network.loop import cause_of

ELSEWHERE_STATUSES = (408, 409, 429)
"""Request timeout, conflict, too many requests: the server is well, and another server may answer sooner."""


def is_the_servers(error: openai.OpenAIError) -> bool:
    """Whether a server is not well: it cannot be reached, does not answer, or fails with a status of 500 or more."""
    return isinstance(error, openai.APIConnectionError | openai.InternalServerError)


def may_help_elsewhere(error: openai.OpenAIError) -> bool:
    """Whether another server may answer: this server is not well, or has too much to do."""
    status = getattr(error, "status_code", None)
    return is_the_servers(error) or status in ELSEWHERE_STATUSES


def no_answer_in_time(timeout_s: float, count: Requests) -> Unscored:
    """The reason for a question whose `timeout_s` ended, retries and other servers included."""
    words = f"no answer within timeout_s={timeout_s:g} seconds{_after(count)}{_before(count)}"
    return Unscored("timeout", f"{words}{_asked(count)}{way_to(count)}")


def reason_of(error: openai.OpenAIError, timeout: float, count: Requests) -> Unscored:
    """The reason for an error of the API: what the server said."""
    after = _after(count)
    if isinstance(error, openai.APITimeoutError):
        words = f"the judge gave no answer within timeout={timeout:g} seconds{after}{_before(count)}"
        return Unscored("timeout", words + _asked(count))

    if isinstance(error, openai.APIStatusError):
        status, words = _status(error.response), _server_words(error.response)
        return Unscored("failed", f"the judge answered {status}{after}: {words}")

    if isinstance(error, openai.APIConnectionError):
        cause = cause_of(error.__cause__ or error)
        words = (
            f"no connection to the judge{after}: {_whereto(count.endpoint)}: {cause}"
        )
        return Unscored("failed", words)

    return Unscored("failed", f"{type(error).__name__}{after}: {error}")


def way_to(count: Requests) -> str:
    """The proxy through which the last request went; empty if there is none."""
    return count.endpoint.proxy_words if count.endpoint is not None else ""


# --- private -------------------------------------------------------------------------------------


def _after(count: Requests) -> str:
    """How many requests had gone out; if none had, the question waited for the list of models."""
    if count.num:
        return f" after {count.num} request{'s' if count.num != 1 else ''}"
    return " when it was asked for its models" if count.endpoint is not None else ""


def _before(count: Requests) -> str:
    """The last error that the server answered, if time ended before the retry."""
    if count.refusal is None:
        return ""
    return f"; before that the judge answered {_status(count.refusal)}: {_server_words(count.refusal)}"


def _asked(count: Requests) -> str:
    return f"; asked {_whereto(count.endpoint)}" if count.endpoint is not None else ""


def _whereto(endpoint: Endpoint | None) -> str:
    """The URL that was asked, and the host that asked."""
    if endpoint is None:
        return f"from {platform.node()}"
    is_default = endpoint.url == DEFAULT_JUDGE_URL
    default = " (the default of api_base_url)" if is_default else ""
    return f"{endpoint.name}{default} {endpoint.asked_from}"


def _status(response: Any) -> str:
    """The status of an answer, or the code of an error inside an answer of 200."""
    inner: InnerError | None = response.extensions.get(INNER_ERROR)
    if inner is None:
        return str(response.status_code)
    if inner.code:
        return f"200 with an error of code {inner.code}"
    return "200 with an error"


def _server_words(response: Any) -> str:
    """The message in the server's error, else its whole answer; without the key, which some servers repeat."""
    inner: InnerError | None = response.extensions.get(INNER_ERROR)
    words: str = (
        inner.words if inner is not None else said_in(response.content) or response.text
    )
    key = response.request.headers.get("Authorization", "").removeprefix("Bearer ")
    return cut(words.replace(key, "***") if key not in ("", NO_KEY) else words)
