"""Where the source of a module of the user's is, and what that source imports; nothing is imported for it."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

OURS = ("tasks", "workers", "trainer_client", "rewardq")
"""Top-level names of this package: never a user's module."""

_LIBRARIES = ("site-packages", "dist-packages")
_STANDARD = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")
)

_IMPORT_LINE = re.compile(
    rb"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]+([\w, \t]+)|import[ \t]+([\w., \t]+))",
    re.M,
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """The file of a module."""

    module: str
    path: Path
    root: Path
    """The folder in which its top-level module or package lies."""

    @property
    def is_package(self) -> bool:
        """Whether it is the `__init__.py` of a package."""
        return self.path.name == "__init__.py"

    @property
    def name(self) -> str:
        """Its path below the root, for people: `my_rewards.py`, `my_package/rewards.py`."""
        if self.path.is_relative_to(self.root):
            return str(self.path.relative_to(self.root))
        return str(self.path)


def find_source(module: str, folders: Sequence[str] | None = None) -> SourceFile | None:
    """The source file of a module, by name alone; None if there is none on this host.

    Args:
        folders: Where its top-level name is looked for; unless given, in the current folder, where a worker may be
            started, and then wherever Python looks.
    """
    top, *rest = module.split(".")
    if not all(part.isidentifier() for part in (top, *rest)):
        return None
    is_everywhere = folders is None
    for folder in [os.getcwd(), *sys.path] if folders is None else folders:
        root = Path(folder or ".").absolute()
        found = _below(root, [top, *rest])
        if found is not None:
            return SourceFile(module, found, root)
    return _by_finders(module) if is_everywhere else None


def neighbour(file: SourceFile, module: str) -> SourceFile | None:
    """The source file of a module that a user's file imports, if it is the user's too.

    A module is the user's if it is of the same top-level package as `file`, or lies beside that package. A module that
    lies beside an installed package is a library of its own.
    """
    top, *rest = module.split(".")
    if top in OURS:
        return None
    if top == file.module.partition(".")[0]:
        found = _in_own_package(file, top, rest)
    elif is_library(file.root):
        return None
    else:
        found = _below(file.root, [top, *rest])
    return SourceFile(module, found, file.root) if found is not None else None


def is_library(folder: Path) -> bool:
    """Whether packages are installed into a folder, rather than written there."""
    is_installed = any(part in _LIBRARIES for part in folder.parts)
    return is_installed or folder.resolve() in _STANDARD


def imports_of(file: SourceFile, source: bytes) -> frozenset[str]:
    """Every module that a source may import, anywhere in it, by absolute name.

    `from package import name` gives `package.name` too, which may be a module or not. A source that this Python cannot
    parse (it may be for a newer Python) is read line by line.
    """
    package = file.module if file.is_package else file.module.rpartition(".")[0]
    return _imports(source, package, file.is_package)


_parsing = threading.Lock()
"""Python 3.11 counts the depth of a syntax tree for all threads together: it raises SystemError if two threads parse at
the same time."""


def _parse_in_a_child() -> None:
    """A new lock: the thread that may hold the old one does not exist in a forked child."""
    global _parsing
    _parsing = threading.Lock()


os.register_at_fork(after_in_child=_parse_in_a_child)


def parse(source: str | bytes) -> ast.Module:
    """The syntax tree of a source. Raises what `ast.parse` does; what Python would warn of is not said here."""
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _below(folder: Path, parts: Sequence[str]) -> Path | None:
    """The file of a module below a folder: a package comes before a file of its name, as in Python."""
    base = folder.joinpath(*parts)
    for file in (base / "__init__.py", base.parent / f"{base.name}.py"):
        if file.is_file():
            return file
    return None


def _in_own_package(file: SourceFile, top: str, rest: list[str]) -> Path | None:
    """The file of a module of the same top-level package or module as `file`."""
    package = _package_folder(file)
    if package is None:
        return _below(file.root, [top])
    if rest:
        return _below(package, rest)
    init = package / "__init__.py"
    return init if init.is_file() else None


def _package_folder(file: SourceFile) -> Path | None:
    """The folder of the top-level package that a file is in; None for a module by itself."""
    depth = file.module.count(".") + file.is_package
    return file.path.parents[depth - 1] if depth else None


def _by_finders(module: str) -> SourceFile | None:
    """The file that Python's own finders know, of an editable install for example. Nothing is imported for it."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a module without a spec, `__main__` for example
        return None
    if spec is None:
        return None
    if not rest:
        return _top_level(module, spec.origin)
    for location in spec.submodule_search_locations or ():
        found = _below(Path(location), rest)
        if found is not None:
            return SourceFile(module, found, Path(location).parent)
    return None


def _top_level(module: str, origin: str | None) -> SourceFile | None:
    """The file of a top-level module or package where its finder says that it is."""
    if origin is None or not origin.endswith(".py"):
        return None
    path = Path(origin)
    if not path.is_file():
        return None
    is_package = path.name == "__init__.py"
    return SourceFile(module, path, path.parents[1] if is_package else path.parent)


@lru_cache(maxsize=512)
def _imports(source: bytes, package: str, is_package: bool) -> frozenset[str]:
    try:
        tree = parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset(_with_packages(_imports_by_line(source, package)))
    found: list[str] = []
    for node in ast.walk(tree):
        found += _imports_of_node(node, package, is_package=is_package)
    return frozenset(_with_packages(found))


def _imports_of_node(node: ast.AST, package: str, *, is_package: bool) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        yield from _imported_from(node, package)
    elif isinstance(node, ast.Call):
        yield from _import_called(node, package)
    elif isinstance(node, ast.Assign | ast.AugAssign) and is_package:
        for name in _listed_in_all(node):
            yield f"{package}.{name}"


def _imported_from(node: ast.ImportFrom, package: str) -> Iterator[str]:
    """`from base import name`: the base, and each name, which may be a module of the base."""
    base = _absolute("." * node.level + (node.module or ""), package)
    if base is None:
        return
    yield base
    for alias in node.names:
        if alias.name != "*":
            yield f"{base}.{alias.name}"


def last_name(node: ast.expr) -> str:
    """`PointwiseRewardModel` of `workers.PointwiseRewardModel`; empty of what has no name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _import_called(node: ast.Call, package: str) -> Iterator[str]:
    """`importlib.import_module("my_package.module")`, where the name is written out."""
    if last_name(node.func) not in ("import_module", "__import__") or not node.args:
        return
    name = node.args[0]
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        absolute = _absolute(name.value, package)
        if absolute is not None:
            yield absolute


def _listed_in_all(node: ast.Assign | ast.AugAssign) -> Iterator[str]:
    """Names in a package's `__all__`: `from package import *` imports those of its modules."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    if "__all__" not in names:
        return
    for one in ast.walk(node.value):
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield one.value


def _imports_by_line(source: bytes, package: str) -> Iterator[str]:
    for base, names, modules in _IMPORT_LINE.findall(source):
        words = [item.split() for item in (names or modules).split(b",")]
        listed = [name_as[0].decode() for name_as in words if name_as]
        if not base:
            yield from listed
            continue
        absolute = _absolute(base.decode(), package)
        if absolute is not None:
            yield absolute
            for name in listed:
                yield f"{absolute}.{name}"


def _absolute(name: str, package: str) -> str | None:
    """`..module`, as seen from a package, by its absolute name; None if it leads out of the top-level package."""
    module = name.lstrip(".")
    level = len(name) - len(module)
    if not level:
        return name
    parts = package.split(".") if package else []
    if level > len(parts):
        return None
    return ".".join([*parts[: len(parts) - level + 1], *([module] if module else [])])


def _with_packages(names: Iterator[str] | list[str]) -> Iterator[str]:
    """Each name with the packages that it is in, which are imported before it."""
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            yield ".".join(parts[:end])
