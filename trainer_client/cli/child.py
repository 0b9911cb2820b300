"""One child process: how it is started, how it ended, and what its log ends with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FAILED = 1
"""Exit status of a worker that cannot load what it is to load before it serves."""

LOG_LINES = 5
"""Last lines of a child's log that are shown when it ends by itself."""
TAIL_BYTES = 8192

_TETHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a command that the kernel kills when the thread that started it is gone. It is a program of its own, not a
`preexec_fn`, since Python code between fork and exec may hang when there are threads."""


@dataclass(slots=True)
class Child:
    """A process of ours, and how to start it again. It runs once it is made."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    log_path: Path
    is_server: bool = False
    """Others need it: it is stopped after them."""
    only_at_first: tuple[str, ...] = ()
    """Variables that it is started again without after it ended with status 1. What a worker could not load before it
    served is not to keep it from serving the rest."""
    process: subprocess.Popen[bytes] = field(init=False)
    started_at: float = field(init=False)
    is_watched: bool = False
    """Once it has been ready it is started again when it ends; before that, its end is an error."""
    pause_s: float = 0.0
    restart_at: float | None = None

    def __post_init__(self) -> None:
        self.start(self.env)

    def start(self, env: Mapping[str, str]) -> None:
        """Start the process, for the first time or again. Raises OSError if the system cannot start it."""
        command = self.command
        if sys.platform == "linux":
            tether = (sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()))
            command = (*tether, *command)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=self.cwd,
                start_new_session=True,
            )
        self.started_at = time.monotonic()

    @property
    def pid(self) -> int:
        """Its process id, the same from its start to its end."""
        return self.process.pid

    @property
    def ended(self) -> str | None:
        """How it ended (`exit status 1`, `SIGKILL`), or None while it lives."""
        code = self.process.poll()
        if code is None:
            return None
        return f"exit status {code}" if code >= 0 else signal.Signals(-code).name

    @property
    def next_env(self) -> Mapping[str, str]:
        """The environment to start it again with."""
        if self.process.returncode != FAILED:
            return self.env
        env = dict(self.env)
        for name in self.only_at_first:
            env.pop(name, None)
        return env

    def log_tail(self) -> list[str]:
        """The last lines of its log."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()][-LOG_LINES:]

    def last_log_line(self) -> str:
        """A clause on what its log ends with, and where the log is."""
        tail = self.log_tail()
        if not tail:
            return f"its log {self.log_path} is empty"
        return f"its log {self.log_path} ends with: {tail[-1].strip()}"
