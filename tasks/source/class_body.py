"""What the body of a class statement, and the code around it, make of the attributes of the class; nothing is run."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from typing import Any

from tasks.source.constants import Named, UnreadableError, value_of, written
from tasks.source.files import last_name
from tasks.source.modules import STAR, Module, bound_by

_RUNS_CODE = {"exec", "eval", "locals", "vars", "globals", "setattr"}
"""Called in the body of a class they may bind any name there."""


class AssignedError(UnreadableError):
    """The attribute is assigned; its value cannot be read."""


def values_in(body: list[ast.stmt], named: Named) -> dict[str, Any]:
    """By name, the value after the body of a class has run, why the value is unknown, or the statement of a function.

    Args:
        named: The value of a name outside of the body.
    """
    values: dict[str, Any] = {}
    for statement in body:
        _run(statement, values, named)
    return values


def assignments_from_outside(module: Module, name: str) -> Iterator[ast.AST]:
    """Where a module assigns an attribute of one of its classes."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            owner = node.value if _is_assigned(node, name) else None
        elif isinstance(node, ast.Call):
            owner = _owner_set(node, name)
        else:
            continue
        if owner is not None and _is_class(module, owner):
            yield node


def _owner_set(call: ast.Call, name: str) -> ast.expr | None:
    """Whose attribute a call sets, of `setattr(owner, name, value)`."""
    if not _is_call_of(call, {"setattr"}) or len(call.args) != 3:
        return None
    owner, attribute, _ = call.args
    is_this = isinstance(attribute, ast.Constant) and attribute.value == name
    return owner if is_this else None


def is_mentioned(module: Module, name: str) -> bool:
    """Whether code of the module speaks of an attribute in another way than by assigning it in the body of a class."""
    return any(_mentions(node, name) for node in ast.walk(module.tree))


def _mentions(node: ast.AST, name: str) -> bool:
    """Whether one node names an attribute as a text or an argument, assigns it, or calls a method of its value."""
    if isinstance(node, ast.Constant):
        return bool(node.value == name)
    if isinstance(node, ast.keyword):
        return node.arg == name
    if isinstance(node, ast.Attribute):
        # Of `self` too: an instance may say otherwise than its class.
        return _is_assigned(node, name)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        changed = node.func.value  # `Mine.required_fields.append(...)`
        return isinstance(changed, ast.Attribute) and changed.attr == name
    return False


def _is_assigned(node: ast.Attribute, name: str) -> bool:
    """Whether an attribute has this name, and is assigned or deleted here."""
    return node.attr == name and not isinstance(node.ctx, ast.Load)


def assigned(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """The name and the value of a plain assignment."""
    target: ast.expr | None = None
    value: ast.expr | None = None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign):
        target, value = statement.target, statement.value
    elif isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
        target, value = statement.target, _sum_of(statement)

    if not isinstance(target, ast.Name):
        return None, None
    return target.id, value


def _sum_of(statement: ast.AugAssign) -> ast.expr:
    """`names + more` of `names += more`."""
    now = statement.target
    if isinstance(now, ast.Name):
        now = ast.copy_location(ast.Name(now.id, ast.Load()), now)
    return ast.copy_location(ast.BinOp(now, ast.Add(), statement.value), statement)


def _is_class(module: Module, node: ast.expr) -> bool:
    name = last_name(node)
    binder = module.binder(name)
    is_alias = isinstance(binder, ast.Assign) and isinstance(
        binder.value, ast.Name | ast.Attribute
    )
    return name == "cls" or isinstance(binder, ast.ClassDef) or is_alias


def _run(statement: ast.stmt, values: dict[str, Any], named: Named) -> None:
    """Note what one statement of the body makes of the names there."""
    if isinstance(statement, ast.FunctionDef):
        values[statement.name] = statement
        return
    target, value = assigned(statement)
    if target is not None and value is None:
        return  # `required_fields: tuple[str, ...]` binds nothing
    unknown = UnreadableError(written(statement))
    found: Any = unknown
    if target is not None and value is not None:
        with contextlib.suppress(UnreadableError, RecursionError):
            found = value_of(value, lambda node: _named_within(node, values, named))
    values.update(dict.fromkeys(_changed_by(statement, values), unknown))
    if target is not None:
        values[target] = found


def _named_within(node: ast.expr, values: dict[str, Any], named: Named) -> Any:
    """The value of a name within the body."""
    if not isinstance(node, ast.Name) or node.id not in values:
        return named(node)
    found = values[node.id]
    if isinstance(found, UnreadableError | ast.AST):
        raise UnreadableError(node.id)
    return list(found) if isinstance(found, list) else found


def _changed_by(statement: ast.stmt, values: dict[str, Any]) -> set[str]:
    """Names of a class body that a statement binds or may change; `STAR` where it runs code that may bind any."""
    changed = bound_by(statement)
    if isinstance(statement, ast.AsyncFunctionDef | ast.ClassDef):
        return changed
    if any(_is_call_of(node, _RUNS_CODE) for node in ast.walk(statement)):
        changed.add(STAR)
    if isinstance(statement, ast.Expr):
        changed |= _lists_named_in(statement, values)
    return changed


def _lists_named_in(statement: ast.Expr, values: dict[str, Any]) -> set[str]:
    """Names of lists in an expression by itself, which may be a call of a method that changes the list."""
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return {name for name in names if isinstance(values.get(name), list)}


def _is_call_of(node: ast.AST, names: set[str]) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in names
    )
