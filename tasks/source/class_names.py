"""Whether the class that a dotted path names is there, told from source on this host; nothing is imported.

Only a certain mistake is an error: a module that is not found here may be on the worker's host, and a module that makes
its names while it runs may have any name.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Container, Iterable
from pathlib import Path

from tasks.errors import UnknownRewardError, nearest
from tasks.source.files import find_source, parse

NEAR = 0.8
"""Likeness from which on one name may be meant for the other (1 is equal)."""

_MAKES_NAMES = ("globals", "vars", "exec", "setattr", "eval")
"""Calls by which a module may define what its source does not show."""


def check_class(path: str, where: str, said: Container[str]) -> str:
    """Check the dotted path of a class of the user's as far as source on this host tells.

    Args:
        where: The entry of the config, for the message.
        said: Which keys the reward has. `kind` and `required_fields` say what the source would say, as they must where
            only workers have the source: a difference here is then no misspelling.

    Returns:
        What is wrong, if the module has neither this class nor a class of nearly this name; else nothing.

    Raises:
        UnknownRewardError: It is misspelt: the module, or the class in its module, has nearly this name.
    """
    if not all(part.isidentifier() for part in path.split(".")):
        return f"{where}: {path!r:.100} is neither a built-in nor the dotted path of a class, my_rewards.MyReward"
    module, _, name = path.rpartition(".")
    source = find_source(module)
    if source is None:
        if "kind" not in said and "required_fields" not in said:
            _check_module(module, name, where)
        return ""
    if "kind" in said and "required_fields" in said:
        return ""
    if hasattr(sys.modules.get(module), name):
        return ""
    return _check_name(name, source.path, where)


def _check_name(name: str, file: Path, where: str) -> str:
    """What is wrong with a name that is no class of a file; raise if a class there has nearly this name."""
    names = _names_in(file)
    if names is None or name in names:
        return ""

    classes = _classes_in(file)
    likeness = [_likeness(name.lower(), known.lower()) for known in classes]
    is_misspelt = max(likeness, default=0.0) >= NEAR
    hint = nearest(name, classes) if is_misspelt else ""
    words = (
        f"{where}: {file} has no class {name!r}{hint}; reward_model is the "
        "dotted path of a class, my_rewards.MyReward. (Where workers have another file of this name, say kind: and "
        "required_fields: here)"
    )
    if is_misspelt:
        raise UnknownRewardError(words)
    return words


def _check_module(module: str, name: str, where: str) -> None:
    """Raise if there is no such module here, but one of nearly that name that has the class."""
    parent, _, last = module.rpartition(".")
    if _may_be_found(module):
        return
    for file in _siblings(parent):
        is_near = _likeness(last, file.stem) >= NEAR
        is_version = _without_digits(file.stem) == _without_digits(last)
        if is_near and not is_version and name in _classes_in(file):
            meant = ".".join(filter(None, (parent, file.stem, name)))
            raise UnknownRewardError(
                f"{where}: there is no module {module!r} here, but {file} has the class {name} (did you mean "
                f"{meant!r}?). If only the workers have {module!r}, say required_fields: [...] here, and kind: "
                "groupwise if it is that"
            )


def _siblings(parent: str) -> list[Path]:
    """The modules of a package; without a package, the modules of the folders that scripts are started in."""
    packages = parent.split(".") if parent else []
    folders = [Path.cwd()]
    folders += [Path(one or ".") for one in (sys.path if parent else sys.path[:1])]

    files: dict[Path, None] = {}
    for folder in folders:
        package = folder.joinpath(*packages).absolute()
        files |= dict.fromkeys(sorted(package.glob("*.py")))
    return list(files)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _without_digits(name: str) -> str:
    """`rewards_v1` and `rewards_v2` are two versions, not one misspelt."""
    return re.sub(r"\d+", "", name)


def _may_be_found(module: str) -> bool:
    """Whether Python may find a module of which no source is here: compiled, a folder, or by an import hook."""
    for folder in (os.getcwd(), *sys.path):
        base = Path(folder).joinpath(*module.split("."))
        if base.is_dir() or any(base.parent.glob(f"{base.name}.*")):
            return True
    top, _, rest = module.partition(".")
    try:
        return importlib.util.find_spec(top) is not None and not rest
    except (ImportError, ValueError):
        return True


def _names_in(file: Path) -> set[str] | None:
    """The names that a module binds anywhere in it; None if its source does not tell them all."""
    tree = _tree_of(file)
    if tree is None:
        return None
    names: set[str] = set()
    for node in ast.walk(tree):
        names |= set(_bound_by(node))
    if "*" in names or "__getattr__" in names or _makes_names(tree):
        return None
    return names


def _classes_in(file: Path) -> set[str]:
    """The classes that a module defines."""
    tree = _tree_of(file)
    if tree is None:
        return set()
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _tree_of(file: Path) -> ast.Module | None:
    try:
        return parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return None


def _bound_by(node: ast.AST) -> Iterable[str]:
    """The names that a node binds, in whatever scope; `*` for any."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.alias):
        return [node.asname or node.name.partition(".")[0]]
    if isinstance(node, ast.Global):
        return node.names
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return []


def _makes_names(tree: ast.Module) -> bool:
    """Whether the module calls what may define names that its source does not show."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in _MAKES_NAMES:
                return True
        elif isinstance(node, ast.Attribute) and node.attr == "modules":
            return True  # sys.modules[__name__]
    return False
