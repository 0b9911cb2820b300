from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import threading
import time

import numpy as np
import pytest

from tasks.errors import EvictionError, RedisUnreachableError, SettingsError
from tasks.payloads import FileStore, RedisStore, name_in_parts, new_client_id, open_store
from tasks.servers.connections import LOST
from tasks.settings import load_settings
from tests.servers import wait_until

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture(params=["redis", "file"])
def open_one(request, redis_url, tmp_path):
    """Opens the same store anew at each call."""
    url = {"redis": redis_url, "file": f"file://{tmp_path}/pay%20loads"}[request.param]
    stores = []

    def open_it():
        stores.append(open_store(load_settings(payload_url=url), keeps_spares=True))
        return stores[-1]

    yield open_it
    for store in stores:
        store.close()


@pytest.fixture
def store(open_one):
    return open_one()


def test_what_is_put_is_got_in_the_order_asked_for(store):
    store.put({"c.1": b"one", "c.2": b"two"}, ttl_s=60)
    assert store.get(["c.2", "none", "c.1", "c.2"]) == [b"two", None, b"one", b"two"]
    assert store.get([]) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(range(256)),
        bytearray(b"abc"),
        memoryview(b"abc"),
        memoryview(PIXELS),
        memoryview(np.ones((2, 3), np.float32)),
        PIXELS,
        np.ones((2, 3), np.float32),
    ],
    ids=["empty", "bytes", "bytearray", "memoryview", "pixels", "floats", "array", "float array"],
)
def test_bytes_of_any_kind_arrive_whole(store, data):
    store.put({"c.1": data}, ttl_s=60)
    assert store.get(["c.1"]) == [bytes(data) if isinstance(data, bytes | bytearray) else data.tobytes()]
    assert store.bytes_in_use() == memoryview(data).nbytes


def test_three_megabytes_arrive_whole(store):
    data = os.urandom(3_000_000)
    store.put({"c.1": data}, ttl_s=60)
    assert store.get(["c.1"]) == [data]


@pytest.fixture
def in_parts(store):
    """A name in parts for so many bytes, and those bytes."""

    def make(num_bytes, part_bytes):
        return name_in_parts("c.1.digest", num_bytes, part_bytes), os.urandom(num_bytes)

    return make


@pytest.mark.parametrize("num_bytes", [9, 10, 11, 19, 20, 21, 1_000, 1_001])
def test_a_payload_in_parts_arrives_whole_is_counted_renewed_and_freed_whole(store, in_parts, num_bytes):
    name, data = in_parts(num_bytes, 10)
    assert name == ("c.1.digest" if num_bytes <= 10 else f"c.1.digest.of{-(-num_bytes // 10)}")
    store.put({"c.2": b"before", name: data, "c.3": b"after"}, ttl_s=60)
    assert store.get(["c.3", name, "c.2"]) == [b"after", data, b"before"]
    assert store.bytes_in_use() == num_bytes + 11
    assert store.renew([name, "c.2"], ttl_s=60) == []
    store.put({name: data}, ttl_s=60)
    assert store.bytes_in_use() == num_bytes + 11
    store.free([name])
    assert store.get([name]) == [None]
    assert store.renew([name, "c.2"], ttl_s=60) == [name]
    assert store.bytes_in_use() == 11


def test_an_array_is_cut_into_parts_by_its_bytes(store):
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    floats = np.arange(24, dtype=np.float32).reshape(2, 12)
    store.put({"c.1.of4": pixels, "c.2.of5": memoryview(floats)}, ttl_s=60)
    assert store.get(["c.1.of4", "c.2.of5"]) == [pixels.tobytes(), floats.tobytes()]


def test_no_value_is_larger_than_a_part(redis_server, redis_url):
    store, (name, num_bytes) = RedisStore(redis_url), (name_in_parts("c.1", 1001, 100), 1001)
    store.put({name: os.urandom(num_bytes)}, ttl_s=60)
    with redis_server.client() as client:
        sizes = [client.strlen(key) for key in client.keys("rewardq:payload:*")]
    assert sorted(sizes) == [91] * 11
    store.close()


