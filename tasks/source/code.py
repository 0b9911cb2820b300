"""The code of a dotted path: its module, and the user's modules that it imports, each by a hash of its source.

A trainer reads the code once, when its config is parsed. The code travels with each request, and a worker compares it
with the code that the worker has loaded, so that outcomes of two codes never mix.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from tasks.source.files import SourceFile, find_source, imports_of, neighbour

DIGITS = 16
"""Hex digits of a hash."""

Code = tuple[tuple[str, str], ...]
"""(module, hash of its source) of each module, in order of their names; empty where the source cannot be read."""


def code_of(path: str) -> Code:
    """The code of the class of a dotted path, read from the files that are there now.

    It has the class's module and, of the modules that it imports, the user's own: modules of the same top-level package
    and modules that lie beside it, then what these import in turn, and the `__init__.py` of each package on the way.
    Imports within functions, conditions and `try` count; imports by a computed name cannot be seen. Files that are no
    Python source (weights, data) do not count.
    """
    first = find_source(path.rpartition(".")[0])
    return code_from(first) if first is not None else ()


def code_from(first: SourceFile) -> Code:
    """As `code_of`, from a module's file on."""
    return tuple(
        sorted((file.module, hash_of(source)) for file, source in sources_from(first))
    )


def sources_from(first: SourceFile) -> list[tuple[SourceFile, bytes]]:
    """The files of a class's code, each with its source, the class's own module first; none if that cannot be read."""
    found: dict[str, tuple[SourceFile, bytes]] = {}
    waiting = [first, *_packages_of(first)]
    while waiting:
        file = waiting.pop(0)
        if file.module in found:
            continue
        source = read(file.path)
        if source is None:
            if file is first:
                return []
            continue
        found[file.module] = (file, source)
        for module in imports_of(file, source).difference(found):
            imported = neighbour(first, module)
            if imported is not None:
                waiting.append(imported)
    return list(found.values())


def read(path: Path) -> bytes | None:
    """The bytes of a source file; None if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def hash_of(source: bytes) -> str:
    """16 hex digits of a source. How its lines end does not count: git may write them in two ways."""
    return hashlib.sha256(source.replace(b"\r\n", b"\n")).hexdigest()[:DIGITS]


def hash_on_disk(path: Path) -> str | None:
    """`hash_of` a file as it is now; None if it cannot be read."""
    source = read(path)
    return hash_of(source) if source is not None else None


@cache
def digest_of(code: Code) -> str:
    """16 hex digits of a code as a whole; empty if it is not known."""
    text = "".join(f"{module} {found}\n" for module, found in code)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS] if code else ""


def changed_files(one: Code, other: Code) -> list[str]:
    """Modules that two codes have not alike, as file names for people, in order."""
    first, second = dict(one), dict(other)
    changed = sorted(
        m for m in first.keys() | second.keys() if first.get(m) != second.get(m)
    )
    return [file_name(module) for module in changed]


def file_name(module: str) -> str:
    """How a module's file is called where only its name is known: `my_package/rewards.py`."""
    return f"{module.replace('.', '/')}.py"


def _packages_of(file: SourceFile) -> list[SourceFile]:
    """The packages that a module is in, which are imported before it."""
    parts = file.module.split(".")
    found = (neighbour(file, ".".join(parts[:end])) for end in range(1, len(parts)))
    return [one for one in found if one is not None]
