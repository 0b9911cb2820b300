"""What a class of the user's declares, read from its source without importing it (it may need torch, or a GPU).

What cannot be read with certainty is unknown, never absent: a class has more ways to say something than a reader of its
source can follow. The worker, which has the class itself, compares what it declares with what it was sent.
"""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tasks.constants import UnreadableError, value_of, written
from tasks.modules import STAR, Module, bound_by, module_of

Kind = Literal["pointwise", "groupwise"]

MAX_STEPS = 50
"""Imports and bases followed for one class."""

_OURS: dict[str, tuple[str, ...]] = {
    "RewardModel": ("RewardModel",),
    "PointwiseRewardModel": ("PointwiseRewardModel", "RewardModel"),
    "GroupwiseRewardModel": ("GroupwiseRewardModel", "PointwiseRewardModel", "RewardModel"),
}
"""The classes of `workers.base` that are subclassed, with their own bases."""

_OUR_MODULES = ("workers", "workers.base", "rewardq")

_OUR_VALUES = {"required_fields": ("prompt", "image"), "optional_fields": ()}
"""What `workers.base.RewardModel` declares; a test compares them."""

_SAY_NOTHING = {*sys.stdlib_module_names, "torch", "transformers"}
"""Packages whose classes have no attribute of the names that are looked for here."""

_RUNS_CODE = {"exec", "eval", "locals", "vars", "globals", "setattr"}
"""Called in the body of a class they may bind any name there."""

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Declared:
    """What a class says of itself; None where that cannot be read."""

    kind: Kind | None
    required_fields: tuple[str, ...] | None
    optional_fields: tuple[str, ...] | None
    arguments: frozenset[str] | None
    """Names of the arguments of its `__call__`."""
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
    statement = module.binder(name)
    if not isinstance(statement, ast.ClassDef):
        is_told = "it is not one plain class statement"
        return Declared(None, None, None, None, None, is_told if module.binds(name) else "")
    return _declared(_Class(module, statement))


def _declared(cls: _Class) -> Declared:
    queue, unread, is_assigned = None, "", False
    try:
        found = cls.look_up("queue")
        if isinstance(found, ast.FunctionDef):
            raise _AssignedError("it is a function")
        if found is not _ABSENT and found is not None and not isinstance(found, str):
            raise _AssignedError(f"queue = {found!r}")
        queue = found if isinstance(found, str) else None
    except UnreadableError as error:
        unread, is_assigned = str(error), isinstance(error, _AssignedError)
    return Declared(
        _kind_of(cls), _fields(cls, "required_fields"), _fields(cls, "optional_fields"), _arguments(cls), queue, unread,
        is_assigned,
    )  # fmt: skip


def _fields(cls: _Class, name: str) -> tuple[str, ...] | None:
    try:
        value = cls.look_up(name)
    except UnreadableError:
        return None
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, tuple | list) and all(isinstance(v, str) for v in value) else None


def _arguments(cls: _Class) -> frozenset[str] | None:
    try:
        call = cls.look_up("__call__")
    except UnreadableError:
        return None
    if not isinstance(call, ast.FunctionDef):
        return frozenset() if call is _ABSENT else None
    return frozenset(a.arg for a in (*call.args.posonlyargs, *call.args.args, *call.args.kwonlyargs))


def _kind_of(cls: _Class) -> Kind | None:
    """Of its bases, by their names where they cannot be followed: the worker checks it."""
    ours: set[str] = set()
    named: set[str] = set()
    left: list[_Class | str] = [cls]
    for _ in range(MAX_STEPS):
        if not left:
            break
        current = left.pop()
        if isinstance(current, str):
            ours.update(_OURS[current])
            continue
        for base in current.node.bases:
            try:
                found = current.follow(base)
            except UnreadableError:
                named.add(_last_name(base))
            else:
                left += [found] if found is not None else []
    for kind in ("groupwise", "pointwise"):
        if f"{kind.capitalize()}RewardModel" in ours:
            return kind  # type: ignore[return-value]
    for kind in ("groupwise", "pointwise"):
        if any(name.endswith(f"{kind.capitalize()}RewardModel") for name in named):
            return kind  # type: ignore[return-value]
    return None


