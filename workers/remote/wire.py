"""What a reward server is sent and what its answers say: the JSON of Flow-Factory's remote rewards, or msgpack."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import msgpack

from tasks.errors import FailureKind
from tasks.masking import without_password
from tasks.samples import MEDIA_FIELDS
from workers.base import Unscored
from workers.judges.images import DATA_URLS
from workers.judges.inner_errors import cut, inner_error
from workers.network.servers import Server

JSON, MSGPACK = "application/json", "application/msgpack"

FLOW_FACTORY_FIELDS = (
    "prompt",
    "image",
    "video",
    "condition_images",
    "condition_videos",
)
"""What its clients send, null where they have none."""

INVALID = (400, 413, 422)
"""Statuses of an answer that does not take the samples as they are."""

BUSY = (429, 503)
"""Statuses of an answer that may say when to come again."""

_FAILED = ("error", "fail", "failed", "failure")
"""What a `status` in an answer says if the rewards beside it are not to be used."""

Columns = Mapping[str, Sequence[Any] | None]
"""The fields of some samples: a value for each sample, or None."""

Reward = Any
"""A number, which the caller checks, or an `Unscored`."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a server says of itself at /health; Flow-Factory's says nothing."""

    takes_msgpack: bool = False
    max_body_bytes: float = math.inf
    needs_token: bool = False


class NoAnswerError(Exception):
    """There are no rewards yet, but another request may bring them.

    Args:
        reason: That of the samples, if this was the last request.
        is_well: Whether the server can be asked about other samples meanwhile.
        pause_s: How long it wants to be left alone, since it has too much in hand.
    """

    def __init__(
        self, reason: Unscored, is_well: bool = False, pause_s: float | None = None
    ) -> None:
        super().__init__(reason, is_well, pause_s)
        self.reason, self.is_well, self.pause_s = reason, is_well, pause_s


class RejectedError(Exception):
    """A server gives no rewards for these samples together, and would not if it was asked again.

    Args:
        reason: Why.
        reasons: Those of the samples it blames, by index; empty if it names none.
    """

    def __init__(self, reason: Unscored, reasons: Mapping[int, Unscored]) -> None:
        super().__init__(reason, reasons)
        self.reason, self.reasons = reason, reasons


def encode(columns: Columns, terms: Terms) -> bytes:
    """The body of a request: what fields the samples have, as a server takes them."""
    encode_image = _rgb if terms.takes_msgpack else _png
    fields: dict[str, Any] = {}
    for name, values in columns.items():
        if values is None or all(value is None for value in values):
            continue
        is_media = name in MEDIA_FIELDS
        fields[name] = _each_image(values, encode_image) if is_media else values
    if terms.takes_msgpack:
        return bytes(msgpack.packb(fields))
    return json.dumps({**dict.fromkeys(FLOW_FACTORY_FIELDS), **fields}).encode()


def terms_of(server: Server, response: httpx2.Response) -> Terms:
    """What an answer at /health says.

    Raises:
        NoAnswerError: The server is not well.
        Unscored: It is none of ours.
    """
    answered = f"{server.name}/health answered {_words(response)}"
    if response.status_code >= 500 or response.status_code == 429:
        raise NoAnswerError(Unscored("failed", f"{answered}{server.proxy_words}"))
    if response.status_code == 401:
        raise Unscored("failed", f"{answered}{server.proxy_words}")
    if not response.is_success:
        message = f"{answered}; is a reward server there?{server.proxy_words}"
        raise Unscored("failed", message)
    said = _json_object(response)
    most, takes = said.get("max_body_bytes"), said.get("takes")
    return Terms(
        takes_msgpack=isinstance(takes, list) and MSGPACK in takes,
        max_body_bytes=most if isinstance(most, int) else math.inf,
        needs_token=said.get("needs_token") is True,
    )


def rewards_of(
    server: Server, response: httpx2.Response, num_samples: int, may_split: bool
) -> list[Reward]:
    """What an answer at /compute says of each sample.

    Raises:
        NoAnswerError: The server is not well, has too much in hand, or broke down over these samples.
        RejectedError: It says that it does not take these samples, or broke down and may take fewer.
        Unscored: It says something else.
    """
    said = _json_object(response)
    rewards = _list_of(num_samples, said.get("rewards"))
    if _is_success(response) and not _says_what_is_wrong(said):
        if rewards is None:
            raise _no_rewards(server, response, said.get("rewards"), num_samples)
        return rewards

    reasons = _reasons(server, said, _kind_of(response), num_samples)
    if reasons and rewards is not None:
        return [reasons.get(i, reward) for i, reward in enumerate(rewards)]
    raise _error_of(server, response, reasons, may_split and num_samples > 1)


