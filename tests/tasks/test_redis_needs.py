"""A Redis that will not serve us is refused at the start, in one line that says what to set."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from tasks.errors import EvictionError, RedisRefusalError, RedisUnreachableError
from tasks.servers import needs as redis_needs
from tasks.servers.needs import check_servers
from tasks.servers.refusals import servers_of
from tasks.settings import load_settings
from tests.servers import RedisServer, WorkerProcess, clean_env, free_port, wait_until
from trainer_client import RewardClient, Sample

SECRET = "s3cr3t-pa55"
SIDES = ("trainer", "worker")


def refusal_of(url: str, side: Any, **more: str) -> str:
    with pytest.raises(RedisRefusalError) as caught:
        check_servers(load_settings(broker_url=url, **more), side)
    said = str(caught.value)
    assert SECRET not in said
    assert "\n" not in said
    return said


@pytest.fixture
def as_user(redis_server: RedisServer) -> Iterator[Any]:
    """Makes an ACL user of the shared server; returns the URL with it."""
    made = []

    def make(*rules: str) -> str:
        with redis_server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "mine", "reset", "on", f">{SECRET}", *rules)
            admin.flushall()
        made.append("mine")
        return redis_server.url.replace("redis://", f"redis://mine:{SECRET}@")

    yield make
    with redis_server.client() as admin:
        admin.acl_deluser("mine")


EVERYTHING = ("~*", "&*", "+@all")
OUR_KEYS = ("~rewardq:*",)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "rules",
    [
        EVERYTHING,
        (*EVERYTHING, "-@admin", "-@dangerous", "+info"),  # as docker/README.md has it
        (*EVERYTHING, "-@admin", "-@dangerous"),
        (
            *OUR_KEYS,
            "&rewardq:queue:/0.celery.pidbox",
            "&rewardq:queue:/0.celeryev/worker.*",
            "+@all",
            "-info",
        ),
    ],
    ids=" ".join,
)
def test_a_user_with_the_rights_that_are_needed_is_let_in(as_user: Any, side: Any, rules: tuple[str, ...]) -> None:
    check_servers(load_settings(broker_url=as_user(*rules)), side, ["gpu"])


@pytest.mark.parametrize("side", SIDES)
def test_a_user_who_may_not_use_a_queue_of_this_config_is_refused(as_user: Any, side: Any) -> None:
    others = ("outcome", "claim", "starts", "probe", "queue:_kombu", "queue:gpu")
    some_keys = [f"~rewardq:{kind}*" for kind in others] + ["~rewardq:celery*", "~rewardq:queue:*.pidbox*"]
    settings = load_settings(broker_url=as_user(*some_keys, "&*", "+@all"))
    words = r"the user 'mine' may not use the keys of rewardq, rewardq:\*: `ACL SETUSER mine ~rewardq:\*`"
    with pytest.raises(RedisRefusalError, match=words):
        check_servers(settings, side, ["gpu", "vlm"])


def test_asking_leaves_nothing_behind_that_stays_and_tells_nobody_who_listens(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client, contextlib.closing(client.pubsub()) as everything:
        everything.psubscribe("rewardq:queue:/0.celery*")
        assert everything.get_message(timeout=5)
        for side in SIDES:
            check_servers(load_settings(broker_url=redis_url), side)  # type: ignore[arg-type]
        assert everything.get_message(timeout=0.2) is None
        for database in (0, 1):
            with redis.Redis.from_url(redis_url, db=database) as one:
                assert all(0 < one.pttl(key) <= 10_000 for key in one.scan_iter())


@pytest.mark.parametrize(
    ("rules", "side", "rule"),
    [
        (("-@scripting",), "trainer", "+eval +evalsha +script|exists +script|load"),
        (("-@scripting",), "worker", "+eval +evalsha +script|exists +script|load"),
        (("-lpush",), "trainer", "+lpush"),
        (("-lpush", "-brpop"), "worker", "+brpop +lpush"),
        (("-set",), "trainer", "+set"),
        (("-hset",), "trainer", "+hset"),
        (("-ping",), "worker", "+ping"),
        (("-publish",), "worker", "+publish"),
        (("-@pubsub",), "worker", "+psubscribe +publish +punsubscribe"),
        (("resetchannels",), "worker", "allchannels"),
        (("resetchannels", "-lpush"), "worker", "+lpush allchannels"),
        (("resetkeys", "~foo*"), "trainer", "~rewardq:*"),
        (("resetkeys", "~rewardq:p*"), "worker", "~rewardq:*"),
        (("-select",), "trainer", "+select"),
    ],
)
def test_a_right_that_is_missing_is_named_with_the_rule_that_gives_it(
    as_user: Any, redis_server: RedisServer, rules: tuple[str, ...], side: Any, rule: str
) -> None:
    url = as_user(*EVERYTHING, *rules)
    said = refusal_of(url, side)
    assert said.startswith("Redis for ")
    assert "the user 'mine' may not " in said
    assert f"`ACL SETUSER mine {rule}`" in said
    with redis_server.client() as admin:  # what it says is enough
        admin.execute_command("ACL", "SETUSER", "mine", *rule.split())
    check_servers(load_settings(broker_url=url), side)


def test_a_trainer_needs_no_channels(as_user: Any) -> None:
    check_servers(load_settings(broker_url=as_user(*EVERYTHING, "resetchannels", "-@pubsub")), "trainer")


@pytest.mark.parametrize("side", SIDES)
def test_one_database_is_said_with_what_to_set(private_redis: Any, side: Any) -> None:
    server = private_redis("--databases", "1")
    said = refusal_of(server.url, side)
    assert "Redis for payloads" in said
    assert "it has no database 1, the next after the broker's, where media go unless REWARDQ_PAYLOAD_URL is set" in said
    assert f"set REWARDQ_PAYLOAD_URL={server.url} (the broker's own)" in said
    assert "`databases 16`" in said
    check_servers(load_settings(broker_url=server.url, payload_url=server.url), side)


def test_the_last_database_and_one_beyond_it_are_said(redis_server: RedisServer) -> None:
    last, beyond = (redis_server.url.removesuffix("0") + number for number in ("15", "16"))
    assert f"set REWARDQ_PAYLOAD_URL={last} (the broker's own)" in refusal_of(last, "trainer")
    said = refusal_of(beyond, "trainer", payload_url=redis_server.url)
    assert "it has no database 16; name a lower one in REWARDQ_BROKER_URL (0 is always there)" in said


@pytest.mark.parametrize("has_slots", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_cluster_mode_is_said(private_redis: Any, side: Any, has_slots: bool) -> None:
    server = private_redis("--cluster-enabled", "yes")
    if has_slots:
        with server.client() as admin:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: b"cluster_state:ok" in admin.execute_command("CLUSTER", "INFO"), 30)
    assert "it is in cluster mode" in refusal_of(server.url, side)
    assert "point REWARDQ_PAYLOAD_URL at" in refusal_of(private_redis().url, side, payload_url=server.url)
    assert "point REWARDQ_RESULT_URL at" in refusal_of(private_redis().url, side, result_url=server.url)


@pytest.mark.parametrize("command", ["EVALSHA", "ZADD", "LPUSH", "PSUBSCRIBE", "SCRIPT", "SELECT"])
def test_a_command_that_was_taken_away_is_named(private_redis: Any, command: str) -> None:
    said = refusal_of(private_redis("--rename-command", command, "").url, "worker")
    assert f"does not know {command}: `rename-command` in its configuration" in said
    assert "6.2" in said


def test_info_may_be_taken_away(private_redis: Any) -> None:
    url = private_redis("--rename-command", "INFO", "").url
    for side in SIDES:
        check_servers(load_settings(broker_url=url), side)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ("", "Authentication required; it wants a password; write it in REWARDQ_BROKER_URL, redis://:PASSWORD@host:6379/0"),
        (f":{SECRET}@", "its password in REWARDQ_BROKER_URL is wrong (percent-encode / ? # @ % in it)"),
        (f"mine:{SECRET}@", "or `ACL SETUSER` has not set 'mine' on"),
        ("right:@", "REWARDQ_BROKER_URL has a user and no password; a password without a user is redis://:PASSWORD@host"),
    ],
)  # fmt: skip
def test_a_password_that_is_missing_or_wrong_is_said(private_redis: Any, who: str, words: str) -> None:
    url = private_redis("--requirepass", "right").url.replace("redis://", f"redis://{who}")
    said = refusal_of(url, "trainer")
    assert "it refuses this user: " in said
    assert words in said


def test_a_user_who_is_off_is_said(as_user: Any) -> None:
    assert "or `ACL SETUSER` has not set 'mine' on" in refusal_of(as_user(*EVERYTHING, "off"), "worker")


# --- what is no Redis, or speaks otherwise --------------------------------------------------------


@contextlib.contextmanager
def saying(words: bytes) -> Iterator[str]:
    """The URL of a port that says the same to everybody, and hangs up."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                talk, _ = listener.accept()
                with talk, contextlib.suppress(OSError):
                    talk.sendall(words)
                    talk.shutdown(socket.SHUT_WR)
                    talk.settimeout(2)
                    while talk.recv(1000):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_protected_mode_is_said() -> None:
    with saying(b"-DENIED Redis is running in protected mode because protected mode is enabled\r\n") as url:
        assert "it is in protected mode and serves its own host only; give it a password" in refusal_of(url, "worker")


