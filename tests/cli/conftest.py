"""The command line as its users run it: a process of its own, whose children are looked up by the kernel's word."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.servers import ends_with_us

REWARDQ = Path(sys.executable).with_name("rewardq")


class CommandLine:
    """One run of `rewardq`, its output in a file."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, more_env: Mapping[str, str]) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("REWARDQ_")}
        self.output_path = cwd / "output.txt"
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [*ends_with_us("KILL"), str(REWARDQ), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**env, "COLUMNS": "160", "TMPDIR": str(cwd), **more_env},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.output_path.read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output or self.process.poll() is not None, 60, lambda: self.output)
        assert text in self.output, self.output

    def exit_status(self, timeout_s: float) -> int:
        wait_until(lambda: self.process.poll() is not None, timeout_s, lambda: self.output)
        return self.process.wait()

    def children(self) -> list[int]:
        return [pid for pid, parent in _parents().items() if parent == self.process.pid]


def wait_until(is_so: Callable[[], bool], timeout_s: float, explain: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s {explain()}"
        time.sleep(0.05)


def running(pids: list[int]) -> list[int]:
    """Those of `pids` that live; a zombie that nobody has waited for does not."""
    alive = _parents()
    return [pid for pid in pids if pid in alive]


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def _parents() -> dict[int, int]:
    """Parent by process id, of all that live."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    return parents


@pytest.fixture
def rewardq(tmp_path: Path) -> Iterator[Callable[..., CommandLine]]:
    """Starts `rewardq` with arguments in an empty folder, `env=` adds variables; what a test leaves is killed."""
    runs: list[CommandLine] = []

    def start(*arguments: str, env: Mapping[str, str] | None = None) -> CommandLine:
        runs.append(CommandLine(arguments, tmp_path, env or {}))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()