@pytest.mark.parametrize("which", [0, 4, 10])
def test_a_payload_of_which_a_part_is_gone_is_gone(redis_server, redis_url, which):
    store, (name, data) = RedisStore(redis_url), ("c.1.of11", os.urandom(1001))
    store.put({name: data}, ttl_s=60)
    with redis_server.client() as client:
        client.delete(f"rewardq:payload:{name}.{which}")
    assert store.get([name]) == [None]
    assert store.renew(["x", name, "y"], ttl_s=60) == ["x", name, "y"]
    store.put({name: data}, ttl_s=60)
    assert store.get([name]) == [data]
    assert store.renew([name], ttl_s=60) == []
    store.free([name])
    assert store.bytes_in_use() == 0
    store.close()


def test_the_parts_of_a_payload_expire_together_and_live_on_together(redis_url):
    store = RedisStore(redis_url)
    store.put({"c.1.of3": b"123456789", "c.2.of3": b"123456789"}, ttl_s=1.0)
    assert store.renew(["c.1.of3"], ttl_s=60) == []
    wait_until(lambda: store.bytes_in_use() == 9)
    assert store.get(["c.1.of3", "c.2.of3"]) == [b"123456789", None]
    store.close()


@pytest.mark.parametrize("num_bytes", [200, 30_000])
def test_more_parts_than_one_call_of_a_script_takes(store, num_bytes):
    name, data = name_in_parts("c.1", num_bytes, 10), os.urandom(num_bytes)
    store.put({name: data}, ttl_s=60)
    assert store.get([name]) == [data]
    assert store.renew([name], ttl_s=60) == []
    store.free([name])
    assert store.bytes_in_use() == 0


def test_a_store_says_which_value_it_takes_and_what_it_holds(private_redis, tmp_path):
    server = private_redis("--maxmemory", "100mb", "--proto-max-bulk-len", "3mb")
    store, folder = RedisStore(server.url), FileStore(tmp_path / "store")
    assert (store.value_bytes(), store.capacity_bytes()) == (3 * 2**20, 100 * 2**20)
    assert folder.capacity_bytes() >= shutil.disk_usage(tmp_path).total
    with server.client() as admin:
        admin.config_set("maxmemory", 0)
        admin.acl_setuser(
            "other", enabled=True, passwords=["+pw"], keys=["*"], categories=["+@all"], commands=["-info", "-config"]
        )
    other = RedisStore(server.url.replace("redis://", "redis://other:pw@"))
    assert (other.value_bytes(), other.capacity_bytes()) == (512 * 2**20, None)
    fresh = RedisStore(server.url)
    assert fresh.capacity_bytes() is None
    for one in (store, other, fresh):
        one.close()


def test_the_same_name_again_is_harmless_and_counted_once(store):
    for _ in range(3):
        store.put({"c.1": b"12345"}, ttl_s=60)
    assert store.get(["c.1"]) == [b"12345"]
    assert store.bytes_in_use() == 5


def test_large_and_small_values_come_in_the_order_asked_for(redis_url):
    store = open_store(load_settings(payload_url=redis_url))
    sizes = (0, 1, 2**16 - 1, 2**16, 2**16 + 1, 3_145_728, 5, 3_145_728)
    payloads = {f"c.{i}": random.Random(i).randbytes(size) for i, size in enumerate(sizes)}
    store.put(payloads, ttl_s=60)
    for _ in range(3):
        found = store.get([*payloads, "none"])
        assert [None if data is None else bytes(data) for data in found] == [*payloads.values(), None]
        del found
    store.close()


def test_a_large_value_that_is_cut_off_is_an_error_of_the_server_and_the_next_one_is_whole(redis_url):
    cut = threading.Event()
    with proxied(redis_url, cut) as url:
        store = RedisStore(url)
        data = random.Random(1).randbytes(3_145_728)
        store.put({"c.1": data}, ttl_s=60)
        cut.set()
        with pytest.raises(LOST):
            store.get(["c.1"])
        cut.clear()
        assert store.get(["c.1"]) == [data]
        store.close()


