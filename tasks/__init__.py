"""The contract between trainers and workers, and the Celery app: `celery -A tasks` finds it as `tasks.app`.

The app is built when it is first asked for, and not by `import tasks`: building it reads every `REWARDQ_*` variable,
which a process that only wants `tasks.errors` need not have right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.version import __version__

if TYPE_CHECKING:
    from tasks.celery_app import app

__all__ = ["__version__", "app"]


def __getattr__(name: str) -> Any:
    """`tasks.app`, built at its first use (PEP 562)."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    from tasks.celery_app import app

    globals()["app"] = app
    return app
