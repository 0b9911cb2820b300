"""The token of reward servers: which servers a worker sends it to, and that nobody reads it in an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx2

from tasks.hosts import LOOPBACK, origin_of
from tasks.settings import load_settings

VARIABLE = "REWARDQ_SERVER_TOKEN"


@dataclass(frozen=True, slots=True)
class Token:
    """What one server is sent."""

    value: str = field(default="", repr=False)
    """Empty if it is sent no token."""
    why_not: str = f"set {VARIABLE} on this worker"
    """What to do where it is sent none and wants one."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers with the token; none if there is no token."""
        return {"Authorization": f"Bearer {self.value}"} if self.value else {}


def token_for(url: str) -> Token:
    """The token for the server at this URL: that of this worker, if the server may have it.

    The URL comes with a message. So whoever writes to Redis could have the token sent anywhere, if it was not bound to
    this worker's own host and to the hosts in its REWARDQ_HOSTS.
    """
    settings = load_settings()
    token = settings.server_token.get_secret_value()
    if not token:
        return Token()
    origin = origin_of(url)
    if origin is None:
        return Token(
            why_not=f"this worker sends no {VARIABLE} to an address that can be read in several ways"
        )
    if origin.host in LOOPBACK or settings.may_send_key(origin):
        return Token(token)
    hosts = ",".join((*settings.allowed_hosts, origin.shown))
    return Token(
        why_not=f"this worker does not send {VARIABLE} to {origin.host}; if it may, start it with REWARDQ_HOSTS={hosts}"
    )


def without_token(response: httpx2.Response, token: Token) -> httpx2.Response:
    """An answer in which `***` stands for the token: reasons quote answers, and many can read reasons."""
    secret = token.value.encode()
    if not secret or secret not in response.content + str(response.headers).encode():
        return response
    headers = {
        name: response.headers[name].replace(token.value, "***")
        for name in ("Content-Type", "Location", "Retry-After")
        if name in response.headers
    }
    content = response.content.replace(secret, b"***")
    return httpx2.Response(response.status_code, headers=headers, content=content)