@contextlib.contextmanager
def proxied(redis_url, cut):
    """A way to a Redis that hangs up in the middle of a large answer while `cut` is set."""
    port = int(redis_url.rpartition(":")[2].partition("/")[0])
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=pump, args=(server, client, True), daemon=True).start()

    def pump(source, target, is_answer) -> None:
        num_bytes = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                num_bytes += len(data)
                target.sendall(data)
                if is_answer and cut.is_set() and num_bytes > 1_000_000:
                    break
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield redis_url.replace(f":{port}/", f":{listener.getsockname()[1]}/")
    finally:
        listener.close()


def test_putting_and_freeing_nothing_is_no_error(store):
    store.put({}, ttl_s=60)
    store.free([])
    assert store.renew([], ttl_s=60) == []
    assert store.bytes_in_use() == 0


def test_what_is_freed_is_gone_and_not_counted(store):
    store.put({"c.1": b"12345", "c.2": b"123"}, ttl_s=60)
    assert store.bytes_in_use() == 8
    store.free(["c.1", "never.there"])
    assert store.get(["c.1", "c.2"]) == [None, b"123"]
    assert store.bytes_in_use() == 3
    store.free(["c.1", "c.2"])
    assert store.bytes_in_use() == 0


def test_what_expires_is_gone_and_not_counted(store):
    store.put({"c.2": b"123"}, ttl_s=60)
    store.put({"c.1": b"12345"}, ttl_s=1.0)
    assert store.bytes_in_use() == 8
    # In the millisecond in which it expires it is still there, and not counted any more.
    wait_until(lambda: store.bytes_in_use() == 3 and store.get(["c.1", "c.2"]) == [None, b"123"])


def test_what_is_renewed_lives_on_and_what_is_gone_is_named(store):
    store.put({"c.1": b"12345", "c.2": b"123"}, ttl_s=1.0)
    assert store.renew(["c.1", "none"], ttl_s=60) == ["none"]
    wait_until(lambda: store.bytes_in_use() == 5 and store.get(["c.1", "c.2"]) == [b"12345", None])
    assert store.renew(["c.1", "c.2"], ttl_s=60) == ["c.2"]


def test_bytes_of_all_clients_are_counted_by_each(open_one):
    mine, yours = open_one(), open_one()
    mine.put({"mine.1": b"12345"}, ttl_s=60)
    yours.put({"yours.1": b"123"}, ttl_s=60)
    assert mine.bytes_in_use() == yours.bytes_in_use() == 8
    assert yours.get(["mine.1"]) == [b"12345"]
    mine.free(["mine.1"])
    assert mine.bytes_in_use() == yours.bytes_in_use() == 3


def test_whose_bytes_a_store_holds_is_known_by_the_names(open_one):
    one, two = new_client_id("run-1.a_b"), new_client_id("run-2")
    assert new_client_id("run-2") != two
    store = open_one()
    store.put({f"{one}.1.digest": b"12345", f"{one}.2.digest.of3": b"123456789", f"{two}.1.request": b"12"}, ttl_s=60)
    store.put({f"{two}.{i}.digest": b"1" for i in range(2, 1502)}, ttl_s=60)
    store.put({"c.1": b"123"}, ttl_s=60)
    assert open_one().bytes_by_run() == {"run-1.a_b": 14, "run-2": 1502, "": 3}
    store.free([f"{one}.1.digest", f"{one}.2.digest.of3"])
    assert store.bytes_by_run() == {"run-2": 1502, "": 3}


def test_payloads_of_a_client_that_died_stop_counting_when_they_expire(open_one):
    other = open_one()
    open_one().put({"dead.1": b"12345"}, ttl_s=1.0)
    assert other.bytes_in_use() == 5
    wait_until(lambda: other.bytes_in_use() == 0)


def test_who_reaches_the_same_store_sees_the_same_identity(open_one):
    identities = {open_one().identity() for _ in range(3)}
    assert len(identities) == 1
    assert open_one().identity() in identities


def test_threads_that_ask_first_at_once_see_one_identity(open_one):
    start, seen = threading.Barrier(8), []

    def ask():
        store = open_one()
        start.wait()
        seen.append(store.identity())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1


