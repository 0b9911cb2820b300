"""What a class of the user's declares, read from its source without importing it (it may need torch, or a GPU)."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

MAX_BASES = 20
"""Base classes followed within one module."""


@dataclass(frozen=True, slots=True)
class Declared:
    """Class attributes of a reward model; None where neither the class nor its bases in its module say."""

    kind: Literal["pointwise", "groupwise"] | None
    required_fields: tuple[str, ...] | None
    optional_fields: tuple[str, ...] | None
    queue: str | None


@cache
def declared_by(path: str) -> Declared | None:
    """What the class of a dotted path declares; None if its source is not to be found on this host."""
    module, _, name = path.rpartition(".")
    source = _source(module) if module else None
    if source is None:
        return None
    classes = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        return None
    values: dict[str, Any] = {}
    kind: Literal["pointwise", "groupwise"] | None = None
    line, seen = [name], 0
    while line and seen < MAX_BASES:
        seen += 1
        current = line.pop(0)
        if current in classes:
            values = {**_constants(classes[current]), **values}
            line += [_last_name(base) for base in classes[current].bases]
        elif kind is None and current.endswith("GroupwiseRewardModel"):
            kind = "groupwise"
        elif kind is None and current.endswith("PointwiseRewardModel"):
            kind = "pointwise"
    return Declared(kind, _texts(values, "required_fields"), _texts(values, "optional_fields"), values.get("queue"))


def _source(module: str) -> ast.Module | None:
    """The parsed source of a module. Its packages are found by name, none is imported."""
    folders = [os.getcwd(), *sys.path]
    parts = module.split(".")
    for folder in folders:
        base = Path(folder).joinpath(*parts)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                try:
                    return _parse(file.read_text(encoding="utf-8"))
                except (SyntaxError, UnicodeDecodeError, OSError):
                    return None
    spec = None
    if module in sys.modules:
        spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin and spec.origin.endswith(".py"):
        return _parse(Path(spec.origin).read_text(encoding="utf-8"))
    return None


_parsing = threading.Lock()
"""Python 3.11 counts the depth of a syntax tree for all threads together: SystemError if two parse at once."""


def _parse(source: str) -> ast.Module:
    with _parsing:
        return ast.parse(source)


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    """Class attributes that are written out."""
    found = {}
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets = [statement.target]
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
                try:
                    found[target.id] = ast.literal_eval(statement.value)
                except ValueError:
                    continue
    return found


def _last_name(base: ast.expr) -> str:
    """`PointwiseRewardModel` of `workers.PointwiseRewardModel`."""
    return base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""


def _texts(values: dict[str, Any], name: str) -> tuple[str, ...] | None:
    value = values.get(name)
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, tuple | list) and all(isinstance(v, str) for v in value) else None
