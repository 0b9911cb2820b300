"""The command `rewardq`, also as `python -m rewardq`: it works beside files of the user's that have our names."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def main() -> None:
    """Run the command line, with our packages under their names whatever the folder or PYTHONPATH has."""
    _load_tasks()
    from tasks.shadows import load_ours

    for name in ("workers", "trainer_client"):
        load_ours(name)
    from trainer_client.cli import main as command_line

    command_line()


def _load_tasks() -> None:
    """Import the package `tasks` that lies beside this one; a `tasks.py` of the user's may come first on the path."""
    root = Path(__file__).parents[1]
    spec = PathFinder.find_spec("tasks", [str(root)])
    if spec is None or spec.loader is None:
        raise ImportError(
            f"{root} has no package 'tasks'; rewardq is not installed whole, install it again"
        )
    module = module_from_spec(spec)
    sys.modules["tasks"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
