"""Has Python record the source of each of the user's modules as it is executed.

Python imports a module once: an edited file changes nothing in a process that runs, and nothing in the process says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

Record = Callable[[str, Path, bytes], None]
"""Called with a module's name, its file, and the source that is being executed."""


class RecordingFinder(MetaPathFinder):
    """Finds modules as all others do, and has the user's own recorded when they are executed."""

    def __init__(self, is_users: Callable[[str], bool], record: Record) -> None:
        self._is_users, self._record = is_users, record

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """What the other finders find; None, which asks them again, for a module that is not the user's."""
        if not self._is_users(fullname):
            return None
        spec = _found_by_others(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            loader = spec.loader
            spec.loader = _RecordingLoader(self._record, loader.name, loader.path)
        return spec


class _RecordingLoader(SourceFileLoader):
    """Executes a source and records it.

    It takes no bytecode from a cache: Python takes that for the source's by its size and the second of its last change,
    and an edit may change neither.
    """

    def __init__(self, record: Record, fullname: str, path: str) -> None:
        super().__init__(fullname, path)
        self._record = record

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        compiled: CodeType = self.source_to_code(source, path)
        self._record(fullname, Path(path), source)
        return compiled


def _found_by_others(
    fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if isinstance(finder, RecordingFinder) or not hasattr(finder, "find_spec"):
            continue
        spec: ModuleSpec | None = finder.find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None
