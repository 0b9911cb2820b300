"""A module as it is written: its syntax tree, and which statement binds each of its names."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from tasks.source.files import find_source, parse

STAR = "*"
"""Bound by `from x import *`: any name."""

_NEW_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(eq=False)
class Module:
    """A module as it is written."""

    name: str
    is_package: bool
    tree: ast.Module

    @cached_property
    def _binders(self) -> dict[str, list[ast.stmt]]:
        found: dict[str, list[ast.stmt]] = {}
        for statement in self.tree.body:
            for name in bound_by(statement):
                found.setdefault(name, []).append(statement)
        return found

    def binder(self, name: str) -> ast.stmt | None:
        """The one statement of the module that binds `name`; None if there is none, or if others may bind it anew."""
        binders = self._binders.get(name, [])
        if len(binders) != 1:
            return None
        stars = self._binders.get(STAR, [])
        if any(star.lineno > binders[0].lineno for star in stars):
            return None
        return binders[0]

    def binds(self, name: str) -> bool:
        """Whether any statement binds `name`, or may."""
        return name in self._binders or STAR in self._binders

    def imported_from(self, statement: ast.ImportFrom) -> str:
        """The full name of the module that `from ... import` names here; empty if it is above the top."""
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        package = parts[: len(parts) - statement.level + self.is_package]
        if not package:
            return ""
        module = [statement.module] if statement.module else []
        return ".".join(package + module)


def module_of(name: str) -> Module | None:
    """The module of a dotted name; None if its source is not on this host, or is no Python of this version."""
    file = find_source(name)
    if file is None:
        return None
    try:
        status = file.path.stat()
        tree = _parsed(str(file.path), status.st_mtime_ns, status.st_size)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    return Module(name, file.is_package, tree)


def why_not_read(name: str) -> str:
    """Why `module_of` finds nothing, for people: no source, or where it is no Python of this version."""
    file = find_source(name)
    if file is None:
        return "its source is not here"
    try:
        parse(file.path.read_bytes())
    except SyntaxError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"{file.path}, line {error.lineno}, is no Python {version}: {error.msg}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{file.path}: {type(error).__name__}: {error}"
    return "it changed meanwhile"


def bound_by(statement: ast.AST) -> set[str]:
    """The names that a statement binds, changes or deletes in the scope that it stands in; `STAR` for any."""
    names: set[str] = set()
    left = [statement]
    while left:
        node = left.pop()
        names.update(_names_bound(node))
        if not isinstance(node, (*_NEW_SCOPES, ast.Lambda)):
            left.extend(ast.iter_child_nodes(node))
    return names


def _names_bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, _NEW_SCOPES):
        yield node.name
        yield from _globals_of(node)
    elif isinstance(node, ast.Name):
        if not isinstance(node.ctx, ast.Load):
            yield node.id
    elif isinstance(node, ast.alias):
        yield node.asname or node.name.partition(".")[0]
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
        if node.name:
            yield node.name
    elif isinstance(node, ast.MatchMapping) and node.rest:
        yield node.rest


def _globals_of(scope: ast.AST) -> Iterator[str]:
    """Names of the module that code within a function or class says it binds."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Global):
            yield from node.names


@lru_cache(maxsize=256)
def _parsed(file: str, _mtime_ns: int, _size: int) -> ast.Module:
    return parse(Path(file).read_bytes())
