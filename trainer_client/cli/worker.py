"""`rewardq worker`: the documented Celery worker, with our package `tasks` even if the folder has a `tasks.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from celery.__main__ import main as celery_command

from tasks.shadows import warning

CELERY_WORKER = ("celery", "-A", "tasks", "worker")
"""The documented command. Its `-A tasks` finds our package, since that is imported already."""


@click.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []}
)
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
def worker(celery_options: tuple[str, ...]) -> None:
    """Start a worker: rewardq worker -Q gpu [CELERY_OPTIONS].

    The same as `celery -A tasks worker` with these options, also in a folder that has a tasks.py, workers/ or
    trainer_client/ of its own. This process becomes the worker: its signals and exit status are the worker's.
    """
    said = warning(Path.cwd())
    if said:
        click.echo(f"rewardq worker: {said}", err=True)
    if "--help" in celery_options:
        click.echo(
            "rewardq worker -Q gpu [OPTIONS]: the same as celery -A tasks worker, whose options these are.\n"
        )
    sys.argv = [*CELERY_WORKER, *celery_options]
    celery_command()
