"""Whose `tasks` it is: loads our packages under their names, and names files of the user's that have the same."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

OURS = ("rewardq", "tasks", "trainer_client", "workers")
"""Our packages. They have common names, which a project of the user's may have given to files of its own."""

ROOT = Path(__file__).parents[1]
"""The folder that has our packages."""


def load_ours(name: str) -> ModuleType:
    """Import a package of ours, whatever else `sys.path` has under its name.

    For processes that are ours alone, such as a worker: a file of the user's of this name cannot be imported there.
    """
    known = sys.modules.get(name)
    if known is not None and is_ours(known):
        return known
    spec = PathFinder.find_spec(name, [str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(
            f"{ROOT} has no package {name!r}; rewardq is not installed whole, install it again"
        )
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def is_ours(module: ModuleType) -> bool:
    """Whether a module under one of our names is our package."""
    file = getattr(module, "__file__", None)
    return (
        file is not None
        and Path(file).resolve().parent == (ROOT / module.__name__).resolve()
    )


def namesakes(folder: Path) -> list[Path]:
    """Modules and packages in a folder that have one of our names and are not ours."""
    found = []
    for name in OURS:
        for path in (folder / f"{name}.py", folder / name):
            if _is_module(path) and path.resolve() != (ROOT / name).resolve():
                found.append(path)
    return found


def warning(folder: Path) -> str | None:
    """A warning for a worker that is started in this folder; None if the folder has no module of our names."""
    found = namesakes(folder)
    if not found:
        return None
    files = ", ".join(map(str, found))
    names = dict.fromkeys(path.stem for path in found)
    imports = " and ".join(f"`import {name}`" for name in names)
    return (
        f"{files}: no worker imports what lies there. In a worker {imports} means rewardq's own package. "
        "If a reward class of yours needs it, rename it."
    )


def _is_module(path: Path) -> bool:
    """Whether it is Python source: a folder of data under such a name shadows nothing."""
    if path.suffix == ".py":
        return path.is_file()
    return path.is_dir() and next(path.glob("*.py"), None) is not None