def test_another_program_at_the_port_is_said() -> None:
    with saying(b"SSH-2.0-OpenSSH_9.2p1\r\n") as url:
        said = refusal_of(url, "trainer")
    assert "what answers there is no Redis but another program; REWARDQ_BROKER_URL needs the port of a Redis" in said


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_a_web_server_at_the_port_is_said() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        said = refusal_of(f"redis://127.0.0.1:{server.server_port}/0", "worker")
        server.shutdown()
        thread.join()
    assert "what answers there is no Redis but a web server (HTTP)" in said


def test_tls_at_a_port_without_is_said(redis_server: RedisServer) -> None:
    said = refusal_of(redis_server.url.replace("redis://", "rediss://"), "trainer")
    assert "it speaks without TLS, and the URL begins with rediss://; write redis:// in REWARDQ_BROKER_URL" in said


@pytest.mark.parametrize("side", SIDES)
def test_a_redis_where_the_url_names_a_sentinel_is_said(redis_server: RedisServer, side: Any) -> None:
    said = refusal_of(redis_server.url.replace("redis://", "sentinel://"), side)
    assert "what answers there is a Redis itself and no sentinel" in said
    assert "or write redis:// for this one" in said


def test_a_certificate_that_is_not_there_is_said(redis_server: RedisServer) -> None:
    url = redis_server.url.replace("redis://", "rediss://") + "?ssl_ca_certs=/nowhere/ca.pem"
    assert "names ssl_ca_certs=/nowhere/ca.pem, and this host has no such file" in refusal_of(url, "trainer")


