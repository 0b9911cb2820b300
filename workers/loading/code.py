"""What code of the user's this process has loaded, and whether it is the code that a request asks for.

Python imports a module once: an edited file changes nothing in a process that runs. So the source of each of the user's
modules is hashed as it is executed, whenever that is, and compared with what the trainer read.
"""

from __future__ import annotations

import itertools
import os
import platform
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tasks.errors import ModelLoadError, StaleCodeError
from tasks.source.code import (
    Code,
    code_from,
    digest_of,
    file_name,
    hash_of,
    hash_on_disk,
)
from tasks.source.files import OURS, SourceFile, find_source, is_library
from workers.loading.recording import RecordingFinder


@dataclass(frozen=True, slots=True)
class Executed:
    """A source that this process has executed."""

    path: Path
    hash: str


class LoadedCode:
    """The sources of the user's modules as this process executed them. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executed: dict[str, Executed] = {}
        # These two are replaced and never changed: imports look at them in any thread, without the lock.
        self._tops: frozenset[str] = frozenset()
        self._roots: frozenset[Path] = frozenset()
        self._read: dict[str, Code] = {}
        """By dotted path, the code of a class that no trainer has read, as its files were at the first request."""
        self._finder = RecordingFinder(self.follows, self.record)

    def follow(self, module: str) -> None:
        """From now on record a module of the user's, those of its package, and those that lie beside it."""
        with self._lock:
            if self._finder not in sys.meta_path:
                sys.meta_path.insert(0, self._finder)
            top = module.partition(".")[0]
            if top in self._tops:
                return
            self._tops |= {top}
            file = find_as_imported(module)
            if file is not None and not is_library(file.root):
                self._roots |= {file.root}

    def follows(self, module: str) -> bool:
        """Whether a module is the user's, as far as its name and its file's folder tell."""
        top = module.partition(".")[0]
        if top in self._tops:
            return True
        if top in OURS:
            return False
        beside = itertools.product(self._roots, (top, f"{top}.py"))
        return any((root / name).exists() for root, name in beside)

    def record(self, module: str, path: Path, source: bytes) -> None:
        """A module's source is being executed."""
        with self._lock:
            self._executed[module] = Executed(path, hash_of(source))

    def check(self, model: str, code: Code) -> None:
        """Compare what is loaded of the class at a dotted path, or is about to be, with what a trainer has read.

        A module that is not imported yet is compared as its file is now, if the import of the class executes it. Any
        other module is compared once it is imported: it may never be.

        Raises:
            StaleCodeError: This process has loaded other sources, and the files have become what is asked for.
            ModelLoadError: Neither what is loaded nor the files are what is asked for; says which differ, and where.
        """
        stale, unlike = self._compare(model, code)
        if unlike:
            paths = [self._path_of(module) for module in sorted(unlike)]
            raise ModelLoadError(_unlike_words(model, paths))
        if stale:
            raise StaleCodeError([self._name_of(module) for module in stale])

    def check_files(self, model: str, asked: Code = ()) -> None:
        """Before a new instance of a class is made, check that what is loaded of it is still what its files are.

        Only files that the trainer has not read are checked: if it could read the class's source, modules of the
        class's package that are imported by a computed name; else all that the class imports.

        Raises:
            StaleCodeError: A file was edited since. A new instance would be of the old code.
        """
        modules = _imported_of_package(model)
        if not asked:
            modules += _modules_above(model)
            modules += [module for module, _ in self._code_now(model)]
        read = dict(asked)
        stale = []
        for module in dict.fromkeys(modules):
            loaded = None if module in read else self._loaded(module)
            if loaded is not None and _hash_now(module, loaded) != loaded.hash:
                stale.append(module)
        if stale:
            raise StaleCodeError([self._name_of(module) for module in stale])

    def digest(self, model: str, asked: Code) -> str:
        """The digest of the code of a class as it is here: that of `asked`, as `digest_of` gives it, where they agree.

        Args:
            asked: What the trainer has read; empty if it could not.
        """
        code = []
        for module, found in asked or self._read_here(model):
            loaded = self._loaded(module)
            code.append((module, found if loaded is None else loaded.hash))
        return digest_of(tuple(code))

    # --- private ---------------------------------------------------------------------------------

    def _compare(self, model: str, code: Code) -> tuple[list[str], list[str]]:
        """The modules that are loaded and not as asked for, and those whose files are not as asked for either."""
        imported_for_it = set(_modules_above(model))
        stale, unlike = [], []
        for module, asked in code:
            loaded = self._loaded(module)
            if loaded is None:
                if module in imported_for_it and _is_unlike(module, asked):
                    unlike.append(module)
            elif loaded.hash != asked:
                stale.append(module)
                if _hash_now(module, loaded) != asked:
                    unlike.append(module)
        return stale, unlike

    def _read_here(self, model: str) -> Code:
        if model not in self._read:
            self._read[model] = self._code_now(model)
        return self._read[model]

    def _code_now(self, model: str) -> Code:
        """The code of a class as its files are now; empty if there is no file of its module."""
        file = self._file_of(model.rpartition(".")[0])
        return code_from(file) if file is not None else ()

    def _loaded(self, module: str) -> Executed | None:
        """What was executed of a module that is imported; None if it is not.

        For a module that was imported before it was followed, its file as it is now. A module whose import failed is
        executed anew by the next import.
        """
        if module not in sys.modules:
            return None
        found = self._executed.get(module)
        if found is not None:
            return found
        path = _path_of_module(sys.modules[module])
        now = hash_on_disk(path) if path is not None else None
        if path is None or now is None:
            return None
        with self._lock:
            return self._executed.setdefault(module, Executed(path, now))

    def _file_of(self, module: str) -> SourceFile | None:
        loaded = self._loaded(module)
        if loaded is None:
            return find_as_imported(module)
        depth = module.count(".") + (loaded.path.name == "__init__.py")
        return SourceFile(module, loaded.path, loaded.path.parents[depth])

    def _path_of(self, module: str) -> Path:
        file = self._file_of(module)
        return file.path if file is not None else Path(file_name(module))

    def _name_of(self, module: str) -> str:
        file = self._file_of(module)
        return file.name if file is not None else file_name(module)


