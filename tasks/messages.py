"""What travels between trainers and workers: validated, versioned, msgpack only."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

import msgpack
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tasks.errors import FailureKind, WireError

WIRE_VERSION = 4
"""Raised whenever a worker of the previous version could misread a message of a client of this version."""

MAX_WORDS = 4096
"""Characters of a reason or another text for people; a longer text is cut where it is made and where it is read."""

MOST = 2**53
"""The largest count or time: Lua, in Redis, computes with doubles, which hold no larger integer exactly."""

MAX_ATTEMPT = 10**9
"""The largest attempt: scripts read it from the first 16 bytes of an outcome."""

MAX_TIMEOUT_S = 1e8
"""The largest `timeout_s`, three years; waits of much longer overflow in the operating system."""

MAX_BATCH = 10**9

MAX_SIDE = 2**40
"""The largest length of one axis of media."""

Text = Annotated[str, Field(max_length=4096)]


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable characters")
    return text


Name = Annotated[Text, AfterValidator(_one_line)]
"""A name that logs show: one line, so that no name can look like a line of its own."""

Number = Annotated[int, Field(ge=0, le=MOST)]
"""A number of a message in its queue, or a time on Redis's clock in ms."""

Attempt = Annotated[int, Field(ge=1, le=MAX_ATTEMPT)]

Dtype = Literal["bfloat16", "float16", "float32"]

ImageFormat = Literal["raw", "jpeg", "png", "webp"]

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _encodable(text: Any) -> Any:
    """Text of bounded length without lone surrogates, which names of files and answers of servers may contain."""
    if not isinstance(text, str):
        return text
    if len(text) > MAX_WORDS:
        end = f"... ({len(text)} characters)"
        text = text[: MAX_WORDS - len(end)] + end
    return text.encode("utf-8", "replace").decode()


Words = Annotated[str, BeforeValidator(_encodable)]
"""Text of somebody else's code or server. Lone surrogates in it are replaced: else its whole message could not be
encoded. A text that is longer than `MAX_WORDS` is cut."""


class _Message(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )


class _Answer(_Message):
    """A message from a worker to clients. A field that a newer worker adds is ignored, and the answer is taken."""

    model_config = ConfigDict(extra="ignore")


class MediaRef(_Message):
    """One image, video or waveform in the payload store."""

    name: Text
    """Its key in the store."""
    digest: Text
    """Of the stored bytes, as `tasks.media.digest` makes it; the checksum in it is compared after the fetch."""
    shape: Annotated[
        tuple[Annotated[int, Field(gt=0, le=MAX_SIDE)], ...],
        Field(min_length=1, max_length=4),
    ]
    """`(H, W, 3)`, `(T, H, W, 3)`, or `(C, T)` of audio. Its product must fit the bytes."""
    format: Literal["raw", "jpeg", "float32"]
    """Raw uint8, JPEG files (one a frame, each behind its length as 4 bytes), or raw float32."""


Media = MediaRef | tuple[MediaRef, ...]


class Failure(_Message):
    """Why there is no reward."""

    kind: FailureKind
    message: Words


class SampleRequest(_Message):
    """One sample of a chunk. Made by a client's sender, read by a worker."""

    address: Text
    """Where its outcome goes: `run:fingerprint:key`."""
    prompt: str
    media: dict[str, Media]
    """By field of `Sample`; only the fields that the reward model declares."""
    metadata: dict[str, Any] = {}
    fps: Annotated[int, Field(gt=0)] | Rate | None = None
    """Frames a second of its videos."""
    sample_rate: Annotated[int, Field(gt=0)] | Rate | None = None
    """Of its audio, in Hz."""
    withheld: tuple[Text, ...] = ()
    """Fields that the sample has and that were not sent, since its reward was not known to declare them."""
    attempt: Attempt = 1
    """Answered by any reward, or by a failure of this attempt or later."""
    members: tuple[SampleRequest, ...] = ()
    """Of a whole group that goes to a groupwise model: its members in slot order. The group has no media of its own."""
    failure: Failure | None = None
    """A member that cannot be scored, and why: the others are scored without it."""
    shared_key: Text = ""
    """Of a group that several ranks have filled: where its slots are in Redis (`GroupSlots.key`)."""


class RewardCall(_Message):
    """The computation that a chunk asks for: all that a worker needs to build the reward model."""

    name: Name
    """The user's name for it, for logs and `extra`."""
    model: Name
    """A built-in's canonical name, or a dotted path."""
    fingerprint: Text
    instance: Text = ""
    """Cache key of the model on a worker: the fingerprint without the code."""
    code: tuple[tuple[Text, Text], ...] = ()
    """Of a class of the user's: each module of its code with the hash of its source, as the trainer read them."""
    version: Text
    dtype: Dtype
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    timeout_s: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S, allow_inf_nan=False)]
    image_format: ImageFormat
    options: dict[str, Any]


class _Request(_Message):
    """What a message asks for. In the payload store under its id, for the length of the step."""

    wire: int = WIRE_VERSION
    id: Text
    run: Text
    label: Text
    """For people: `OCR x 16, run demo step 3`."""
    sent_ms: Number
    """On Redis's clock: when it was put together."""
    deadline_ms: Number
    """On Redis's clock. After this time nobody waits for the outcomes any more."""
    reward: RewardCall
    """The computation of the samples; for a group, of its parts."""


class ScoreRequest(_Request):
    """A chunk: samples to score for one reward."""

    samples: Annotated[tuple[SampleRequest, ...], Field(min_length=1)]


