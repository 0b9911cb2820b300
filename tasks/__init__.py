"""The contract between trainers and workers, and the Celery app: `import tasks` gives `tasks.app`."""

from tasks.celery_app import app
from tasks.version import __version__

__all__ = ["__version__", "app"]
