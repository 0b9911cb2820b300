"""Beyond one Redis: payloads on a second one, TLS with an ACL user, Sentinel with a failover in the midst of a step."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import pytest
import redis

from tasks import keys
from tasks.celery_app import make_app
from tasks.errors import RedisUnreachableError
from tasks.servers import connections
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.pipeline.conftest import (
    assert_rewards,
    clients,  # noqa: F401  (a fixture)
    expected_ranks,
    jpeg_bytes,
    noisy,
    samples_of,
)
from tests.servers import RedisServer, WorkerProcess, ends_with_us, free_port, wait_until
from trainer_client import Sample

PASSWORD = "s3cret-word"
SENTINELS_PASSWORD = "an0ther-word"


def test_payloads_on_a_second_redis(private_redis, workers, clients):  # noqa: F811
    queues, payloads = private_redis(), private_redis()
    settings = load_settings(broker_url=queues.url, payload_url=payloads.url)
    client = clients("PixelCode", settings=settings)
    client.submit(samples_of(range(8)))
    client.flush()
    with payloads.client() as second:
        assert len(second.keys(keys.payload("*"))) > 8  # images and a request
    for database in range(2):
        with queues.client(database) as first:
            assert first.keys(keys.payload("*")) == []
    workers("gpu", settings=settings)
    assert_rewards(client.collect(timeout_s=60), range(8))


class GuardedRedis(RedisServer):
    """A Redis that wants a password."""

    def client_of(self):
        return connect(f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0")

    def _answers(self):
        with contextlib.suppress(redis.RedisError), self.client_of() as client:
            return client.ping()
        return False

    def _is_ours(self):
        return self._answers()


# --- TLS -----------------------------------------------------------------------------------------


class TlsRedis(GuardedRedis):
    """A Redis that speaks TLS only, with an ACL user and no default user."""

    def __init__(self, folder, certificates):
        self.tls_port = free_port()
        self.certificates = certificates
        users = folder / "users.acl"
        rules = f">{PASSWORD} ~rewardq:* &* +@all -@admin -@dangerous +info"
        users.write_text(f"user default off\nuser rewardq on {rules}\n")
        super().__init__(
            folder,
            *("--tls-port", str(self.tls_port), "--tls-auth-clients", "no", "--aclfile", str(users)),
            *("--tls-cert-file", str(certificates / "server.pem"), "--tls-key-file", str(certificates / "server.key")),
            *("--tls-ca-cert-file", str(certificates / "ca.pem")),
        )

    def url_of(self, user="rewardq", password=PASSWORD, ca="ca.pem"):
        where = f"127.0.0.1:{self.tls_port}/0?ssl_ca_certs={self.certificates / ca}"
        return f"rediss://{user}:{password}@{where}"

    def client_of(self):
        return connect(self.url_of())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A throwaway authority `ca`, a server's certificate by it, and another authority `other`."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    for name in ("ca", "other"):
        openssl(*new, "-x509", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    openssl(*new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    signed = ("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
    openssl(*signed, "-out", "server.pem", "-days", "2", "-extfile", "names")
    return folder


@pytest.fixture
def tls_redis(tmp_path, certificates):
    server = TlsRedis(tmp_path, certificates)
    yield server
    server.stop()


@pytest.mark.system
def test_broker_and_results_over_tls_with_an_acl_user(tls_redis, private_redis, workers, clients):  # noqa: F811
    settings = load_settings(broker_url=tls_redis.url_of(), payload_url=private_redis().url)
    (worker,) = workers("gpu", settings=settings)
    client = clients("PixelCode", {"reward_model": "jpeg_incompressibility_Rank", "batch_size": 2}, settings=settings)
    client.submit(samples_of(range(8), group="g"), group_size=8)
    batch = client.collect(timeout_s=60)
    assert_rewards(batch, range(8))
    assert batch.valid["jpeg_incompressibility_Rank"].all()
    assert PASSWORD not in worker.log_text


@pytest.mark.system
def test_payloads_over_tls_in_the_next_database(tls_redis, workers, clients):  # noqa: F811
    settings = load_settings(broker_url=tls_redis.url_of())
    workers("gpu", settings=settings)
    client = clients("PixelCode", settings=settings)
    client.submit(samples_of(range(8)))
    assert_rewards(client.collect(timeout_s=60), range(8))


@pytest.mark.system
def test_a_wrong_password_or_authority_is_said_at_once(tls_redis, clients, tmp_path):  # noqa: F811
    wrong = {
        "refuses this user": tls_redis.url_of(password="wrong-word"),
        "certificate verify failed": tls_redis.url_of(ca="other.pem"),
    }
    for words, url in wrong.items():
        with pytest.raises(RedisUnreachableError, match=words) as raised:
            clients("PixelCode", settings=load_settings(broker_url=url))
        assert "wrong-word" not in str(raised.value)
        assert PASSWORD not in str(raised.value)
    worker = WorkerProcess("gpu", load_settings(broker_url=wrong["refuses this user"]), tmp_path, None, {})
    assert worker.process.wait(30) == os.EX_CONFIG
    assert "refuses this user" in worker.log_text
    assert "wrong-word" not in worker.log_text


# --- Sentinel ------------------------------------------------------------------------------------


class Sentinels:
    """Three sentinels with a password of their own over a server and its replica, which have one for the data."""

    def __init__(self, folder, start_redis):
        account = ("--requirepass", PASSWORD, "--masterauth", PASSWORD)
        self.first = start_redis(*account)
        self.second = start_redis(*account, "--replicaof", "127.0.0.1", str(self.first.port))
        wait_until(lambda: self.second.client_of().info("replication")["master_link_status"] == "up", 20)
        self.ports = [free_port() for _ in range(3)]
        self._processes = []
        for port in self.ports:
            conf = folder / f"sentinel-{port}.conf"
            conf.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
                f"requirepass {SENTINELS_PASSWORD}\nsentinel sentinel-pass {SENTINELS_PASSWORD}\n"
                f"sentinel monitor mymaster 127.0.0.1 {self.first.port} 2\n"
                f"sentinel auth-pass mymaster {PASSWORD}\n"
                "sentinel down-after-milliseconds mymaster 1000\n"
                "sentinel failover-timeout mymaster 5000\n"
            )
            log = conf.with_suffix(".log").open("wb")
            command = [*ends_with_us("KILL"), "redis-server", str(conf), "--sentinel"]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            log.close()
        for port in self.ports:
            wait_until(lambda port=port: self._knows_all(port), 30)

    def _knows_all(self, port):
        with contextlib.suppress(redis.RedisError), self._ask(port) as client:
            about = client.sentinel_master("mymaster")
            return about["num-other-sentinels"] == 2 and about["num-slaves"] == 1
        return False

    @staticmethod
    def _ask(port):
        return redis.Redis(port=port, password=SENTINELS_PASSWORD, decode_responses=True)

    @property
    def url(self):
        return ";".join(f"sentinel://:{PASSWORD}@127.0.0.1:{port}/0" for port in self.ports)

    def kill(self, number):
        self._processes[number].kill()
        self._processes[number].wait()

    def pause(self, number):
        """Let one hang: it takes connections and answers nothing."""
        self._processes[number].send_signal(signal.SIGSTOP)

    def stop(self):
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(10)


@pytest.fixture
def sentinels(tmp_path_factory):
    servers = []

    def start_redis(*options):
        servers.append(GuardedRedis(tmp_path_factory.mktemp("redis"), *options))
        return servers[-1]

    made = Sentinels(tmp_path_factory.mktemp("sentinels"), start_redis)
    yield made
    made.stop()
    for server in servers:
        if not server.is_stopped:
            server.stop()


@pytest.mark.system
def test_a_failover_in_the_midst_of_a_step_costs_no_reward(sentinels, workers, clients):  # noqa: F811
    settings = load_settings(broker_url=sentinels.url, sentinel_password=SENTINELS_PASSWORD)
    (worker,) = workers("gpu", settings=settings)
    rank = {"reward_model": "jpeg_incompressibility_Rank", "batch_size": 2}
    client = clients({"reward_model": "Slow", "seconds": 0.5, "batch_size": 2}, rank, settings=settings)
    pictures = [noisy(n, 10 * (n % 8) + 5) for n in range(48)]

    def submit(numbers):
        for group in (numbers[:8], numbers[8:16], numbers[16:]):  # each a chord of four headers
            samples = [Sample(prompt=f"number {n}", image=pictures[n], group=f"g{n // 8}") for n in group]
            client.submit(samples, group_size=8)

    submit(range(24))
    wait_until(lambda: client.pending() <= 44, 30)
    sentinels.first.kill()
    submit(range(24, 48))
    started = time.monotonic()
    batch = client.collect(timeout_s=120)
    print(f"collected {time.monotonic() - started:.1f} s after the server was killed")
    assert batch.valid["Slow"].all(), batch.describe_failures()
    sizes = [jpeg_bytes(picture) for picture in pictures]
    expected = [rank for g in range(0, 48, 8) for rank in expected_ranks(sizes[g : g + 8])]
    assert batch.rewards["jpeg_incompressibility_Rank"].tolist() == pytest.approx(expected)
    assert worker.process.poll() is None
    with sentinels.second.client_of() as client:
        assert client.info("replication")["role"] == "master"
    said = str(make_app(settings).control.inspect(timeout=5).stats())  # as Flower shows it
    assert worker.process.poll() is None
    assert "sentinel" in said
    for secret in (PASSWORD, SENTINELS_PASSWORD):
        assert secret not in worker.log_text
        assert secret not in said


@pytest.mark.system
@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_sentinel_that_is_away_holds_nobody_up(sentinels, workers, clients, how, monkeypatch):  # noqa: F811
    settings = load_settings(broker_url=sentinels.url, sentinel_password=SENTINELS_PASSWORD)
    sentinels.kill(0) if how == "killed" else sentinels.pause(0)
    with monkeypatch.context() as patch:
        patch.setattr(connections, "SENTINEL_TIMEOUT_S", 4.0)
        started = time.monotonic()
        with connect(settings.broker, settings.sentinels) as client:
            assert client.ping()
        assert time.monotonic() - started < 8, "one that hangs is waited for once"
    started = time.monotonic()
    workers("gpu", settings=settings)
    client = clients("PixelCode", settings=settings)
    client.submit(samples_of(range(16)))
    assert_rewards(client.collect(timeout_s=60), range(16))
    assert time.monotonic() - started < 40
