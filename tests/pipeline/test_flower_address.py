"""Flower, by its documented command, is reached from this host only, or with a login."""

from __future__ import annotations

import base64
import ipaddress
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.servers import ends_with_us, free_port, wait_until, worker_env

LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp."""

LOGIN = {"FLOWER_BASIC_AUTH": "me:s3cret"}


@pytest.fixture
def start(settings, tmp_path):
    """Starts `celery -A tasks flower` with words and variables; gives its process and port."""
    started = []

    def start(*words, **env):
        port = free_port()
        command = [sys.executable, "-m", "celery", "-A", "tasks", "flower", f"--port={port}", *words]
        process = subprocess.Popen(
            [*ends_with_us("KILL"), *command],
            cwd=tmp_path,
            env=worker_env(settings, env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process, port

    yield start
    for process in started:
        process.kill()
        process.communicate()


def listens_on(port: int) -> list[str]:
    """The addresses on which this host listens at a port."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            address, _, hex_port = local.partition(":")
            if state == LISTENS and int(hex_port, 16) == port:
                # The kernel writes each four bytes of an address as one number of this machine's byte order.
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.append(str(ipaddress.ip_address(b"".join(words))))
    return sorted(found)


def status_of(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("words", "env", "addresses"),
    [
        ((), {}, ["127.0.0.1"]),
        ((), {"FLOWER_ADDRESS": ""}, ["127.0.0.1"]),
        (("--address=127.0.0.2",), {}, ["127.0.0.2"]),
        ((), LOGIN, ["127.0.0.1"]),
        (("--address=0.0.0.0",), LOGIN, ["0.0.0.0"]),
        (("--basic_auth=me:s3cret",), {"FLOWER_ADDRESS": "0.0.0.0"}, ["0.0.0.0"]),
    ],
)
def test_it_listens_on_this_host_unless_it_is_told_otherwise(start, words, env, addresses):
    process, port = start(*words, **env)
    wait_until(lambda: process.poll() is not None or listens_on(port))
    assert process.poll() is None, process.communicate()[0]
    assert listens_on(port) == addresses


@pytest.mark.parametrize(
    ("words", "env", "address"),
    [
        (("--address=0.0.0.0",), {}, "0.0.0.0"),
        (("--address=::",), {}, "::"),
        ((), {"FLOWER_ADDRESS": "0.0.0.0"}, "0.0.0.0"),
        (("--address=0.0.0.0", "--basic_auth=me:"), {}, "0.0.0.0"),
        (("--address=0.0.0.0",), {"FLOWER_BASIC_AUTH": ":"}, "0.0.0.0"),
        (("--address=some.host",), {}, "some.host"),
    ],
)
def test_an_address_for_others_without_a_login_is_refused(start, words, env, address):
    process, port = start(*words, **env)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == os.EX_CONFIG
    assert f"flower: it would listen on {address} without a login" in said
    assert "set FLOWER_BASIC_AUTH=user:password" in said
    assert "Traceback" not in said
    assert listens_on(port) == []


def test_the_configuration_file_counts_too(start, tmp_path):
    (tmp_path / "flowerconfig.py").write_text("address = '0.0.0.0'\n")
    process, _ = start()
    assert "without a login" in process.communicate(timeout=60)[0]
    (tmp_path / "flowerconfig.py").write_text("address = '0.0.0.0'\nbasic_auth = ['me:s3cret']\n")
    process, port = start()
    wait_until(lambda: process.poll() is not None or listens_on(port))
    page = f"http://127.0.0.1:{port}/"
    assert status_of(page) == 401
    login = base64.b64encode(b"me:s3cret").decode()
    assert status_of(page, Authorization=f"Basic {login}") == 200
