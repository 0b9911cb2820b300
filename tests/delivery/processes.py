"""What stands around the pipeline in these tests: a supervisor, a proxy that fails, a judge, a trainer to kill."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tasks.settings import Settings
from tests.servers import ROOT, WorkerProcess, clean_env, ends_with_us, run_python, wait_until, worker_env

CHUNK_BYTES = 65_536


class Supervisor:
    """Starts a worker again whenever it ends by itself, as `rewardq up` and compose do."""

    def __init__(self, start: Callable[[], WorkerProcess]) -> None:
        self._start = start
        self._ended = threading.Event()
        self._started = threading.Event()
        self.statuses: list[int] = []
        """Exit statuses, in order; a signal as its negative number."""
        self.logs: list[Path] = []
        self._thread = threading.Thread(target=self._run, name="supervisor")
        self._thread.start()  # not for a while only: the kernel ends the workers with this thread
        assert self._started.wait(10)
        self.worker.wait_ready()

    def kill(self) -> None:
        """`kill -9` the worker that lives now; returns when another was started in its place."""
        killed = self.worker
        killed.process.kill()
        wait_until(lambda: self.worker is not killed)

    def wait_ready(self) -> None:
        """Wait until a worker serves."""
        self.worker.wait_ready()

    def stop(self) -> None:
        """No further start; the worker is stopped as by a container."""
        self._ended.set()
        self._thread.join()
        if self.worker.process.poll() is None:
            self.worker.stop()

    @property
    def log_text(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs)

    def _run(self) -> None:
        while not self._ended.is_set():
            self.worker = self._start()
            self.logs.append(self.worker.log)
            self._started.set()
            while (status := self.worker.process.poll()) is None:
                if self._ended.wait(0.02):
                    return self._wait_for_stop()
            self.statuses.append(status)
        return None

    def _wait_for_stop(self) -> None:
        with contextlib.suppress(AssertionError):  # said again by `stop`
            self.worker.stop()


class TcpProxy:
    """Stands between a Redis and its clients, and can be cut or frozen."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._is_cut = self._is_closed = False
        self._flows = threading.Event()
        self._flows.set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        """End every connection, and let no new one through."""
        self._is_cut = True
        self._end_all()

    def freeze(self) -> None:
        """Pass nothing on, end nothing: what a lost route looks like."""
        self._flows.clear()

    def mend(self) -> None:
        self._is_cut = False
        self._flows.set()

    def close(self) -> None:
        self._is_closed = True
        self._flows.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._end_all()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut or self._is_closed:
                ours.close()
                continue
            pair = (ours, socket.create_connection(("127.0.0.1", self._to)))
            with self._lock:
                self._pairs.append(pair)
            self._threads.append(threading.Thread(target=self._serve, args=(pair,)))
            self._threads[-1].start()

    def _serve(self, pair: tuple[socket.socket, socket.socket]) -> None:
        ours, theirs = pair
        back = threading.Thread(target=self._pass_on, args=(theirs, ours))
        with ours, theirs:
            back.start()
            self._pass_on(ours, theirs)
            back.join()
        with self._lock:
            self._pairs = [p for p in self._pairs if p is not pair]

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                self._flows.wait()
                sink.sendall(data)
        _end(sink)
        _end(source)

    def _end_all(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for one in pair:
                _end(one)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Judge:
    """Answers a request for `/<number>` with the number, after `delay_s`. A number in `hangs_on` gets no answer."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.asked: list[int] = []
        self._lock = threading.Lock()
        self._num_open = 0
        self._may_answer = threading.Event()
        self._may_answer.set()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                number = self.path.strip("/")
                with judge._lock:
                    judge.asked.append(int(number))
                    judge._num_open += 1
                time.sleep(judge.delay_s)
                judge._may_answer.wait()
                with judge._lock:
                    judge._num_open -= 1
                with contextlib.suppress(ConnectionError):
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(number)))
                    self.end_headers()
                    self.wfile.write(number.encode())

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Whoever asked may have been killed."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def num_open(self) -> int:
        """Requests that wait for their answer."""
        with self._lock:
            return self._num_open

    def hold(self) -> None:
        """Answer nothing until `go_on`."""
        self._may_answer.clear()

    def go_on(self) -> None:
        self._may_answer.set()

    def close(self) -> None:
        self.go_on()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class SilentJudge:
    """A judge of OpenAI's API that takes each question and never answers, until whoever asked gives it up."""

    def __init__(self) -> None:
        self.num_asked = self.num_given_up = 0
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                with judge._lock:
                    judge.num_asked += 1
                with contextlib.suppress(OSError):
                    self.connection.recv(1)  # returns when the connection is closed
                with judge._lock:
                    judge.num_given_up += 1
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class TrainerProcess:
    """A trainer in a process of its own. It prints a JSON value a line; `line()` reads the next."""

    def __init__(self, script: str, settings: Settings, folder: Path, env: Mapping[str, str]) -> None:
        self._log = folder / f"trainer-{time.monotonic_ns()}.log"
        path = self._log.with_suffix(".py")
        path.write_text(script)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*ends_with_us("KILL"), sys.executable, "-u", path],
                env={**worker_env(settings, {}), **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                bufsize=0,  # `line()` asks the pipe: what was read beyond a line would never be seen there
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self, timeout_s: float = 60.0) -> Any:
        """The next value that it prints."""
        stdout = self.process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], timeout_s)
        text = stdout.readline() if ready else b""
        assert text, f"the trainer printed nothing:\n{self._log.read_text()}"
        return json.loads(text)

    def kill(self) -> None:
        """`kill -9`."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


def python(script: str, settings: Settings, *, timeout_s: float = 60.0) -> str:
    """What a Python script prints; it must end well."""
    env = {**clean_env(), "PYTHONPATH": str(ROOT), "REWARDQ_BROKER_URL": settings.broker}
    return run_python("-c", script, env=env, timeout_s=timeout_s).stdout
