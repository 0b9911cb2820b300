"""Files that are written over, and memory that is read into again: faster, and never other bytes than asked for."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading

import numpy as np
import pytest

from tasks.errors import SettingsError
from tasks.media import digest, fits
from tasks.payloads import FileStore
from tasks.payloads import spare_files as module
from tasks.payloads.buffers import LEAST_BYTES, Buffers
from tasks.payloads.spare_files import SpareFiles
from tests.servers import wait_until

SIZE = 200_000


def content(number: int, size: int = SIZE) -> bytes:
    return np.random.default_rng(number).bytes(size)


def inode_of(folder, name: str) -> int:
    return (folder / f"{name}.payload").stat().st_ino


def spares_in(folder) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith(".spare."))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shm"


@pytest.fixture
def store(folder):
    store = FileStore(folder, keeps_spares=True)
    yield store
    store.close()


# --- files ---------------------------------------------------------------------------------------


def test_a_payload_of_the_same_size_lies_in_the_file_of_one_that_was_freed(store, folder):
    store.put({"c.1": content(1)}, 60)
    inode = inode_of(folder, "c.1")
    store.free(["c.1"])
    assert store.get(["c.1"]) == [None]
    assert store.renew(["c.1"], 60) == ["c.1"]
    assert store.bytes_in_use() == 0
    assert store.bytes_by_run() == {}
    assert len(spares_in(folder)) == 1

    store.put({"c.2": content(2, SIZE + 1), "c.3": content(3)}, 60)
    assert store.get(["c.1", "c.2", "c.3"]) == [None, content(2, SIZE + 1), content(3)]
    assert inode_of(folder, "c.3") == inode
    assert spares_in(folder) == []
    assert store.bytes_in_use() == 2 * SIZE + 1


def test_a_payload_in_a_spare_file_expires_and_is_renewed_as_any_other(store, folder):
    for name in ("c.1", "c.2"):
        store.put({name: content(1)}, 60)
    store.free(["c.1", "c.2"])
    store.put({"c.3": content(3), "c.4": content(4)}, ttl_s=1.0)
    assert store.renew(["c.3"], 60) == []
    wait_until(lambda: store.bytes_in_use() == SIZE)
    assert store.get(["c.3", "c.4"]) == [content(3), None]


def test_a_late_reader_of_a_file_that_is_written_over_notices(store, folder):
    store.put({"c.1": content(1)}, 60)
    with (folder / "c.1.payload").open("rb", buffering=0) as late:
        first = late.read(SIZE // 2)
        store.free(["c.1"])
        store.put({"c.2": content(2)}, 60)
        mixed = first + late.read()
    assert mixed[SIZE // 2 :] == content(2)[SIZE // 2 :], "the file was not written over"
    assert not fits(mixed, digest(content(1)))
    assert not fits(mixed, digest(content(2)))


def test_a_reader_beside_a_writer_gets_what_it_asked_for_or_notices(store, folder):
    digests = {f"c.{i}": digest(content(i)) for i in range(12)}
    reader, done, seen = FileStore(folder), threading.Event(), {"right": 0, "gone": 0, "noticed": 0}

    def read():
        while not done.is_set():
            for name, data in zip(digests, reader.get(list(digests)), strict=True):
                if data is None:
                    seen["gone"] += 1
                elif not fits(data, digests[name]):
                    seen["noticed"] += 1
                else:
                    assert bytes(data) == content(int(name[2:]))
                    seen["right"] += 1

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(40):
            names = [name for name in digests if int(name[2:]) % 3 == turn % 3]
            store.put({name: content(int(name[2:])) for name in names}, 60)
            store.free(names)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert seen["right"] > 0


def test_spare_files_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(module, "KEPT_S", 0.2)
    store = FileStore(folder, keeps_spares=True)
    store._spares = SpareFiles(most_bytes=2 * SIZE)
    names = [f"c.{i}" for i in range(5)]
    store.put({name: content(1) for name in names}, 60)
    store.put({"c.small": b"x" * 1000}, 60)
    store.free([*names, "c.small"])
    assert len(spares_in(folder)) == 2
    # They do not wait for ever.
    wait_until(lambda: store.bytes_in_use() == 0 and spares_in(folder) == [])
    store.close()


def test_a_spare_file_that_cannot_be_used_does_not_stay(store, folder):
    store.put({"c.1": content(1)}, 60)
    store.free(["c.1"])
    (folder / "c.2.payload").mkdir()
    with pytest.raises(SettingsError, match="is a folder"):
        store.put({"c.2": content(2)}, 5000)
    assert spares_in(folder) == []


def test_a_store_is_closed_also_where_its_folder_is_refused_by_now(store, folder):
    store.put({"c.1": content(1)}, 60)
    store.free(["c.1"])
    folder.chmod(0o777)
    store.close()
    folder.chmod(0o700)


def test_no_spare_file_is_left_by_a_store_that_is_closed(store, folder):
    store.put({"c.1": content(1)}, 60)
    store.free(["c.1"])
    store.close()
    assert os.listdir(folder) == []


def test_spare_files_of_a_process_that_died_are_swept(store, folder):
    store.put({"c.1": content(1)}, 60)
    store.free(["c.1"])
    (name,) = spares_in(folder)
    other = FileStore(folder)
    other.sweep()
    assert spares_in(folder) == [name]
    long_ago = (folder / name).stat().st_mtime - other.WRITING_S - 1
    os.utime(folder / name, (long_ago, long_ago))
    assert other.sweep() == 1
    # Its owner, if it lives after all, writes a new file.
    store.put({"c.2": content(2)}, 60)
    assert store.get(["c.2"]) == [content(2)]


def test_where_there_is_no_room_spare_files_make_some(store, folder, monkeypatch):
    other = FileStore(folder, keeps_spares=True)
    other.put({"o.1": content(1, 2 * SIZE)}, 60)
    other.free(["o.1"])
    write = store._folder.write

    def write_if_there_is_room(fd, name, data):
        if spares_in(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(fd, name, data)

    monkeypatch.setattr(store._folder, "write", write_if_there_is_room)
    store.put({"c.1": content(1)}, 60)
    assert store.get(["c.1"]) == [content(1)]
    assert spares_in(folder) == []
    other.put({"o.2": content(2, 2 * SIZE)}, 60)
    assert other.get(["o.2"]) == [content(2, 2 * SIZE)]
    other.close()


def test_a_store_without_spare_files_drops_what_is_freed(folder):
    store = FileStore(folder)
    store.put({"c.1": content(1)}, 60)
    store.free(["c.1"])
    assert os.listdir(folder) == []


def test_a_forked_child_does_not_write_over_its_parent_s_files(store, folder):
    store.put({"c.1": content(1)}, 60)
    store.free(["c.1"])
    spares = spares_in(folder)

    def put_and_free():
        store.put({"child.1": content(2)}, 60)
        assert spares_in(folder) == spares
        store.close()
        assert spares_in(folder) == spares

    child = multiprocessing.get_context("fork").Process(target=put_and_free)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    store.put({"c.2": content(3)}, 60)
    assert store.get(["child.1", "c.2"]) == [content(2), content(3)]


def test_a_spare_file_that_is_another_file_now_is_not_written_over(store, folder, tmp_path):
    store.put({"c.1": content(1)}, 60)
    store.free(["c.1"])
    (name,) = spares_in(folder)
    (folder / name).write_bytes(b"shorter")
    store.put({"c.2": content(2)}, 60)
    assert store.get(["c.2"]) == [content(2)]

    store.free(["c.2"])
    (name,) = (one for one in spares_in(folder) if (folder / one).stat().st_size == SIZE)
    outside = tmp_path / "outside"
    outside.write_bytes(content(9))
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    store.put({"c.3": content(3)}, 60)
    assert store.get(["c.3"]) == [content(3)]
    assert outside.read_bytes() == content(9)


# --- memory --------------------------------------------------------------------------------------


def test_memory_is_used_again_once_nobody_refers_to_it():
    buffers = Buffers()
    one = buffers.take(LEAST_BYTES)
    where = id(one)
    other = buffers.take(LEAST_BYTES)
    assert other is not one
    del one
    assert id(buffers.take(LEAST_BYTES)) == where
    assert id(buffers.take(LEAST_BYTES + 1)) != where


@pytest.mark.parametrize("keep", [memoryview, lambda b: np.frombuffer(b, np.uint8)[5:], lambda b: [b]])
def test_memory_that_somebody_keeps_a_view_of_is_not_used_again(keep):
    buffers = Buffers()
    buffer = buffers.take(LEAST_BYTES)
    kept, where = keep(buffer), id(buffer)
    del buffer
    assert id(buffers.take(LEAST_BYTES)) != where
    del kept
    assert where in {id(buffers.take(LEAST_BYTES)) for _ in range(2)}


def test_kept_memory_is_bounded_and_makes_way_for_other_sizes():
    buffers = Buffers(most_bytes=3 * LEAST_BYTES)
    held = [buffers.take(LEAST_BYTES) for _ in range(5)]
    assert len(buffers._kept) == 3
    large = buffers.take(3 * LEAST_BYTES)
    assert len(buffers._kept) == 3, "what is in use stays"
    held.clear()
    del large
    where = id(buffers.take(3 * LEAST_BYTES))
    assert id(buffers.take(3 * LEAST_BYTES)) == where
    assert len(buffers._kept) == 1


def test_memory_beyond_the_bound_is_not_kept_and_drives_nothing_out():
    buffers = Buffers(most_bytes=3 * LEAST_BYTES)
    wheres = {id(buffers.take(LEAST_BYTES)) for _ in range(3)}
    assert len(buffers.take(3 * LEAST_BYTES + 1)) == 3 * LEAST_BYTES + 1
    assert id(buffers.take(LEAST_BYTES)) in wheres
    assert buffers._num_bytes == sum(map(len, buffers._kept)) <= 3 * LEAST_BYTES


def test_threads_never_have_the_same_memory_at_once():
    buffers, wrong = Buffers(), []

    def use(number: int) -> None:
        for turn in range(300):
            buffer = buffers.take(LEAST_BYTES)
            mark = bytes([number]) * 64
            buffer[:64] = mark
            if turn % 10 == 0:
                threading.Event().wait(0.001)
            if buffer[:64] != mark:
                wrong.append(number)
            del buffer

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(buffers._kept) <= 6


def test_what_a_store_has_read_stays_as_it_is_while_it_is_referred_to(store, folder):
    reader = FileStore(folder)
    store.put({f"c.{i}": content(i) for i in range(4)}, 60)
    kept = [np.frombuffer(reader.get([f"c.{i}"])[0], np.uint8) for i in range(4)]
    for i in range(4):
        assert kept[i].tobytes() == content(i)
    address = kept.pop().ctypes.data
    again = np.frombuffer(reader.get(["c.0"])[0], np.uint8)
    assert again.ctypes.data == address
    assert again.tobytes() == content(0)
