"""The fixtures of the delivery tests at default times, and the page that a whole run leaves."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tasks.settings import Settings, load_settings
from tests.delivery.conftest import bench, calls, judges, proxies, supervised, trainers  # noqa: F401  (fixtures)
from tests.pipeline.conftest import clients  # noqa: F401  (a fixture)
from tests.servers import RedisServer
from tests.soak.faults import FAULTS
from tests.soak.loads import LOADS
from tests.soak.report import Rows, server_of, write

ROWS = "SOAK_ROWS"

WHOLE = {"faults": list(FAULTS), "long_run": [load.name for load in LOADS]}
"""The parts of the page that this folder's tests are for, and the rows that make each whole."""


@pytest.fixture
def settings(redis_url: str) -> Settings:
    """As users have them: times are the defaults."""
    return load_settings(broker_url=redis_url)


def pytest_configure(config: pytest.Config) -> None:
    """Where each test leaves its row: a folder for the processes of this run, made by the first of them."""
    if not hasattr(config, "workerinput"):
        os.environ[ROWS] = tempfile.mkdtemp(prefix="soak-")


@pytest.fixture(scope="session")
def rows(redis_server: RedisServer) -> Rows:
    """Takes up rows."""
    with redis_server.client() as client:
        return Rows(Path(os.environ[ROWS]), server_of(client))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A part of the page is written when all of its tests left their rows, and held."""
    if hasattr(session.config, "workerinput") or session.testsfailed:
        return
    for kind, names in WHOLE.items():
        data = Rows(Path(os.environ[ROWS])).complete(kind, names)
        if data is not None:
            write(kind, data)