@pytest.mark.system
def test_a_port_with_tls_is_said_where_the_url_has_none(tmp_path: Path, private_redis: Any) -> None:
    names = ("-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost", "-days", "2")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *names], cwd=tmp_path, check=True)
    port, cert = free_port(), str(tmp_path / "cert.pem")
    private_redis(
        *("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-cert-file", cert, "--tls-ca-cert-file", cert),
        *("--tls-key-file", str(tmp_path / "key.pem")),
    )
    said = refusal_of(f"redis://127.0.0.1:{port}/0", "worker")
    assert "it wants TLS, and the URL begins with redis://; write rediss:// in REWARDQ_BROKER_URL" in said
    assert "certificate verify failed" in refusal_of(f"rediss://127.0.0.1:{port}/0", "worker")
    check_servers(load_settings(broker_url=f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=none"), "worker")


# --- what waiting may mend is no refusal ----------------------------------------------------------


def test_a_server_that_passes_is_unreachable_and_no_refusal(private_redis: Any) -> None:
    server, crowded, replica = private_redis(), private_redis("--maxclients", "1"), private_redis()
    with replica.client() as admin, crowded.client() as only:
        admin.slaveof("127.0.0.1", server.port)
        only.ping()
        words = {
            "redis://127.0.0.1:1/0": "no Redis for queues answers at redis://127.0.0.1:1/0",
            crowded.url: "it has as many clients as its `maxclients` allows",
            replica.url: "it is a replica and takes no writes",
        }
        for url, said in words.items():
            with pytest.raises(RedisUnreachableError, match=said) as caught:
                check_servers(load_settings(broker_url=url), "trainer")
            assert not isinstance(caught.value, RedisRefusalError)


def test_of_several_sentinels_the_first_has_the_account_and_no_password_is_shown() -> None:
    url = f"sentinel://me:{SECRET}@one:26379/3;sentinel://me:{SECRET}@two:26379/3"
    for server in servers_of(load_settings(broker_url=url)):
        assert (server.user, server.database) == ("me", 3)
        assert SECRET not in server.says("words")


def test_each_server_is_named_by_its_own_variable(redis_url: str) -> None:
    for variable in ("broker_url", "result_url", "payload_url"):
        settings = load_settings(**{"broker_url": redis_url, variable: "redis://127.0.0.1:1/0"})
        with pytest.raises(RedisUnreachableError, match=f"or point REWARDQ_{variable.upper()} at the one you have"):
            check_servers(settings, "trainer")


# --- processes -----------------------------------------------------------------------------------


def test_a_client_raises_our_error_and_a_worker_ends_at_once_with_the_same_words(as_user: Any, tmp_path: Path) -> None:
    settings = load_settings(broker_url=as_user(*EVERYTHING, "-@scripting"))
    with pytest.raises(RedisRefusalError, match="ACL SETUSER mine") as caught:
        RewardClient.from_dict({"rewards": {"reward_model": "jpeg_compressibility"}}, "run", settings=settings)
    started = time.monotonic()
    worker = WorkerProcess("gpu", settings, tmp_path, None, {"REWARDQ_PRELOAD": "jpeg_compressibility"})
    assert worker.process.wait(60) == os.EX_CONFIG
    print(f"ended {time.monotonic() - started:.1f} s after its start")
    log = worker.log_text
    assert str(caught.value).partition("may not")[2] in log
    assert "worker refuses to start: Redis for queues" in log
    for unwanted in (SECRET, "Traceback", "loaded reward", "heartbeat failed"):
        assert unwanted not in log


def test_a_worker_ends_with_the_status_of_a_wrong_configuration(private_redis: Any, tmp_path: Path) -> None:
    worker = WorkerProcess("gpu", load_settings(broker_url=private_redis("--databases", "1").url), tmp_path, None, {})
    assert worker.process.wait(60) == os.EX_CONFIG
    assert "REWARDQ_PAYLOAD_URL=" in worker.log_text
    assert worker.log_text.count("worker refuses to start") == 1
    assert "Traceback" not in worker.log_text


def test_a_worker_without_channels_ends_too(as_user: Any, tmp_path: Path) -> None:
    settings = load_settings(broker_url=as_user("~*", "+@all", "resetchannels"))
    worker = WorkerProcess("gpu", settings, tmp_path, None, {})
    assert worker.process.wait(60) == os.EX_CONFIG
    assert "`ACL SETUSER mine allchannels`" in worker.log_text


def test_a_server_that_drops_keys_is_still_refused(private_redis: Any) -> None:
    url = private_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru").url
    for side in SIDES:
        with pytest.raises(EvictionError, match="maxmemory-policy allkeys-lru"):
            check_servers(load_settings(broker_url=url), side)  # type: ignore[arg-type]


def test_a_right_that_is_lost_later_ends_a_worker_too(as_user: Any, redis_server: RedisServer, tmp_path: Path) -> None:
    worker = WorkerProcess("gpu", load_settings(broker_url=as_user(*EVERYTHING)), tmp_path, None, {})
    wait_until(lambda: "] ready: " in worker.log_text, 60)
    with redis_server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "mine", "-brpop")
    assert worker.process.wait(60) == os.EX_CONFIG
    assert "the user 'mine' may not run BRPOP: `ACL SETUSER mine +brpop`" in worker.log_text
    assert "Frequent restarts" not in worker.log_text
    assert "Traceback" not in worker.log_text


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("-hincrby", "the user 'mine' may not run HINCRBY: `ACL SETUSER mine +hincrby`"),
        ("-set", "the user 'mine' may not run SET: `ACL SETUSER mine +set`"),
        ("off", "`ACL SETUSER` has not set 'mine' on"),
    ],
)
def test_a_right_that_tasks_are_the_first_to_miss_ends_a_worker_in_one_line(
    as_user: Any, redis_server: RedisServer, tmp_path: Path, lost: str, words: str
) -> None:
    worker = WorkerProcess("gpu", load_settings(broker_url=as_user(*EVERYTHING)), tmp_path, 2, {})
    wait_until(lambda: "] ready: " in worker.log_text, 60)
    config = {"rewards": {"reward_model": "jpeg_compressibility", "batch_size": 1}}
    with RewardClient.from_dict(config, "run", settings=load_settings(broker_url=redis_server.url)) as client:
        with redis_server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "mine", lost)
            if lost == "off":
                admin.execute_command("CLIENT", "KILL", "USER", "mine")
        client.submit([Sample(image=np.full((8, 8, 3), i, np.uint8)) for i in range(8)])
        assert worker.process.wait(60) == os.EX_CONFIG
        client.cancel()
    log = worker.log_text
    assert log.count("worker ends: Redis for ") == 1
    assert words in log
    for unwanted in ("Traceback", "raised unexpected", "heartbeat failed"):
        assert unwanted not in log
    # A connection that is cut is an outage, until the next one is refused.
    assert lost == "off" or "worker waits" not in log


