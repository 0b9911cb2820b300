"""The folder of a file:// store: whom it lets in, and what it takes for a payload."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from tasks.errors import SettingsError
from tasks.payloads import FileStore, open_store
from tasks.settings import load_settings

NOBODY, SOMEBODY = 65534, 65533
"""Users who are not root."""

GROUP = 54321

only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")


@pytest.fixture
def folder(tmp_path):
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)  # the other users of these tests may walk through
    return tmp_path / "shm"


@pytest.fixture(autouse=True)
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def made(folder, mode=0o700, owner=None):
    folder.mkdir()
    folder.chmod(mode)
    if owner is not None:
        os.chown(folder, owner, owner)
    return folder


def mode_of(path):
    return stat.S_IMODE(path.lstat().st_mode)


def as_user(uid, do, gid=None):
    """What `do` gives, or raises, in a child process of another user."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(gid or uid)
            os.setuid(uid)
            said = repr(do())
        except BaseException as error:  # told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def within(seconds, do):
    """What `do` gives; a call that hangs fails the test and not the whole run."""
    box = []

    def run():
        try:
            box.append((do(), None))
        except Exception as error:  # raised again below
            box.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert box, "it hangs"
    found, error = box[0]
    if error is not None:
        raise error
    return found


def every_use(folder):
    """Each call of a store, by name."""
    store = FileStore(folder)
    return {
        "check": store.check,
        "identity": store.identity,
        "put": lambda: store.put({"mine": b"1"}, 60),
        "get": lambda: store.get(["mine"]),
        "renew": lambda: store.renew(["mine"], 60),
        "free": lambda: store.free(["mine"]),
        "bytes_in_use": store.bytes_in_use,
    }


USES = ["check", "identity", "put", "get", "renew", "free", "bytes_in_use"]


def test_the_folder_and_its_files_are_for_one_user_whatever_the_umask(folder):
    for umask in (0o000, 0o022, 0o077):
        os.umask(umask)
        own = folder / f"{umask}" / "store"
        store = FileStore(own)
        store.put({"c.1": b"a prompt"}, 60)
        store.identity()
        assert {path.name: oct(mode_of(path)) for path in [own, *own.iterdir()]} == {
            "store": "0o700",
            "c.1.payload": "0o600",
            "identity": "0o600",
        }


@only_root
def test_another_user_reads_neither_a_payload_nor_which_there_are(folder):
    FileStore(folder).put({"c.1": b"a prompt"}, 60)
    assert "PermissionError" in as_user(NOBODY, (folder / "c.1.payload").read_bytes)
    assert "PermissionError" in as_user(NOBODY, lambda: os.listdir(folder))
    said = as_user(NOBODY, lambda: FileStore(folder).get(["c.1"]))
    assert said.startswith("SettingsError: REWARDQ_PAYLOAD_URL: the payload folder")


@only_root
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777])
def test_a_folder_of_another_user_is_refused(folder, use, mode):
    made(folder, mode, owner=NOBODY)
    with pytest.raises(SettingsError, match=r"belongs to user .*, and this process is user .*REWARDQ_PAYLOAD_GROUP"):
        every_use(folder)[use]()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(folder, use, mode):
    made(folder, mode)
    with pytest.raises(SettingsError, match=rf"others may write to it \(mode {mode:04o}\); name a folder of its own"):
        every_use(folder)[use]()
    assert list(folder.iterdir()) == []


def test_a_folder_that_others_may_only_look_into_is_used(folder):
    """An earlier version made such folders; the files in it are closed."""
    store = FileStore(made(folder, 0o755))
    store.put({"c.1": b"1"}, 60)
    assert mode_of(folder / "c.1.payload") == 0o600
    assert store.get(["c.1"]) == [b"1"]


@pytest.mark.parametrize("use", USES)
def test_a_link_is_not_followed_to_a_folder(folder, use):
    folder.symlink_to(made(folder.with_name("elsewhere")))
    with pytest.raises(SettingsError, match="it is a symbolic link; name the folder that it leads to"):
        every_use(folder)[use]()
    assert list(folder.with_name("elsewhere").iterdir()) == []


@pytest.mark.parametrize("use", USES)
def test_a_file_in_place_of_the_folder_is_refused(folder, use):
    folder.write_text("")
    with pytest.raises(SettingsError, match="it is no folder"):
        every_use(folder)[use]()


def test_a_folder_that_is_opened_to_others_while_it_is_used_is_refused_from_then_on(folder):
    store = FileStore(folder)
    store.put({"c.1": b"1"}, 60)
    folder.chmod(0o777)
    with pytest.raises(SettingsError, match="others may write to it"):
        store.get(["c.1"])


def test_a_process_ends_at_its_start_if_its_folder_is_refused(folder):
    made(folder, 0o777)
    with pytest.raises(SettingsError, match="others may write to it"):
        open_store(load_settings(payload_url=f"file://{folder}"))


# --- what is in the folder ------------------------------------------------------------------------


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is short
        server.bind(path.name)
        os.chdir(here)


def secret_link(path):
    secret = path.with_name("secret")
    secret.write_text("a secret")
    path.symlink_to(secret)


ODD = {
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a symbolic link": secret_link,
    "a socket": bound_socket,
}


