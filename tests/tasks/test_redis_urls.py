"""URLs that lead to no Redis, or to another than they seem to, are refused where they are read."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from tasks import keys
from tasks.celery_app import client_outcomes, make_app
from tasks.errors import SettingsError
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.servers import ROOT, clean_env

SECRET = "s3cr3t"

WRONG = [
    ("redis://host:port/0", "its port must be a number from 0 to 65535, found 'port'"),
    ("redis://host:70000/0", "its port must be a number from 0 to 65535, found '70000'"),
    ("redis://host:-1/0", "its port must be a number"),
    ("redis://host:6379/abc", "its database must be a number, as in redis://host:6379/0; found 'abc'"),
    ("redis://host:6379/0/1", "its database must be a number"),
    ("redis://host:6379/-1", "its database must be a number"),
    ("redis://host:6379/1.5", "its database must be a number"),
    ("redis://host:6379/0?sockt_timeout=3", "it has an option 'sockt_timeout' that is not known"),
    ("redis://host:6379/0?ssl_ca_certs=/ca.pem", "ssl_ca_certs is for TLS, and the URL begins with redis://"),
    ("rediss://host:6379/0?ssl_cert_reqs=maybe", "ssl_cert_reqs must be required, optional or none, found 'maybe'"),
    ("rediss://host:6379/0?ssl_ca_cert=/ca.pem", "did you mean 'ssl_ca_certs'?"),
    ("redis:///0", "it names no host; this machine is redis://localhost:6379/0"),
    ("redis://:6379/0", "it names no host"),
    ("redis://host :6379/0", "there is a space in its host, 'host '"),
    (f"redis://:{SECRET}@:6379/0", "it names no host"),
    (f"redis://:{SECRET}/x@host:6379/0", "written percent-encoded"),
    (f"redis://:12/{SECRET}@host:6379/0", "written percent-encoded"),
    (f"redis://user:12?{SECRET}@host:6379/0", "written percent-encoded"),
    (f"redis://:{SECRET}#x@host:6379/0", "written percent-encoded"),
    (f"redis://user:{SECRET}?x@host:6379/0", "written percent-encoded"),
    ("sentinel://one:26379/0;sentinel://two:twenty/0", "its port must be a number from 0 to 65535, found 'twenty'"),
    ("sentinel://one:26379/mymaster", "its database must be a number"),
    ("valkey://host:6379/0", "is not a URL this pipeline speaks; use redis://host:6379/0"),
    ("unix:///run/redis.sock", "is not a URL this pipeline speaks"),
    ("host:6379", "is not a URL this pipeline speaks"),
    ("//host:6379", "is not a URL this pipeline speaks"),
]


@pytest.mark.parametrize("role", ["broker_url", "result_url", "payload_url"])
@pytest.mark.parametrize(("url", "words"), WRONG)
def test_a_url_with_a_wrong_part_is_refused_with_its_variable_and_without_its_password(
    role: str, url: str, words: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(**{role: url})
    said = str(caught.value)
    assert said.startswith(f"REWARDQ_{role.upper()}: ")
    assert words in said
    assert SECRET not in said


@pytest.mark.parametrize("option", ["socket_timeout=5", "db=1", "client_name=me", "max_connections=9"])
def test_options_that_celery_cannot_take_are_refused_for_the_broker_only(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(SettingsError, match=f"REWARDQ_BROKER_URL: .*it can have no option {name}") as caught:
        load_settings(broker_url=f"redis://host:6379/0?{option}")
    assert SECRET not in str(caught.value)
    assert load_settings(result_url=f"redis://host:6379/0?{option}").results.endswith(option)


@pytest.mark.parametrize("role", ["broker", "results", "payloads"])
@pytest.mark.parametrize(
    ("url", "moved"),
    [
        (f"redis://host:6379/0?password={SECRET}", f"redis://:{SECRET}@host:6379/0"),
        (f"redis://host:6379/0?username=me&password={SECRET}", f"redis://me:{SECRET}@host:6379/0"),
        ("redis://host:6379/0?password=a%2Fb%40c", "redis://:a%2Fb%40c@host:6379/0"),
        (
            f"rediss://host:6379/0?ssl_cert_reqs=none&password={SECRET}",
            f"rediss://:{SECRET}@host:6379/0?ssl_cert_reqs=none",
        ),
    ],
)
def test_a_password_in_a_query_is_moved_to_where_libraries_hide_it(role: str, url: str, moved: str) -> None:
    variable = {"broker": "broker_url", "results": "result_url", "payloads": "payload_url"}[role]
    settings = load_settings(**{variable: url})
    assert getattr(settings, role) == moved
    assert SECRET not in repr(settings)
    assert SECRET not in str(make_app(settings).conf.table(with_defaults=True, censored=True))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"redis://{SECRET}@host:6379/0", "a user and no password"),
        (
            f"redis://:{SECRET}@host:6379/0?password={SECRET}",
            "an account in front of its host and another in its query",
        ),
    ],
)
def test_a_url_whose_account_is_in_doubt_is_refused(url: str, words: str) -> None:
    for variable in ("broker_url", "result_url", "payload_url"):
        with pytest.raises(SettingsError, match=words) as caught:
            load_settings(**{variable: url})
        assert SECRET not in str(caught.value)


def test_an_option_with_a_wrong_value_is_refused() -> None:
    with pytest.raises(SettingsError, match="its option socket_timeout cannot be 'soon'"):
        load_settings(payload_url="redis://host:6379/0?socket_timeout=soon")


@pytest.mark.parametrize("more", ["", "/", "//", "/0", "/3", " ", "/0\n"])
def test_urls_that_are_usual_lead_all_three_libraries_to_the_same_server(redis_url: str, more: str) -> None:
    settings = load_settings(broker_url=redis_url.removesuffix("/0") + more)
    app: Any = make_app(settings)
    with app.connection_for_write() as connection, connect(settings.broker) as ours:
        clients = [connection.channel().client, client_outcomes(app).redis, ours]
        clients[0].set("written", more)
        in_full = f"{keys.BROKER}written"  # kombu's client puts the prefix in front where it writes
        assert [client.get(in_full) for client in clients] == [more.encode()] * 3
    app.backend.client.connection_pool.disconnect()
    app.close()


def test_a_worker_with_such_a_url_ends_with_the_status_of_a_wrong_configuration(tmp_path: Any) -> None:
    env = {**clean_env(), "PYTHONPATH": str(ROOT), "REWARDQ_BROKER_URL": f"redis://:{SECRET}@host:port/0"}
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", "gpu"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == os.EX_CONFIG
    assert "REWARDQ_BROKER_URL: " in done.stderr
    assert "its port must be a number from 0 to 65535, found 'port'" in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
