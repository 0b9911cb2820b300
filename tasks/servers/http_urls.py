"""URLs of judges and reward servers as a config has them, and what is wrong with one, in words."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from tasks.hosts import origin_of
from tasks.masking import without_password

DEFAULT_JUDGE_URL = "http://localhost:8000/v1"
"""Where a judge is asked without `api_base_url`: on the worker's own host."""

MAX_SERVERS = 256
"""Servers of one reward: each costs a worker a client of its own."""

PATTERN = r"^https?://[^/\s]+"
"""How the URL of a server begins."""

_BEHIND_API = re.compile(
    r"/(?:chat/)?completions/*$|(?<=/v1)/(?:chat|models|responses|embeddings)/*$"
)
"""Ends of the addresses of single calls, which people often copy instead of the API's address."""

_BEHIND_SERVER = re.compile(r"/(?:compute|health)/*$")

_SCHEME_OF_SORTS = re.compile(
    r"^(?:https?:(?!\d)/*|\w*(?:://|:/+|//+)|/+)", re.IGNORECASE
)
"""What a wrong URL has instead of http://."""


def whats_wrong(url: str) -> str:
    """Why a worker could not ask a server at this URL; empty if nothing is wrong. Passwords are not repeated."""
    without_space = "".join(url.split())
    if url != without_space:
        return f"has white space in {without_password(url)!r}; write {without_password(without_space)!r}"
    if not re.match(r"^https?://", url):
        return f"needs http:// or https:// in front: {without_password(_with_scheme(url))!r}?"
    if url.count("://") > 1:
        return "has two schemes; it needs one URL"
    if re.search(r"[<>{}$]", url):
        return "has a placeholder in it, which nothing has filled in"
    return _wrong_parts(url)


def _wrong_parts(url: str) -> str:
    """What is wrong with the host, port, fragment or query of a URL; empty if nothing is."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"is no URL: {error}"
    if port == 0:
        return "needs a port above 0"
    if not parts.hostname:
        return "needs a host, http://host:8000 for example"
    if origin_of(url) is None:
        return "has a host that libraries read in different ways; write it in letters, digits, dots and dashes"
    if parts.fragment:
        return f"ends with #{parts.fragment}, which no server is sent"
    if parts.query:
        return (
            "has a query behind its path, which would end up in the middle of what is "
            f"asked; take ?{_query(url)} away"
        )
    return ""


def whats_wrong_with_api(url: str) -> str:
    """The same for the URL of an OpenAI-compatible API."""
    return whats_wrong(url) or _call(url, _BEHIND_API, "the API, which ends with /v1")


def whats_wrong_with_server(url: str) -> str:
    """The same for the URL of a reward server."""
    return whats_wrong(url) or _call(url, _BEHIND_SERVER, "the server")


def _query(url: str) -> str:
    return without_password(url).partition("?")[2]


def _call(url: str, behind: re.Pattern[str], what: str) -> str:
    """That a URL is the address of a single call, where it should be `what`'s; empty if it is not."""
    found = behind.search(url)
    if found is None:
        return ""
    right = without_password(url[: found.start()])
    return (
        f"is the address of one call ({found[0]}); it needs that of {what}: {right!r}"
    )


def _with_scheme(url: str) -> str:
    """What was probably meant by a URL without http://, or with a part of that."""
    scheme = "https" if url.lower().startswith("https") else "http"
    return f"{scheme}://{_SCHEME_OF_SORTS.sub('', url)}"


def _checked(value: str | list[str], check: Any) -> str | list[str]:
    for url in [value] if isinstance(value, str) else value:
        wrong = check(url)
        if wrong:
            raise PydanticCustomError("server_url", "{wrong}", {"wrong": wrong})
    return value


_Url = Annotated[str, Field(json_schema_extra={"pattern": PATTERN})]
_Urls = _Url | Annotated[list[_Url], Field(min_length=1, max_length=MAX_SERVERS)]

ApiUrls = Annotated[
    _Urls, AfterValidator(lambda value: _checked(value, whats_wrong_with_api))
]
"""The type of an option: the URL of an OpenAI-compatible API, or a list of them."""

ServerUrls = Annotated[
    _Urls, AfterValidator(lambda value: _checked(value, whats_wrong_with_server))
]
"""The type of an option: the URL of a reward server, or a list of them."""
