"""The command `rewardq`, also as `python -m rewardq`. It works beside files of the user that have our names."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def main() -> None:
    """Run the command line with our packages, even if the folder or PYTHONPATH has modules of the same names."""
    _load_tasks()
    from tasks.shadows import load_ours

    for name in ("workers", "trainer_client"):
        load_ours(name)
    from trainer_client.cli import main as command_line

    command_line()


def _load_tasks() -> None:
    """Import the package `tasks` beside this package; a `tasks.py` of the user may come first on the path."""
    root = Path(__file__).parents[1]
    spec = PathFinder.find_spec("tasks", [str(root)])
    if spec is None or spec.loader is None:
        raise ImportError(
            f"{root} has no package 'tasks': rewardq is installed only in part; install it again"
        )
    module = module_from_spec(spec)
    sys.modules["tasks"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