def test_a_right_that_a_trainer_loses_later_is_said_as_such(as_user: Any, redis_server: RedisServer) -> None:
    settings = load_settings(broker_url=as_user(*EVERYTHING), reconcile_s=0.2)
    config = {"rewards": {"reward_model": "jpeg_compressibility"}}
    with RewardClient.from_dict(config, "run", settings=settings) as client:
        with redis_server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "mine", "-evalsha", "-eval")
        client.submit([Sample(image=np.zeros((8, 8, 3), np.uint8))])
        with pytest.raises(RedisRefusalError, match=r"refuses what it allowed when this client was made: .*'eval"):
            client.collect(timeout_s=30)
        with redis_server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "mine", "+@all")


# --- what is asked is what is used ---------------------------------------------------------------

ROOT = Path(redis_needs.__file__).parents[2]
ASKED_OTHERWISE = {"worker": ("psubscribe", "punsubscribe", "publish")}
BY_CONNECTIONS = ("hello", "auth", "select", "ping", "info")


def asked_by(side: Any) -> set[str]:
    """The commands that one side asks for, as ACL rules call them."""
    found = {*BY_CONNECTIONS, *ASKED_OTHERWISE.get(side, ())}
    for role, commands in redis_needs._COMMANDS.items():
        if side == "clean" and role != redis_needs.RESULTS:
            continue
        for first, *more in itertools.chain(*commands(side, "rewardq:one")):
            found.add(f"script|{more[0]}".lower() if first == "SCRIPT" else first.lower())
    return found