def test_other_stores_have_other_identities(redis_url, tmp_path):
    urls = [redis_url, redis_url.replace("/0", "/1"), f"file://{tmp_path}/a", f"file://{tmp_path}/b"]
    stores = [open_store(load_settings(payload_url=url)) for url in urls]
    assert len({store.identity() for store in stores}) == 4
    for store in stores:
        store.close()


def test_a_reader_sees_all_of_a_payload_or_nothing(open_one):
    versions = [bytes([i]) * 200_000 for i in range(8)]
    writer, reader = open_one(), open_one()
    done = threading.Event()

    def write():
        while not done.is_set():
            for data in versions:
                writer.put({"c.1": data}, ttl_s=60)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        ends_at, seen = time.monotonic() + 0.5, set()
        while time.monotonic() < ends_at or (len(seen) < 2 and thread.is_alive()):
            (data,) = reader.get(["c.1"])
            assert data is None or (len(data) == 200_000 and len(set(data)) == 1)
            seen.add(None if data is None else bytes(data))
    finally:
        done.set()
        thread.join()
    assert len(seen) > 1


def test_a_store_that_can_be_used_passes_its_check(store):
    store.check()


def test_a_redis_that_is_away_is_named_without_its_password():
    store = RedisStore("redis://user:s3cr3t@127.0.0.1:1/0")
    with pytest.raises(RedisUnreachableError) as caught:
        store.check()
    assert "Redis for payloads answers at redis://user:***@127.0.0.1:1/0" in str(caught.value)
    assert "redis-server" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


def test_nothing_of_ours_lives_in_redis_for_ever(redis_server, redis_url):
    store = RedisStore(redis_url)
    store.put({"c.1": b"12345"}, ttl_s=60)
    with redis_server.client() as client:
        assert {k.decode(): client.pttl(k) > 0 for k in client.scan_iter()} == {
            "rewardq:payload:c.1": True,
            "rewardq:ledger": True,
            "rewardq:ledger_bytes": True,
        }
    store.free(["c.1"])
    assert store.bytes_in_use() == 0
    store.close()


def test_bytes_in_use_are_right_after_redis_was_emptied(redis_server, redis_url):
    store = RedisStore(redis_url)
    store.put({"c.1": b"12345"}, ttl_s=60)
    with redis_server.client() as client:
        client.flushall()
    assert store.bytes_in_use() == 0
    assert store.renew(["c.1"], ttl_s=60) == ["c.1"]
    store.free(["c.1"])
    assert store.bytes_in_use() == 0
    store.put({"c.1": b"12345"}, ttl_s=60)
    assert store.bytes_in_use() == 5
    store.close()


def test_who_frees_or_renews_payloads_need_not_be_who_stored_them(open_one):
    gone, successor = open_one(), open_one()
    gone.put({"c.1": b"12345", "c.2": b"123", "c.3": b"", "c.4": b"1"}, ttl_s=0.8)
    assert successor.renew(["c.1", "c.2", "none"], ttl_s=60) == ["none"]
    wait_until(lambda: successor.bytes_in_use() == 8)
    time.sleep(0.2)  # the rest has expired, and is counted no more
    assert successor.get(["c.1", "c.4"]) == [b"12345", None]
    successor.free(["c.1", "c.2", "c.3"])
    assert successor.bytes_in_use() == gone.bytes_in_use() == 0


def test_many_more_payloads_than_one_call_takes_are_renewed_and_freed(open_one):
    gone, successor = open_one(), open_one()
    names = [f"c.{i}" for i in range(2500)]
    gone.put(dict.fromkeys(names, b"12"), ttl_s=60)
    assert successor.bytes_in_use() == 5000
    assert successor.renew(["x.1", *names, "x.2"], ttl_s=60) == ["x.1", "x.2"]
    successor.free(names)
    assert successor.bytes_in_use() == 0
    assert successor.get(names[-1:]) == [None]


