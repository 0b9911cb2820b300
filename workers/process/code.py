"""What code of the user's this process has loaded, and whether it is the code that a request asks for.

Python imports a module once: an edited file changes nothing in a process that runs. So the source of each of the user's
modules is hashed as it is executed, whenever that is, and compared with what the trainer read.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from tasks import catalog
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
from tasks.version import __version__


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
        self._tops: frozenset[str] = (
            frozenset()
        )  # replaced, never changed: imports look at them in any thread
        self._roots: frozenset[Path] = frozenset()
        self._read: dict[str, Code] = {}
        """By dotted path, the code of a class that no trainer has read, as it was when it was first asked for."""

    def follow(self, module: str) -> None:
        """From now on record a module of the user's, those of its package, and those that lie beside it."""
        with self._lock:
            if not any(
                isinstance(finder, _Recorder) and finder.code is self
                for finder in sys.meta_path
            ):
                sys.meta_path.insert(0, _Recorder(self))
            top = module.partition(".")[0]
            if top in self._tops:
                return
            self._tops |= {top}
            file = find_as_imported(module)
            if file is not None and not is_library(file.root):
                self._roots |= {file.root}

    def follows(self, module: str) -> bool:
        """Whether a module is the user's, as far as its name and place tell."""
        top = module.partition(".")[0]
        if top in self._tops:
            return True
        beside = (root / name for root in self._roots for name in (top, f"{top}.py"))
        return top not in OURS and any(place.exists() for place in beside)

    def record(self, module: str, path: Path, source: bytes) -> None:
        """A module's source is being executed."""
        with self._lock:
            self._executed[module] = Executed(path, hash_of(source))

    def check(self, model: str, code: Code) -> None:
        """Compare what is loaded of the class at a dotted path, or is about to be, with what a trainer has read.

        A module that is not imported yet, and lies on the way to the class, is compared as its file is now. Any other
        is compared once it is imported: it may never be.

        Raises:
            StaleCodeError: This process has loaded other sources, and the files have become what is asked for.
            ModelLoadError: Neither what is loaded nor the files are what is asked for; says which differ, and where.
        """
        if not code:
            return
        way = set(_way_to(model))
        loaded = {m: found for m, _ in code if (found := self._loaded(m)) is not None}
        stale = [m for m, asked in code if m in loaded and loaded[m].hash != asked]
        unlike = [
            m for m, asked in code if m in stale and _hash_now(m, loaded[m]) != asked
        ]
        unlike += [
            m
            for m, asked in code
            if m in way and m not in loaded and _is_unlike(m, asked)
        ]
        if unlike:
            raise ModelLoadError(
                _unlike_words(model, [self._path_of(m) for m in sorted(unlike)])
            )
        if stale:
            raise StaleCodeError([self._name_of(m) for m in stale])

    def check_files(self, model: str, asked: Code = ()) -> None:
        """Before a new instance of a class is made: are the files that its trainer has not read still what is loaded?

        Those are all that the class imports, or of one whose source the trainer has read those of its package that it
        imports by a computed name.

        Raises:
            StaleCodeError: They are not. A new instance would be of the old code, whatever the new one is called.
        """
        modules = self._imported_of_package(model)
        if not asked:
            file = self._file_of(model.rpartition(".")[0])
            modules += [
                *_way_to(model),
                *(
                    module
                    for module, _ in (code_from(file) if file is not None else ())
                ),
            ]
        read = dict(asked)
        loaded = {
            m: found
            for m in modules
            if m not in read and (found := self._loaded(m)) is not None
        }
        stale = [m for m, found in loaded.items() if _hash_now(m, found) != found.hash]
        if stale:
            raise StaleCodeError([self._name_of(m) for m in stale])

    def digest(self, model: str, asked: Code) -> str:
        """The digest of the code of a class as it is here: that of `asked`, as `digest_of` gives it, where they agree.

        Args:
            asked: What the trainer has read; empty if it could not.
        """
        own = asked or self._read_here(model)
        loaded = {
            m: found.hash for m, _ in own if (found := self._loaded(m)) is not None
        }
        return digest_of(
            tuple((module, loaded.get(module, found)) for module, found in own)
        )

    # --- private ---------------------------------------------------------------------------------

    def _imported_of_package(self, model: str) -> list[str]:
        """The modules of a class's top-level package that this process has imported, for whatever class."""
        top = model.partition(".")[0]
        return [name for name in sys.modules.copy() if name.partition(".")[0] == top]

    def _read_here(self, model: str) -> Code:
        if model not in self._read:
            file = self._file_of(model.rpartition(".")[0])
            self._read[model] = code_from(file) if file is not None else ()
        return self._read[model]

    def _loaded(self, module: str) -> Executed | None:
        """What was executed of a module that is imported; before it was followed, as it is now.

        One whose import failed is executed anew by the next import.
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


def find_as_imported(module: str) -> SourceFile | None:
    """The file that an import of a module would execute in a worker, which looks in its current folder last."""
    return find_source(module, [*sys.path, os.getcwd()]) or find_source(module)


class _Recorder(MetaPathFinder):
    """Finds modules as all others do, and has the user's own recorded when they are executed."""

    def __init__(self, code: LoadedCode) -> None:
        self.code = code

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """What the other finders find; None, which asks them again, for a module that is not the user's."""
        if not self.code.follows(fullname):
            return None
        spec = _found_by(
            (f for f in sys.meta_path if not isinstance(f, _Recorder)),
            fullname,
            path,
            target,
        )
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _RecordingLoader(
                self.code, spec.loader.name, spec.loader.path
            )
        return spec