LOADED_CODE = LoadedCode()
"""That of this process."""


def find_as_imported(module: str) -> SourceFile | None:
    """The file that an import of a module would execute in a worker, which looks in its current folder last."""
    return find_source(module, [*sys.path, os.getcwd()]) or find_source(module)


def _imported_of_package(model: str) -> list[str]:
    """The modules of a class's top-level package that this process has imported, for whatever class."""
    top = model.partition(".")[0]
    return [name for name in sys.modules.copy() if name.partition(".")[0] == top]


def _modules_above(model: str) -> list[str]:
    """The modules that the import of a class executes, whatever their code is: its own and the packages around it."""
    parts = model.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _hash_now(module: str, loaded: Executed) -> str | None:
    """The hash of what a new process would execute of a module that this one has loaded; None if there is nothing.

    That is the same file, unless it is gone, or has become a package of its name.
    """
    for path in _candidates(module, loaded.path):
        if path.is_file():
            return hash_on_disk(path)
    moved = find_as_imported(module)
    return hash_on_disk(moved.path) if moved is not None else None


def _candidates(module: str, path: Path) -> Iterable[Path]:
    """A module's file and, in the order in which Python looks, what it may have become: a package, or no package."""
    name = module.rpartition(".")[2]
    if path.name == f"{name}.py":
        return (path.parent / name / "__init__.py", path)
    if path.name == "__init__.py" and path.parent.name == name:
        return (path, path.parent.parent / f"{name}.py")
    return (path,)


def _is_unlike(module: str, asked: str) -> bool:
    """Whether a file that will be imported is another than is asked for. Of a missing file the import will tell."""
    file = find_as_imported(module)
    now = hash_on_disk(file.path) if file is not None else None
    return now is not None and now != asked


def _path_of_module(module: ModuleType) -> Path | None:
    origin = getattr(module, "__file__", None)
    return Path(origin) if origin and origin.endswith(".py") else None


def _unlike_words(model: str, paths: Sequence[Path]) -> str:
    files = " and ".join(map(str, paths))
    are = "is not what" if len(paths) == 1 else "are not what"
    return (
        f"reward model {model}: {files} on {platform.node()} {are} the trainer read when it started; put the same code "
        "on both hosts; a trainer keeps what it read until it is restarted, or makes a new RewardClient"
    )