def test_users_with_exactly_the_commands_that_are_asked_for_score_a_step_with_groups_and_clean(
    private_redis: Any, tmp_path: Path
) -> None:
    server = private_redis()
    for side in ("trainer", "worker", "clean"):
        with server.client() as admin:
            rules = sorted(f"+{command}" for command in asked_by(side))
            admin.execute_command("ACL", "SETUSER", side, "reset", "on", f">{SECRET}", "~*", "&*", "-@all", *rules)
    trainer, by_worker, by_clean = (
        load_settings(broker_url=server.url.replace("redis://", f"redis://{side}:{SECRET}@"))
        for side in ("trainer", "worker", "clean")
    )
    worker = WorkerProcess("gpu", by_worker, tmp_path, None, {})
    names = ("jpeg_compressibility", "jpeg_compressibility_Rank")
    images = [np.full((8, 8, 3), 20 * i, np.uint8) for i in range(8)]
    with RewardClient.from_dict({"rewards": [{"reward_model": n} for n in names]}, "one", settings=trainer) as client:
        for _ in range(2):
            client.submit([Sample(image=image, group=i // 4) for i, image in enumerate(images)], group_size=4)
            batch = client.collect(timeout_s=60)
            assert all(batch.valid[name].all() for name in names)
    clean = [str(Path(sys.executable).with_name("rewardq")), "clean", "--run", "one", "--yes"]
    env = {**clean_env(), "REWARDQ_BROKER_URL": by_clean.broker}
    done = subprocess.run(clean, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "dropped 10 outcomes of run 'one'" in done.stdout) == (0, True), done.stderr
    worker.stop()
    assert "Traceback" not in worker.log_text
    with server.client() as admin:
        assert admin.execute_command("ACL", "LOG") == []


def test_each_command_of_our_scripts_is_asked_for() -> None:
    called = {}
    for folder in ("tasks", "workers", "trainer_client"):
        for file in (ROOT / folder).rglob("*.py"):
            for command in re.findall(r"redis\.call\('(\w+)'", file.read_text()):
                called[command.lower()] = file.name
    assert len(called) > 20
    assert {name: file for name, file in called.items() if name not in asked_by("trainer") | asked_by("worker")} == {}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (("-scan",), "the user 'mine' may not run SCAN: `ACL SETUSER mine +scan`"),
        (("-hgetall", "-unlink"), "`ACL SETUSER mine +hgetall +unlink`"),
        (("resetkeys", "~foo"), "`ACL SETUSER mine ~rewardq:*`"),
    ],
)
def test_clean_says_which_right_is_missing(as_user: Any, rules: tuple[str, ...], words: str) -> None:
    assert words in refusal_of(as_user(*EVERYTHING, *rules), "clean")


def test_clean_asks_the_results_only_and_writes_nothing(private_redis: Any) -> None:
    server = private_redis("--databases", "1")
    check_servers(load_settings(broker_url=server.url), "clean")
    with server.client() as admin:
        assert admin.dbsize() == 0