def test_bytes_in_use_are_right_whoever_stores_renews_and_frees_at_the_same_time(open_one):
    stores, start = [open_one() for _ in range(4)], threading.Barrier(4)

    def work(store, seed):
        rng = random.Random(seed)
        start.wait()
        for _ in range(150):
            name = f"c.{rng.randrange(6)}"  # of a size of its own, as content is
            call = rng.choice(
                [
                    lambda n=name: store.put({n: b"x" * 10 ** int(n[-1])}, ttl_s=60),
                    lambda n=name: store.free([n]),
                    lambda n=name: store.renew([n], ttl_s=60),
                ]
            )
            call()

    threads = [threading.Thread(target=work, args=(store, seed)) for seed, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"c.{i}" for i in range(6)]
    there = sum(len(data) for data in stores[0].get(names) if data is not None)
    assert stores[0].bytes_in_use() == there
    stores[1].free(names)
    assert stores[0].bytes_in_use() == 0


def test_no_bytes_are_counted_for_ever_when_the_last_payloads_expire_unseen(redis_server, redis_url):
    """Redis drops the ledger with its last entries; the sum must not outlive it."""
    store = RedisStore(redis_url)
    store.put({"c.1": b"12345"}, ttl_s=60)
    store.free(["c.1"])
    store.put({"c.2": b"123"}, ttl_s=0.1)
    time.sleep(0.3)
    with redis_server.client() as client:
        assert client.keys("*ledger") == []
    assert store.bytes_in_use() == 0
    store.put({"c.3": b"1"}, ttl_s=60)
    assert store.bytes_in_use() == 1
    store.close()


@pytest.mark.parametrize("how", ["full", "without replicas"])
def test_a_redis_that_refuses_writes_keeps_count_and_frees_what_it_can(private_redis, how):
    server = private_redis("--maxmemory-policy", "noeviction")
    store = RedisStore(server.url)
    store.put({"c.1": b"x" * 1000, "c.2": b"y" * 100}, ttl_s=60)
    store.put({"c.3": b"z" * 10}, ttl_s=0.3)
    setting, refusing, usual = {
        "full": ("maxmemory", "1", "0"),
        "without replicas": ("min-replicas-to-write", "1", "0"),
    }[how]
    with server.client() as admin:
        admin.config_set(setting, refusing)
        with pytest.raises(LOST):
            store.put({"c.4": b"w" * 10_000}, ttl_s=60)
        time.sleep(0.4)
        if how == "full":
            assert store.renew(["c.1", "c.2"], ttl_s=60) == []
            assert store.bytes_in_use() == 1100
            store.free(["c.1"])
        else:
            for call in (lambda: store.free(["c.1"]), store.bytes_in_use, lambda: store.renew(["c.1"], 60)):
                with pytest.raises(LOST):
                    call()
        admin.config_set(setting, usual)
    store.free(["c.1"])
    assert store.bytes_in_use() == 100
    store.free(["c.2"])
    assert store.bytes_in_use() == 0
    store.close()


def test_a_payload_redis_that_drops_keys_when_it_is_full_is_refused(private_redis):
    server = private_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    store = RedisStore(server.url)
    with pytest.raises(EvictionError, match=r"maxmemory-policy allkeys-lru.*noeviction"):
        store.check()
    store.close()


def test_many_payloads_that_expire_at_once_are_forgotten(redis_url):
    store = RedisStore(redis_url)
    store.put({f"c.{i}": b"x" for i in range(2500)}, ttl_s=0.1)
    wait_until(lambda: store.bytes_in_use() == 0)
    store.close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shm"


def test_expired_files_are_swept_and_live_ones_are_not(folder):
    store = FileStore(folder)
    identity = store.identity()
    store.put({"c.1": b"12345"}, ttl_s=0.05)
    store.put({"c.2": b"123"}, ttl_s=60)
    time.sleep(0.1)
    assert store.sweep() == 1
    assert sorted(p.name for p in folder.iterdir()) == ["c.2.payload", "identity"]
    assert store.identity() == identity


def test_a_full_store_is_swept_by_those_who_wait_for_room(folder):
    FileStore(folder).put({"dead.1": b"12345"}, ttl_s=0.05)
    time.sleep(0.1)
    assert FileStore(folder).bytes_in_use() == 0
    assert list(folder.iterdir()) == []