class _AssignedError(UnreadableError):
    """The attribute is assigned; its value cannot be read."""


class _Class:
    """A class statement in its module."""

    def __init__(self, module: Module, node: ast.ClassDef) -> None:
        self.module, self.node = module, node

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Class) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, int]:
        return self.module.name, self.node.lineno

    def look_up(self, name: str, num_steps: int = 0) -> Any:
        """The value of a class attribute, along the bases; a function as its statement; `_ABSENT` if none has it.

        Raises:
            UnreadableError: It may be another than what is written here.
        """
        if num_steps > MAX_STEPS:
            raise UnreadableError("more bases than are followed")
        found = self._own(name)
        if found is not _ABSENT:
            return found
        bases = [self.follow(base) for base in self.node.bases]
        if len(bases) == 1:
            return _value_of_base(bases[0], name, num_steps)
        for one in _merged_bases(self, bases):
            found = one._own(name) if isinstance(one, _Class) else _our_value(one, name)
            if found is not _ABSENT:
                return found
        return _ABSENT

    def follow(self, base: ast.expr) -> _Class | str | None:
        """The class that a base names: one with a source, the name of one of ours, or None where it says nothing.

        Raises:
            UnreadableError: It cannot be found by reading.
        """
        if isinstance(base, ast.Subscript):  # `Generic[T]`
            found = _find(self.module, base.value)
            if found is None:
                return None
            raise UnreadableError(f"its base {written(base)} cannot be followed")
        return _find(self.module, base)

    def _own(self, name: str) -> Any:
        """What its own body says of an attribute."""
        if name != "queue":
            self._refuse_doubts(name)
        elif any(self._assignments_from_outside(name)):
            raise _AssignedError("it is assigned outside the body of its class")
        value = self._body.get(name, _ABSENT)
        if isinstance(value, UnreadableError):
            raise _AssignedError(str(value))
        if _ABSENT is value and STAR in self._body and name != "queue":
            raise UnreadableError("the body of its class runs code that may bind any name")
        return value

    @cached_property
    def _body(self) -> dict[str, Any]:
        """By name, the value that the body leaves it with, why that is unknown, or a function's statement."""
        values: dict[str, Any] = {}
        for statement in self.node.body:
            self._run(statement, values)
        return values

    def _run(self, statement: ast.stmt, values: dict[str, Any]) -> None:
        """Note what one statement of the body makes of the names there."""
        if isinstance(statement, ast.FunctionDef):
            values[statement.name] = statement
            return
        target, value = _assigned(statement)
        if target is not None and value is None:
            return  # `required_fields: tuple[str, ...]` binds nothing
        unknown = UnreadableError(written(statement))
        found: Any = unknown
        if target is not None and value is not None:
            with contextlib.suppress(UnreadableError, RecursionError):
                found = value_of(value, lambda node: self._named(node, values))
        values.update(dict.fromkeys(_changed_by(statement, values), unknown))
        if target is not None:
            values[target] = found

    def _named(self, node: ast.expr, values: dict[str, Any]) -> Any:
        """The value of a name within the body."""
        if not isinstance(node, ast.Name) or node.id not in values:
            return _named_in(self.module, node)
        found = values[node.id]
        if isinstance(found, UnreadableError | ast.AST):
            raise UnreadableError(node.id)
        return list(found) if isinstance(found, list) else found

    def _refuse_doubts(self, name: str) -> None:
        """Raise `UnreadableError` where something else than its body may say what the attribute is."""
        if self.node.decorator_list:
            raise UnreadableError(f"the class has a decorator, {written(self.node.decorator_list[0])}")
        for keyword in self.node.keywords:
            if keyword.arg != "metaclass" or _last_name(keyword.value) != "ABCMeta":
                raise UnreadableError(f"the class is made with {written(keyword)}")
        for special in ("__init_subclass__", "__getattribute__", "__getattr__"):
            if special in self._body:
                raise UnreadableError(f"the class has a {special} of its own")
        if name != "__call__" and (any(self._assignments_from_outside(name)) or _is_mentioned(self.module, name)):
            raise UnreadableError("it is assigned outside the body of its class")

    def _assignments_from_outside(self, name: str) -> Iterator[ast.AST]:
        """Where the module assigns an attribute of a class."""
        for node in ast.walk(self.module.tree):
            if isinstance(node, ast.Attribute) and node.attr == name and not isinstance(node.ctx, ast.Load):
                if self._is_class(node.value):
                    yield node
            elif isinstance(node, ast.Call) and _is_call_of(node, {"setattr"}) and len(node.args) == 3:
                about = node.args[1]
                if isinstance(about, ast.Constant) and about.value == name and self._is_class(node.args[0]):
                    yield node

    def _is_class(self, node: ast.expr) -> bool:
        name = _last_name(node)
        return name == "cls" or isinstance(self.module.binder(name), ast.ClassDef)


