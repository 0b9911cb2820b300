"""The command line, `rewardq`: starts what a config needs on this machine, or shows everything at work."""

from __future__ import annotations

from typing import Any

import click

from tasks.errors import RewardError
from tasks.version import __version__
from trainer_client.cli.clean import clean
from trainer_client.cli.demo import demo
from trainer_client.cli.schema import schema
from trainer_client.cli.up import up
from trainer_client.cli.worker import worker

__all__ = ["main"]


class _Refused(click.ClickException):
    exit_code = 2


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error of this pipeline becomes one line for the user."""
        try:
            return super().invoke(ctx)
        except RewardError as error:
            raise _Refused(" ".join(str(error).split())) from error


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="rewardq")
def main() -> None:
    """Rewards for RL of image and video generators, computed away from the trainer."""


main.add_command(up)
main.add_command(worker)
main.add_command(demo)
main.add_command(schema)
main.add_command(clean)
