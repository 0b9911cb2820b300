"""`rewardq schema`: the JSON schema of a rewards file, so that an editor completes and checks it."""

from __future__ import annotations

import json

import click

from tasks.rewards.schema import rewards_schema


@click.command()
def schema() -> None:
    """Print the JSON schema of a rewards file.

    Save it, and name it in the file's first line, `# yaml-language-server: $schema=rewardq.schema.json`; an editor
    then completes keys, reward models and options.
    """
    click.echo(json.dumps(rewards_schema(), indent=2))