class GroupRequest(_Request):
    """A group whose reward is made of the outcomes of its parts: ranks of its members, or comparisons won.

    A group that is larger than one chunk has a `ScoreRequest` for each of its chunks as well.
    """

    how: Literal["rank", "wins"]
    ties: Literal["mean", "ordinal"] = "mean"
    address: Text
    """Where the group's outcome goes."""
    attempt: Attempt = 1
    members: Annotated[tuple[SampleRequest, ...], Field(min_length=1)]
    """In slot order. For ranks they are the parts."""
    comparisons: tuple[SampleRequest, ...] = ()
    """For wins: the parts, each with the media of two members."""
    pairs: tuple[tuple[int, int], ...] = ()
    """For each comparison, which members it compares."""
    shared_key: Text = ""
    """If several ranks have filled the group: where its slots are in Redis (`GroupSlots.key`)."""

    @model_validator(mode="after")
    def _pairs_of_members(self) -> GroupRequest:
        if len(self.pairs) != len(self.comparisons):
            raise ValueError(
                f"{len(self.pairs)} pairs for {len(self.comparisons)} comparisons"
            )
        for pair in self.pairs:
            if not all(0 <= index < len(self.members) for index in pair):
                raise ValueError(
                    f"the pair {pair} is not of the {len(self.members)} members"
                )
        return self

    @property
    def parts(self) -> tuple[SampleRequest, ...]:
        """The samples that are scored for this group."""
        if self.how == "wins":
            return self.comparisons
        return tuple(member for member in self.members if member.failure is None)

    def chunk(self) -> ScoreRequest:
        """The parts as one chunk."""
        return ScoreRequest(
            id=self.id,
            run=self.run,
            label=self.label,
            sent_ms=self.sent_ms,
            deadline_ms=self.deadline_ms,
            reward=self.reward,
            samples=self.parts,
        )


class Note(_Answer):
    """What keeps a worker from answering a request: no outcome, the client acts on it. Made by a worker."""

    reason: Literal["gone", "store", "wire", "busy", "stale", "error"]
    """The request or a payload is not in the store; the worker uses another store; it speaks another wire version;
    a judge's budget is in use (send it again after a pause); the user's code changed since the worker loaded it, which
    ends (send it again to another); the task raised, and not for one of its samples."""
    worker: Words
    detail: Words
    store: Text = ""
    """Identity of the worker's payload store."""


class Outcome(_Answer):
    """A finite reward, or the reason there is none; exactly one of them. Made by a worker, read by clients.

    A group's outcome has the outcomes of its members instead, in slot order.
    """

    reward: float | None = None
    failure: Failure | None = None
    members: tuple[Outcome, ...] = ()
    attempt: Attempt = 1
    info: dict[str, Any] = {}
    """What the reward model returns beside the reward: judge text, aspects, raw score."""
    origin: dict[str, Any] = {}
    """Where it was computed: worker, device (of a model that uses one), versions, and the seconds it took. Warnings
    that libraries gave while the model was loaded are under `load_warnings`."""
    shared_key: Text = ""
    """Of a group that several ranks have filled: the slots that it was computed for. To a rank that fills these slots
    too it is the answer, not a failure of an earlier step."""

    @property
    def is_final(self) -> bool:
        """Whether it is an answer for good: a reward, or the outcome of a group whose members all have a reward."""
        if self.members:
            return all(member.reward is not None for member in self.members)
        return self.reward is not None

    @model_validator(mode="after")
    def _exactly_one(self) -> Outcome:
        given = [self.reward is not None, self.failure is not None, bool(self.members)]
        if sum(given) != 1:
            raise ValueError(
                "an outcome is a reward, a failure, or a group's, exactly one of them"
            )
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"a reward is finite, found {self.reward}")
        return self


class Heartbeat(_Message):
    """The queues and models of a worker, and its state. Written every few seconds with a short TTL; read by clients."""

    wire: int
    node: Text
    queues: tuple[str, ...]
    host: Text
    pid: int
    store: Text
    """Identity of its payload store."""
    state: Literal["ready", "loading"]
    loading: tuple[str, ...] = ()
    """Fingerprints whose models are being loaded now."""
    loaded: tuple[str, ...] = ()
    """Fingerprints whose models are in memory."""
    models: tuple[str, ...] = ()
    """Names of the reward models in memory."""
    unanswered: tuple[Words, ...] = ()
    """Which preloaded rewards wait for a judge or a reward server that has not answered yet, and why."""
    stuck: Words = ""
    """Why the worker takes no message although it could; empty if it does. It ends soon, to be started again."""


M = TypeVar("M", bound=_Message)


def pack(message: BaseModel) -> bytes:
    """msgpack bytes of a message."""
    packed: bytes = msgpack.packb(message.model_dump(mode="python"))
    return packed


def unpack(model: type[M], data: bytes | bytearray) -> M:
    """The message in `data`.

    Raises:
        WireError: Other bytes, another wire version, or unknown or missing fields.
    """
    try:
        fields = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not a {model.__name__}: {error}") from None
    is_mapping = isinstance(fields, dict)
    wire = fields.get("wire", WIRE_VERSION) if is_mapping else WIRE_VERSION
    if wire != WIRE_VERSION:
        raise WireError(
            f"a {model.__name__} of wire version {wire}; this side speaks {WIRE_VERSION}"
        )
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise WireError(
            f"not a {model.__name__} of wire version {WIRE_VERSION}: {field}: {first['msg']}"
        ) from None


# An outcome in Redis starts with a short header that scripts there can read: `R;` if it is final, `F<attempt>;` if
# another attempt may replace it. msgpack follows.


def pack_outcome(outcome: Outcome) -> bytes:
    """The bytes of an outcome in Redis."""
    header = b"R;" if outcome.is_final else b"F%d;" % outcome.attempt
    return header + pack(outcome)


def unpack_outcome(data: bytes) -> Outcome:
    """The outcome in bytes from Redis. Raises `WireError`."""
    return unpack(Outcome, data.partition(b";")[2])