def status_of(response: httpx2.Response) -> int:
    """The status of an answer; of one of 200 with an error in it the code of that, if it is a status."""
    error = inner_error(response.content) if response.is_success else None
    if error is not None and error.code == str(error.status):
        return error.status
    return response.status_code


# --- private -------------------------------------------------------------------------------------


def _no_rewards(
    server: Server, response: httpx2.Response, rewards: Any, num_samples: int
) -> Unscored:
    found = f"no rewards but {cut(response.text)!r}"
    if isinstance(rewards, list):
        found = f"{len(rewards)} rewards"
    message = (
        f"{server.name} gave {found} for {num_samples} samples{server.proxy_words}"
    )
    return Unscored("failed", message)


def _list_of(length: int, value: Any) -> list[Any] | None:
    return value if isinstance(value, list) and len(value) == length else None


def _error_of(
    server: Server,
    response: httpx2.Response,
    reasons: Mapping[int, Unscored],
    may_split: bool,
) -> Exception:
    """What to raise for an answer without rewards: whether to ask again, and when, or to send the samples apart."""
    status, kind = status_of(response), _kind_of(response)
    reason = Unscored(
        kind, f"{server.name} answered {_words(response)}{server.proxy_words}"
    )
    if reasons or _is_success(response) or kind == "invalid":
        return RejectedError(reason, reasons)
    if status == 500 and may_split:
        return RejectedError(reason, {})  # one of the samples may be why it broke down
    pause_s = _retry_after_s(response) if status in BUSY else None
    if pause_s is not None:
        late = Unscored("timeout", reason.message)
        return NoAnswerError(late, is_well=True, pause_s=pause_s)
    if status >= 500 or status in (408, 425, 429):
        return NoAnswerError(reason, is_well=status == 500)
    return reason


def _is_success(response: httpx2.Response) -> bool:
    """Whether an answer is of 200 and has no error in it that stands for another status."""
    return response.is_success and status_of(response) == response.status_code


def _kind_of(response: httpx2.Response) -> FailureKind:
    return "invalid" if status_of(response) in INVALID else "failed"


def _each_image(value: Any, encode_image: Callable[[Any], Any]) -> Any:
    """`value` with each image in it encoded; None stays None."""
    if isinstance(value, list | tuple):
        return [_each_image(one, encode_image) for one in value]
    return None if value is None else encode_image(value)


def _png(image: Any) -> str:
    return DATA_URLS.of(image, "png").partition(",")[2]


def _rgb(image: Any) -> dict[str, Any]:
    return {"size": list(image.size), "rgb": image.tobytes()}


def _json_object(response: httpx2.Response) -> dict[str, Any]:
    """The JSON object in an answer; empty if there is none."""
    try:
        said = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _says_what_is_wrong(said: Mapping[str, Any]) -> bool:
    """Whether an answer says that something went wrong, whatever its status is and whatever else it has."""
    if said.get("error") or said.get("success") is False:
        return True
    status = said.get("status")
    if isinstance(status, str) and status.strip().casefold() in _FAILED:
        return True
    errors = said.get("errors")
    if isinstance(errors, dict):
        return any(errors.values())
    if isinstance(errors, list):
        return any(errors)
    return bool(errors)


def _reasons(
    server: Server, said: Mapping[str, Any], kind: FailureKind, num_samples: int
) -> dict[int, Unscored]:
    """The reasons of the samples that a server blames: a text by index, or a list that has one for each sample."""
    errors = said.get("errors")
    if isinstance(errors, list) and len(errors) == num_samples:
        errors = {str(i): text for i, text in enumerate(errors)}
    if not isinstance(errors, dict):
        return {}
    reasons = {}
    for i in range(num_samples):
        text = errors.get(str(i))
        if text:
            reasons[i] = Unscored(kind, f"{server.name}: {cut(_as_text(text))}")
    return reasons


def _words(response: httpx2.Response) -> str:
    """The status of an answer and what it says."""
    if response.is_redirect:
        target = without_password(response.headers.get("Location", ""))
        found: Any = f"look at {target}, which is not followed"
    else:
        said = _json_object(response)
        found = said.get("error") or said.get("detail") or said.get("message")
    return f"{response.status_code}: {cut(_as_text(found or response.text))}"


def _as_text(said: Any) -> str:
    try:
        return said if isinstance(said, str) else json.dumps(said)
    except RecursionError:  # nested nearly as deep as can be parsed
        return "what is nested too deep to be said"


def _retry_after_s(response: httpx2.Response) -> float | None:
    """The seconds that a server wants to be left alone; None if it does not say."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None
