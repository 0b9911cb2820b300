"""What a class of the user's declares, read from its source without importing it (it may need torch, or a GPU).

What cannot be read with certainty is unknown, never absent: a class has more ways to say something than a reader of its
source can follow. The worker, which has the class itself, compares what it declares with what it was sent.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Literal

from tasks.source.class_body import AssignedError, last_name
from tasks.source.constants import UnreadableError
from tasks.source.lineage import ABSENT, MAX_STEPS, OURS, Class, class_named
from tasks.source.modules import module_of

Kind = Literal["pointwise", "groupwise"]


@dataclass(frozen=True, slots=True)
class Declared:
    """What a class says of itself; None where that cannot be read."""

    kind: Kind | None
    required_fields: tuple[str, ...] | None
    optional_fields: tuple[str, ...] | None
    arguments: frozenset[str] | None
    """Names of the arguments of its `__call__`; where it has `**kwargs` with every text in it, which may be a name that
    it looks up there."""
    queue: str | None
    """None too where it names none."""
    unread_queue: str = ""
    """Why it may name another queue."""
    is_queue_assigned: bool = False
    """Whether it assigns `queue` for all to see, and only the value cannot be read."""


def declared_by(path: str) -> Declared | None:
    """What the class of a dotted path declares; None if its source is not to be found on this host."""
    module_name, _, name = path.rpartition(".")
    module = module_of(module_name) if module_name else None
    if module is None:
        return None
    found = class_named(module, name)
    if found is None:
        is_told = "it is not one plain class statement"
        return Declared(
            None, None, None, None, None, is_told if module.binds(name) else ""
        )
    return _declared(found)


def _declared(cls: Class) -> Declared:
    queue, unread, is_assigned = None, "", False
    try:
        found = cls.look_up("queue")
        if isinstance(found, ast.FunctionDef):
            raise AssignedError("it is a function")
        if found is not ABSENT and found is not None and not isinstance(found, str):
            raise AssignedError(f"queue = {found!r}")
        queue = found if isinstance(found, str) else None
    except UnreadableError as error:
        unread, is_assigned = str(error), isinstance(error, AssignedError)
    return Declared(
        _kind_of(cls), _fields(cls, "required_fields"), _fields(cls, "optional_fields"), _arguments(cls), queue, unread,
        is_assigned,
    )  # fmt: skip


def _fields(cls: Class, name: str) -> tuple[str, ...] | None:
    try:
        value = cls.look_up(name)
    except UnreadableError:
        return None
    if isinstance(value, str):
        return (value,)
    return (
        tuple(value)
        if isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)
        else None
    )


def _arguments(cls: Class) -> frozenset[str] | None:
    try:
        call = cls.look_up("__call__")
    except UnreadableError:
        return None
    if not isinstance(call, ast.FunctionDef):
        return frozenset() if call is ABSENT else None
    named = {
        a.arg for a in (*call.args.posonlyargs, *call.args.args, *call.args.kwonlyargs)
    }
    if call.args.kwarg is not None:
        constants = (
            node.value for node in ast.walk(call) if isinstance(node, ast.Constant)
        )
        named.update(value for value in constants if isinstance(value, str))
    return frozenset(named)


def _kind_of(cls: Class) -> Kind | None:
    """Of its bases, by their names where they cannot be followed: the worker checks it."""
    ours: set[str] = set()
    named: set[str] = set()
    left: list[Class | str] = [cls]
    for _ in range(MAX_STEPS):
        if not left:
            break
        current = left.pop()
        if isinstance(current, str):
            ours.update(OURS[current])
            continue
        for base in current.node.bases:
            try:
                found = current.follow(base)
            except UnreadableError:
                named.add(last_name(base))
            else:
                left += [found] if found is not None else []
    for kind in ("groupwise", "pointwise"):
        if f"{kind.capitalize()}RewardModel" in ours:
            return kind  # type: ignore[return-value]
    for kind in ("groupwise", "pointwise"):
        if any(name.endswith(f"{kind.capitalize()}RewardModel") for name in named):
            return kind  # type: ignore[return-value]
    return None