class _RecordingLoader(SourceFileLoader):
    """Executes a source and records it.

    It takes no bytecode from a cache: Python takes that for the source's by its size and the second of its last change,
    and an edit may change neither.
    """

    def __init__(self, code: LoadedCode, fullname: str, path: str) -> None:
        super().__init__(fullname, path)
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        compiled: CodeType = self.source_to_code(source, path)
        self._code.record(fullname, Path(path), source)
        return compiled


def _found_by(
    finders: Iterable[object],
    fullname: str,
    path: Sequence[str] | None,
    target: ModuleType | None,
) -> ModuleSpec | None:
    for finder in finders:
        find_spec = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = (
            find_spec(fullname, path, target) if find_spec is not None else None
        )
        if spec is not None:
            return spec
    return None


def _way_to(model: str) -> list[str]:
    """The modules that are imported for a class, whatever their code is: its own and the packages that it is in."""
    parts = model.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _hash_now(module: str, loaded: Executed) -> str | None:
    """The hash of what a new process would execute of a module that this one has loaded; None if there is nothing.

    That is the same file, unless it is gone, or has become a package of its name.
    """
    places = [loaded.path]
    name = module.rpartition(".")[2]
    if loaded.path.name == "__init__.py" and loaded.path.parent.name == name:
        places.append(loaded.path.parent.parent / f"{name}.py")
    elif loaded.path.name == f"{name}.py":
        places.insert(0, loaded.path.parent / name / "__init__.py")
    for place in places:
        if place.is_file():
            return hash_on_disk(place)
    moved = find_as_imported(module)
    return hash_on_disk(moved.path) if moved is not None else None


def _is_unlike(module: str, asked: str) -> bool:
    """Whether a file that will be imported is another than is asked for; of one that is missing the import tells."""
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


LOADED = LoadedCode()
"""That of this process."""


_CATALOG_FILES = tuple(sorted(Path(catalog.__file__).parent.glob("*.py")))
_CATALOG_AT_START = {path: hash_on_disk(path) for path in _CATALOG_FILES}


def check_builtin(model: str, version: str) -> None:
    """Is a built-in here of the version that a trainer asks for? An upgrade changes nothing in a process that runs.

    Args:
        version: The catalog's of the trainer, perhaps with the user's own behind a `/`.

    Raises:
        StaleCodeError: rewardq was upgraded on this host since this process started.
        ModelLoadError: It was not; names both versions.
    """
    ours, asked = catalog.CATALOG[model].version, version.partition("/")[0]
    if ours == asked:
        return
    if any(hash_on_disk(path) != before for path, before in _CATALOG_AT_START.items()):
        raise StaleCodeError(["rewardq"])
    raise ModelLoadError(
        f"reward model {model} is of version {ours} in the rewardq {__version__} on {platform.node()}, and the trainer "
        f"asks for version {asked}; install the same rewardq on both and restart them"
    )