def sparse(path):
    """A file that claims more bytes than its file system has; returns how many."""
    path.touch()
    found = os.statvfs(path)
    num_bytes = found.f_blocks * found.f_frsize + 2**30
    os.truncate(path, num_bytes)
    os.utime(path, (2e9, 2e9))
    return num_bytes


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_no_payload_and_nobody_hangs(folder, kind):
    ODD[kind](made(folder) / "x.payload")
    store = FileStore(folder)
    with pytest.raises(SettingsError, match=f"its 'x.payload' is {kind} of user .*; remove it"):
        within(5, lambda: store.get(["x"]))
    assert within(5, lambda: store.renew(["x"], 60)) == ["x"]
    assert within(5, store.bytes_in_use) == 0
    assert within(5, store.sweep) == 0
    if kind == "a folder":
        with pytest.raises(SettingsError, match=r"its 'x.payload' is a folder of user .*; remove it"):
            store.put({"x": b"1"}, 60)
        assert os.listdir(folder) == ["x.payload"]
    else:
        store.put({"x": b"1"}, 60)  # replaces it, and writes through no link
        assert store.get(["x"]) == [b"1"]
        assert not (folder / "secret").exists() or (folder / "secret").read_text() == "a secret"


@pytest.mark.parametrize("kind", [*ODD, "a folder with something in it"])
def test_an_identity_that_is_no_file_is_refused_and_nobody_hangs(folder, kind):
    path = made(folder) / "identity"
    ODD.get(kind, lambda path: (path / "below").mkdir(parents=True))(path)
    with pytest.raises(SettingsError, match=r"its 'identity' is a .* of user .*; remove it"):
        within(5, FileStore(folder).identity)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"x" * 10**7, b"a\nb", b"0123456789abcdef\n"],
    ids=["empty", "bytes", "10 MB", "lines", "more"],
)
def test_an_identity_that_was_written_by_somebody_else_is_refused(folder, content):
    (made(folder) / "identity").write_bytes(content)
    with pytest.raises(SettingsError, match="identity"):
        within(5, FileStore(folder).identity)


def test_a_sparse_file_is_neither_counted_nor_read(folder):
    store = FileStore(folder)
    store.put({"c.1": b"123"}, 60)
    num_bytes = sparse(folder / "x.payload")
    assert store.bytes_in_use() == 3
    with pytest.raises(SettingsError, match=f"says that it has {num_bytes} bytes"):
        within(5, lambda: store.get(["x"]))


def test_names_that_are_no_text_are_passed_over(folder):
    store = FileStore(folder)
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.payload"))).touch()
    store.put({"c.1": b"123"}, 60)
    assert store.bytes_in_use() == 3


@only_root
def test_files_of_another_user_in_our_folder_are_neither_counted_nor_swept_nor_read(folder):
    store = FileStore(folder)
    store.put({"c.1": b"123"}, 60)
    theirs = folder / "theirs.payload"
    theirs.write_bytes(b"forged")
    os.utime(theirs, (0, 0))
    os.chown(theirs, NOBODY, NOBODY)
    assert store.bytes_in_use() == 3
    assert store.sweep() == 0
    assert store.renew(["theirs"], 60) == ["theirs"]
    with pytest.raises(SettingsError, match=r"its 'theirs\.payload' is a file of user"):
        store.get(["theirs"])
    assert theirs.exists()


# --- a group of users -----------------------------------------------------------------------------


@only_root
def test_users_of_a_group_share_a_folder_that_others_cannot_see(folder):
    os.umask(0o077)
    mine = FileStore(folder, GROUP)
    mine.put({"live.1": b"123", "other.1": b"1"}, 60)
    identity = mine.identity()
    assert mode_of(folder) == 0o2770
    assert {mode_of(path) for path in folder.iterdir()} == {0o660}
    assert {path.stat().st_gid for path in [folder, *folder.iterdir()]} == {GROUP}

    def use():
        store = FileStore(folder, GROUP)
        store.put({"theirs.1": b"12345"}, 60)
        store.free(["other.1"])
        live, other = store.get(["live.1", "other.1"])
        found = [bytes(live), other], store.renew(["live.1", "other.1"], 60)
        return store.identity(), *found, store.bytes_in_use()

    assert as_user(NOBODY, use, GROUP) == repr((identity, [b"123", None], ["other.1"], 8))
    assert mine.get(["theirs.1"]) == [b"12345"]
    assert mine.bytes_in_use() == 8
    assert "SettingsError" in as_user(SOMEBODY, lambda: FileStore(folder, GROUP).get(["live.1"]))


@only_root
def test_a_folder_of_another_group_is_refused(folder):
    FileStore(folder, GROUP + 1)
    with pytest.raises(SettingsError, match=f"it is of group {GROUP + 1}, and REWARDQ_PAYLOAD_GROUP is {GROUP}"):
        FileStore(folder, GROUP).check()
    folder.chmod(0o2777)
    with pytest.raises(SettingsError, match="others may write to it"):
        FileStore(folder, GROUP + 1).check()


@only_root
def test_who_is_not_in_the_group_cannot_make_its_folder(folder):
    above = made(folder, owner=NOBODY)
    said = as_user(NOBODY, lambda: FileStore(above / "store", GROUP))
    assert said.startswith("SettingsError: REWARDQ_PAYLOAD_URL: cannot make the folder")
    assert list(above.iterdir()) == []


def test_a_group_is_named_or_numbered():
    assert load_settings().payload_gid is None
    assert load_settings(payload_group="54321").payload_gid == 54321
    assert load_settings(payload_group="root").payload_gid == 0
    with pytest.raises(SettingsError, match=r"REWARDQ_PAYLOAD_GROUP: 'nobody-has-this' is no group of this host"):
        load_settings(payload_group="nobody-has-this")
