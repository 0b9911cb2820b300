"""One rank of the trainer in one process, without servers."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from redis.exceptions import NoPermissionError

from trainer_client.session import client_process
from trainer_client.session.client_process import ClientProcess


def test_a_redis_that_refuses_at_the_end_keeps_no_connection_open(monkeypatch):
    """An error of `close()` would hide the error that ended the `with` block of the client, which says what to do."""
    ended = []

    def refuse():
        raise NoPermissionError("NOPERM this user has no permissions")

    pool = SimpleNamespace(disconnect=lambda inuse_connections: ended.append("pool"))
    outcomes = SimpleNamespace(redis=SimpleNamespace(connection_pool=pool))
    monkeypatch.setattr(client_process, "client_outcomes", lambda _app: outcomes)

    process = ClientProcess.__new__(ClientProcess)
    process._app, process._engine, process._engine_lock = None, None, threading.Lock()
    process.rank_lock = SimpleNamespace(release=refuse)
    process.ranks = SimpleNamespace(close=lambda: ended.append("ranks"))
    process.close()
    assert ended == ["ranks", "pool"]
