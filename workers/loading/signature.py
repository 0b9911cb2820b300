"""What a loaded reward model takes of a sample, whether it was sent, and how the model is called."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.errors import ModelLoadError
from tasks.messages import Failure, SampleRequest
from tasks.rewards import BY_NAME, GENERATED, SAMPLE_FIELDS, THEIR_NAMES, no_such_field
from tasks.samples import MEDIA_FIELDS
from workers.base import RewardModel
from workers.texts import cut

log = logging.getLogger(__name__)

MAX_DECLARATION_CHARS = 400
"""Of a declaration that is no list of fields, as its error says it."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a model's `__call__`."""

    has_default: Mapping[str, bool]
    """The arguments that can be given by name, and whether each has a default."""
    takes_rest: bool
    """Whether it has `**kwargs`."""
    looked_up: frozenset[str]
    """Names of fields that its code has as texts where it has `**kwargs`: `kwargs.get("metadata")`."""

    def __contains__(self, name: str) -> bool:
        """Whether a call has a use for an argument of this name."""
        return name in self.has_default or name in self.looked_up


@dataclass(frozen=True, slots=True)
class Signature:
    """The fields of a sample that a model takes, and the arguments of its `__call__` that they are given to."""

    declared: tuple[str, ...]
    """Fields of a sample that its class declares."""
    own_names: Mapping[str, str]
    """By declared field, what the class calls it."""
    fields: tuple[str, ...]
    """The declared fields, and the small ones that its `__call__` names."""
    arguments: Arguments

    def call_with(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """The arguments for a call with these values of each field; None for a field that no sample has.

        As in Flow-Factory, `__call__` gets the fields that it has arguments for. A field that no sample has is left out
        if its argument has a default.
        """
        given: dict[str, Any] = {}
        for field, column in columns.items():
            is_absent = field != "prompt" and all(one is None for one in column)
            value = None if is_absent else column
            named = self._arguments_of(field)
            for name in named:
                if value is not None or not self.arguments.has_default[name]:
                    given[name] = value
            if not named and self.arguments.takes_rest:
                given |= dict.fromkeys(self._keywords_of(field), value)
        return given

    def _arguments_of(self, field: str) -> list[str]:
        """The named arguments that mean a field."""
        names = (field, *_their_names(field))
        return [name for name in names if name in self.arguments.has_default]

    def _keywords_of(self, field: str) -> list[str]:
        """The names that a field has in `**kwargs`."""
        looked_up = self.arguments.looked_up
        names = [name for name in _their_names(field) if name in looked_up]
        return [self.own_names.get(field, field), *names]


def signature_of(model: RewardModel) -> Signature:
    """The fields that a model takes.

    Raises:
        ModelLoadError: It declares a field that no sample has, or its declaration is no list of fields.
    """
    named = _declared(model, "required_fields") + _declared(model, "optional_fields")
    own_names = {THEIR_NAMES.get(name, name): name for name in named}
    for name in own_names:
        if name not in SAMPLE_FIELDS:
            raise ModelLoadError(
                f"{type(model).__name__} declares what is none: {no_such_field(name)}"
            )
    arguments = _arguments(model)
    by_name = [THEIR_NAMES.get(name, name) for name in BY_NAME if name in arguments]
    fields = dict.fromkeys((*own_names, *by_name))
    return Signature(tuple(own_names), own_names, tuple(fields), arguments)


def unsent(
    name: str, signature: Signature, samples: Iterable[SampleRequest]
) -> Failure | None:
    """Why these samples cannot be scored, if the model takes a field that they have and that was not sent; else None.

    To the model such a sample would look like a sample without the field: its reward would be plausible and wrong.

    Args:
        name: Of the reward model, as the config has it.
    """
    withheld: set[str] = set()
    for sample in samples:
        withheld.update(sample.withheld)
    missing = [field for field in signature.fields if field in withheld]
    if not missing:
        _warn_of_named(name, signature, withheld)
        return None
    return Failure(
        kind="failed",
        message=f"{name} takes {' and '.join(missing)}, which the sample has and the trainer did not send: its config "
        "does not list it, or the source of the class could not be read for certain there; say "
        f"`required_fields: [{', '.join(signature.fields)}]` in the config",
    )


def lacks_all_media(signature: Signature, sample: SampleRequest) -> str:
    """The media fields that a model declares, if it scores media and the sample has none of them; else empty."""
    media = [field for field in signature.declared if field in MEDIA_FIELDS]
    if set(media).isdisjoint(GENERATED):
        return ""
    if any(sample.media.get(field) not in (None, ()) for field in media):
        return ""
    return " or ".join(media)


def is_ours(model: RewardModel) -> bool:
    """Whether its class is one of this package. Only of these classes a required field is a demand."""
    return type(model).__module__.partition(".")[0] == "workers"


def _declared(model: RewardModel, attribute: str) -> tuple[str, ...]:
    """The fields that an attribute of a class names: a text, any sequence of texts, a property or a method."""
    value: Any = getattr(model, attribute, None)
    if callable(value):
        value = value()
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        names: tuple[Any, ...] = (value,)
    else:
        names = tuple(value)
    if not all(isinstance(name, str) for name in names):
        found = cut(repr(value), MAX_DECLARATION_CHARS)
        raise ModelLoadError(
            f"{type(model).__name__}.{attribute} must name fields of a sample, found {found}"
        )
    return names


def _arguments(model: RewardModel) -> Arguments:
    try:
        signature = inspect.signature(model.__call__)  # type: ignore[operator]
    except (TypeError, ValueError):  # not a function of Python
        return Arguments({}, takes_rest=True, looked_up=_looked_up(model))
    has_default, takes_rest = {}, False
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            has_default[parameter.name] = parameter.default is not parameter.empty
        elif parameter.kind is parameter.VAR_KEYWORD:
            takes_rest = True
    looked_up = _looked_up(model) if takes_rest else frozenset()
    return Arguments(has_default, takes_rest, looked_up)


def _looked_up(model: RewardModel) -> frozenset[str]:
    """The names of fields that the code of a call has as texts, in functions within it too."""
    function = inspect.unwrap(type(model).__call__)  # type: ignore[operator]
    found: set[str] = set()
    unread: list[Any] = [getattr(function, "__code__", None)]
    while unread:
        for constant in getattr(unread.pop(), "co_consts", ()):
            if isinstance(constant, str):
                found.add(constant)
            elif inspect.iscode(constant):
                unread.append(constant)
    return frozenset(found.intersection((*SAMPLE_FIELDS, *THEIR_NAMES)))


def _their_names(field: str) -> list[str]:
    """What else Flow-Factory calls a field."""
    return [theirs for theirs, ours in THEIR_NAMES.items() if ours == field]


def _warn_of_named(name: str, signature: Signature, withheld: set[str]) -> None:
    """Warn of media that a class has an argument for, or looks up, and does not declare: they are not sent."""
    for field in MEDIA_FIELDS:
        if field in withheld and field in signature.arguments:
            _warn_once(name, field)


@functools.cache
def _warn_once(name: str, field: str) -> None:
    log.warning(
        "not sent reward=%s field=%s reason=its __call__ names it, but its required_fields do not declare it; "
        "declare it if the reward depends on it",
        name,
        field,
    )