def _assigned(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """The name and the value of a plain assignment."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    elif isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
        target = statement.target
        if isinstance(target, ast.Name):
            now = ast.copy_location(ast.Name(target.id, ast.Load()), target)
            return target.id, ast.copy_location(ast.BinOp(now, ast.Add(), statement.value), statement)
    else:
        return None, None
    return (target.id, statement.value) if isinstance(target, ast.Name) else (None, None)


def _changed_by(statement: ast.stmt, values: dict[str, Any]) -> set[str]:
    """Names of a class body that a statement binds or may change; `STAR` where it runs code that may bind any."""
    changed = bound_by(statement)
    if isinstance(statement, ast.AsyncFunctionDef | ast.ClassDef):
        return changed
    for node in ast.walk(statement):
        if _is_call_of(node, _RUNS_CODE):
            changed.add(STAR)
        is_list = isinstance(node, ast.Name) and isinstance(values.get(node.id), list)
        if is_list and isinstance(statement, ast.Expr):  # a method of a list may change it
            changed.add(node.id)  # type: ignore[attr-defined]
    return changed


def _is_call_of(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _is_mentioned(module: Module, name: str) -> bool:
    """Whether code of the module speaks of an attribute in another way than by assigning it in the body of a class."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and node.value == name:
            return True
        if isinstance(node, ast.keyword) and node.arg == name:
            return True
        if isinstance(node, ast.Attribute) and node.attr == name and not isinstance(node.ctx, ast.Load):
            return True  # of `self` too: an instance may say otherwise than its class
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changed = node.func.value  # `Mine.required_fields.append(...)`
            if isinstance(changed, ast.Attribute) and changed.attr == name:
                return True
    return False


def _value_of_base(base: _Class | str | None, name: str, num_steps: int) -> Any:
    if base is None:
        return _ABSENT
    return _our_value(base, name) if isinstance(base, str) else base.look_up(name, num_steps + 1)


def _our_value(ours: str, name: str) -> Any:
    """What one of our own base classes says of an attribute, itself or by its bases."""
    return _OUR_VALUES.get(name, _ABSENT) if "RewardModel" in _OURS[ours] else _ABSENT


def _merged_bases(cls: _Class, bases: list[_Class | str | None]) -> list[_Class | str]:
    """The classes after `cls` in the order in which Python looks attributes up (C3).

    Raises:
        UnreadableError: A base of a base cannot be found, or Python would refuse them.
    """
    return _linear(cls, bases, 0)[1:]


def _linear(cls: _Class | str, bases: list[_Class | str | None], num_steps: int) -> list[_Class | str]:
    if num_steps > MAX_STEPS:
        raise UnreadableError("more bases than are followed")
    known = [base for base in bases if base is not None]
    lines = [_line_of(base, num_steps) for base in known] + [known]
    merged: list[_Class | str] = [cls]
    while any(lines):
        lines = [line for line in lines if line]
        tails = [one for line in lines for one in line[1:]]
        following = next((line[0] for line in lines if line[0] not in tails), None)
        if following is None:
            raise UnreadableError("its bases have no common order")
        merged.append(following)
        lines = [[one for one in line if one != following] for line in lines]
    return merged


def _line_of(base: _Class | str, num_steps: int) -> list[_Class | str]:
    if isinstance(base, str):
        return list(_OURS[base])
    return _linear(base, [base.follow(b) for b in base.node.bases], num_steps + 1)


def _named_in(module: Module, node: ast.expr, num_steps: int = 0) -> Any:
    """The value of a constant of a module, of one that it imports, or of an attribute of a class.

    Raises:
        UnreadableError: It is bound more than once, may change, or is nothing of these.
    """
    if isinstance(node, ast.Attribute):
        return _attribute(module, node, num_steps)
    unknown = UnreadableError(written(node))
    if not isinstance(node, ast.Name) or num_steps > MAX_STEPS:
        raise unknown
    statement = module.binder(node.id)
    if isinstance(statement, ast.ImportFrom):
        source, original = _origin(module, statement, node.id)
        return _named_in(source, ast.Name(original, ast.Load()), num_steps + 1)
    target, value = _assigned(statement) if isinstance(statement, ast.Assign | ast.AnnAssign) else (None, None)
    if target is None or value is None:
        raise unknown
    found = value_of(value, lambda inner: _named_in(module, inner, num_steps + 1))
    if not isinstance(found, str | tuple):  # a list may be changed by whoever has it
        raise unknown
    return found


def _attribute(module: Module, node: ast.Attribute, num_steps: int) -> Any:
    """`Base.required_fields` of a class, or `names.COMMON` of a module."""
    other = _module_named(module, node.value)
    if other is not None:
        return _named_in(other, ast.Name(node.attr, ast.Load()), num_steps + 1)
    base = _find(module, node.value, num_steps + 1)
    found = _value_of_base(base, node.attr, num_steps + 1)
    if found is _ABSENT or isinstance(found, ast.AST):
        raise UnreadableError(written(node))
    return found


def _find(module: Module, node: ast.expr, num_steps: int = 0) -> _Class | str | None:
    """The class that an expression names in a module; the name of one of ours; None where it says nothing of ours.

    Raises:
        UnreadableError: It cannot be found by reading.
    """
    unknown = UnreadableError(f"{written(node)} cannot be followed")
    if num_steps > MAX_STEPS:
        raise unknown
    if isinstance(node, ast.Attribute):
        return _in_module(_path_of(module, node.value), node.attr, unknown, num_steps)
    if not isinstance(node, ast.Name):
        raise unknown
    if module.name in _OUR_MODULES and node.id in _OURS:
        return node.id
    statement = module.binder(node.id)
    if isinstance(statement, ast.ClassDef):
        return _Class(module, statement)
    if isinstance(statement, ast.ImportFrom):
        return _in_module(module.imported_from(statement), _original(statement, node.id), unknown, num_steps)
    if node.id == "object" and not module.binds("object"):
        return None
    raise unknown


def _in_module(path: str, name: str, unknown: UnreadableError, num_steps: int) -> _Class | str | None:
    """The class of a name in the module of a path."""
    if path in _OUR_MODULES and name in _OURS:
        return name
    if path.partition(".")[0] in _SAY_NOTHING:
        return None
    source = module_of(path) if path else None
    if source is None:
        raise unknown
    return _find(source, ast.Name(name, ast.Load()), num_steps + 1)


def _path_of(module: Module, node: ast.expr) -> str:
    """The dotted name of the module that an expression names; empty if it names none for certain."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    statement = module.binder(node.id) if isinstance(node, ast.Name) else None
    if isinstance(node, ast.Name) and isinstance(statement, ast.ImportFrom):
        return ".".join([module.imported_from(statement), _original(statement, node.id), *parts])
    if isinstance(node, ast.Name) and isinstance(statement, ast.Import):
        for alias in statement.names:
            if alias.asname == node.id:
                return ".".join([alias.name, *parts])
        return ".".join([node.id, *parts])
    return ""


def _module_named(module: Module, node: ast.expr) -> Module | None:
    path = _path_of(module, node)
    return module_of(path) if path else None


def _origin(module: Module, statement: ast.ImportFrom, name: str) -> tuple[Module, str]:
    source = module_of(module.imported_from(statement))
    if source is None:
        raise UnreadableError(name)
    return source, _original(statement, name)


def _original(statement: ast.ImportFrom, name: str) -> str:
    """What the other module calls it."""
    return next((alias.name for alias in statement.names if (alias.asname or alias.name) == name), name)


def _last_name(base: ast.expr) -> str:
    """`PointwiseRewardModel` of `workers.PointwiseRewardModel`."""
    return base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""