def test_a_worker_that_only_says_which_store_it_has_sweeps_what_a_killed_trainer_left(folder):
    FileStore(folder).put({"dead.1": b"12345"}, ttl_s=0.05)
    time.sleep(0.1)
    FileStore(folder).identity()
    assert [p.name for p in folder.iterdir()] == ["identity"]


def test_what_others_keep_in_the_folder_is_neither_swept_nor_counted(folder):
    theirs = folder / "torch_1234"
    (folder / "below").mkdir(parents=True)
    theirs.write_bytes(b"theirs")
    os.utime(theirs, (0, 0))
    store = FileStore(folder)
    store.put({"c.1": b"12345"}, ttl_s=60)
    assert store.sweep() == 0
    assert store.bytes_in_use() == 5
    assert theirs.read_bytes() == b"theirs"


def test_a_writer_that_was_stopped_while_its_file_was_swept_writes_it_again(folder, monkeypatch):
    store, rename, lost = FileStore(folder), os.rename, []

    def lose_once(source, target, **folders):
        if not lost:
            lost.append(source)
            os.unlink(source, dir_fd=folders["src_dir_fd"])
        return rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", lose_once)
    store.put({"c.1": b"12345"}, ttl_s=60)
    assert lost
    assert store.get(["c.1"]) == [b"12345"]


def test_what_has_expired_is_not_renewed_since_another_may_be_sweeping_it(folder):
    store = FileStore(folder)
    store.put({"c.1": b"12345"}, ttl_s=0.05)
    time.sleep(0.1)
    assert store.renew(["c.1"], ttl_s=60) == ["c.1"]


def test_a_file_that_is_being_written_is_not_swept(folder, monkeypatch):
    writer, sweeper = FileStore(folder), FileStore(folder)
    rename = os.rename

    def sweep_first(*args, **kwargs):
        time.sleep(0.01)
        sweeper.sweep()
        return rename(*args, **kwargs)

    monkeypatch.setattr(os, "rename", sweep_first)
    writer.put({"c.1": b"12345"}, ttl_s=60)
    sweeper.sweep()
    assert writer.get(["c.1"]) == [b"12345"]


def test_what_a_writer_left_that_died_is_swept_after_a_while(folder):
    store = FileStore(folder)
    half = folder / ".c.1.payload.abcd.payload"
    half.write_bytes(b"12")
    store.sweep()
    assert half.exists()
    an_hour_ago = time.time() - 3600
    os.utime(half, (an_hour_ago, an_hour_ago))
    store.sweep()
    assert not half.exists()


def test_nothing_half_written_is_left_behind(folder):
    store = FileStore(folder)
    store.put({f"c.{i}": b"x" * 1000 for i in range(20)}, ttl_s=60)
    store.identity()
    store.identity()
    assert len(list(folder.iterdir())) == 21


def test_a_folder_that_was_removed_is_made_again(folder):
    store = FileStore(folder)
    store.put({"c.1": b"12345"}, ttl_s=60)
    (folder / "c.1.payload").unlink()
    folder.rmdir()
    assert store.get(["c.1"]) == [None]
    assert store.renew(["c.1"], ttl_s=60) == ["c.1"]
    assert store.bytes_in_use() == 0
    store.put({"c.1": b"12345"}, ttl_s=60)
    assert store.get(["c.1"]) == [b"12345"]
    assert len(store.identity()) == 16


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"REWARDQ_PAYLOAD_URL: cannot make the folder .*/file/below"):
        FileStore(tmp_path / "file" / "below")


@pytest.mark.parametrize("name", ["../outside", "a/b", ".hidden", "", "a\0b", "x" * 300, "a\nb", "\ud800"], ids=repr)
def test_a_name_cannot_leave_the_folder(folder, name):
    store = FileStore(folder)
    with pytest.raises(ValueError, match="not a payload name"):
        store.put({name: b"x"}, ttl_s=60)
    with pytest.raises(ValueError, match="not a payload name"):
        store.get([name])
