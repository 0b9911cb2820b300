"""A folder whose files no other user can read, replace, or lead elsewhere by a link.

Each call opens the folder anew, looks who owns it and who may write to it, and works on what it has opened. So a folder
that was replaced meanwhile is noticed, and a name never leads out of the folder.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.errors import SettingsError

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""A symbolic link is refused. A FIFO does not wait for its writer."""

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW

_WRITE_OVER = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Folder:
    """A folder of one user, or of a group of users who trust each other.

    Args:
        path: Where it is. It is made if it is not there.
        group: Number of the group that shares it; None if this user alone uses it.
    """

    def __init__(self, path: Path, group: int | None) -> None:
        self.path, self._group = path, group
        self._folder_mode, self._file_mode = 0o700, 0o600
        if group is not None:
            self._folder_mode, self._file_mode = 0o2770, 0o660

    def make(self) -> None:
        """Make the folder unless something is there. Raises `SettingsError` if that cannot be done."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(self.path):
                self._make()
        except OSError as error:
            raise SettingsError(
                f"REWARDQ_PAYLOAD_URL: cannot make the folder {self.path}: {error.strerror}"
            ) from None

    def _make(self) -> None:
        """Made beside and renamed: another process never finds it with a group or a mode that it refuses."""
        beside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        beside.mkdir(self._folder_mode)
        try:
            if self._group is not None:
                os.chown(beside, -1, self._group)
            beside.chmod(self._folder_mode)
            beside.rename(self.path)
        except OSError:
            beside.rmdir()
            if not self.path.is_dir():  # else another process was first
                raise

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """The folder's file descriptor.

        Raises:
            FileNotFoundError: It was removed.
            SettingsError: It is a link or no folder, another user owns it, or others may write to it.
        """
        try:
            fd = os.open(self.path, _READ | os.O_DIRECTORY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._refusal(self._why_not_opened(error)) from None
        try:
            self._check(os.fstat(fd))
            yield fd
        finally:
            os.close(fd)

    def _check(self, found: os.stat_result) -> None:
        is_ours = found.st_uid == os.geteuid()
        if self._group is not None:
            # Only a member of a group can give a folder to it.
            if found.st_gid != self._group:
                raise self._refusal(
                    f"it is of group {_group_name(found.st_gid)}, and REWARDQ_PAYLOAD_GROUP is "
                    f"{_group_name(self._group)}"
                )
        elif not is_ours:
            raise self._refusal(
                f"it belongs to {_user_name(found.st_uid)}, and this process is {_user_name(os.geteuid())}; if both "
                "use it, name a group of both in REWARDQ_PAYLOAD_GROUP, and let the folder be made anew"
            )
        foreign = stat.S_IWOTH if self._group is not None else 0o022
        if found.st_mode & foreign:
            raise self._refusal(
                f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o}); name a folder of its own, which is "
                f"made with mode {self._folder_mode:04o}"
            )

    def is_ours(self, found: os.stat_result) -> bool:
        """Whether a file is a regular file of those who use the folder."""
        if not stat.S_ISREG(found.st_mode):
            return False
        is_shared = self._group is not None and found.st_gid == self._group
        return is_shared or found.st_uid == os.geteuid()

    def read(
        self,
        fd: int,
        name: str,
        most_bytes: int | None = None,
        memory: Callable[[int], bytearray] = bytearray,
    ) -> bytearray | None:
        """The bytes of a file; None if there is none.

        Args:
            fd: Of the folder, opened.
            most_bytes: A larger file is refused; any size is taken unless given.
            memory: Gives a buffer of a number of bytes, which the file is read into.

        Raises:
            SettingsError: What has this name is no regular file of ours, or is too large.
        """
        try:
            file_fd = os.open(name, _READ, dir_fd=fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.file_refusal(fd, name, error) from None
        try:
            found = os.fstat(file_fd)
            self._check_file(fd, name, found, most_bytes)
            buffer = memory(found.st_size)
            num_read = _read_into(file_fd, buffer)
            # Somebody who cut it meanwhile has written no whole payload.
            return buffer if num_read == len(buffer) else buffer[:num_read]
        finally:
            os.close(file_fd)

    def _check_file(
        self, fd: int, name: str, found: os.stat_result, most_bytes: int | None
    ) -> None:
        if not self.is_ours(found):
            raise self.file_refusal(fd, name)
        bounds = [capacity_of(fd)]
        if most_bytes is not None:
            bounds.append(most_bytes)
        if found.st_size > min(bounds):
            raise self._refusal(
                f"its {name!r} says that it has {found.st_size} bytes, more than the {min(bounds)} that there can be; "
                "remove it"
            )

    def write(self, fd: int, name: str, data: Any) -> None:
        """Write a new file. Raises `FileExistsError`."""
        file_fd = os.open(name, _WRITE, self._file_mode, dir_fd=fd)
        with open(file_fd, "wb") as file:
            if self._group is not None:
                os.fchown(file_fd, -1, self._group)
            os.fchmod(file_fd, self._file_mode)
            file.write(data)

    def write_over(self, fd: int, name: str, data: Any) -> None:
        """Write over a file that has as many bytes. Raises `FileNotFoundError` if it has not, or is not ours."""
        file_fd = os.open(name, _WRITE_OVER, dir_fd=fd)
        try:
            found = os.fstat(file_fd)
            if found.st_size != len(data) or not self.is_ours(found):
                raise FileNotFoundError(f"{name} is another file now")
            _write_all(file_fd, data)
        finally:
            os.close(file_fd)

    def stat(self, fd: int, name: str) -> os.stat_result | None:
        """What is known of a file or of a link itself; None if there is none."""
        try:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def file_refusal(
        self, fd: int, name: str, error: OSError | None = None
    ) -> SettingsError:
        """Why what has this name cannot be used: what it is, and whose."""
        found = self.stat(fd, name)
        if found is not None and not self.is_ours(found):
            what = f"{_kind(found.st_mode)} of {_user_name(found.st_uid)}"
        else:
            what = f"not readable: {error.strerror if error is not None else 'gone'}"
        return self._refusal(
            f"its {name!r} is {what}, where a file of {self._owners} should be; remove it"
        )

    @property
    def _owners(self) -> str:
        if self._group is not None:
            return f"group {_group_name(self._group)}"
        return _user_name(os.geteuid())

    def _why_not_opened(self, error: OSError) -> str:
        if self.path.is_symlink():
            return "it is a symbolic link; name the folder that it leads to, if you trust it"
        if not self.path.is_dir():
            return "it is no folder"
        return f"it cannot be opened: {error.strerror}"

    def _refusal(self, why: str) -> SettingsError:
        return SettingsError(
            f"REWARDQ_PAYLOAD_URL: the payload folder {self.path} is refused: {why}"
        )


def _read_into(file_fd: int, buffer: bytearray) -> int:
    """Fill a buffer; returns how many bytes there were for it."""
    num_read = 0
    with memoryview(buffer) as view:
        while num_read < len(buffer):
            num = os.readv(file_fd, [view[num_read:]])
            if num == 0:
                break
            num_read += num
    return num_read


def _write_all(file_fd: int, data: Any) -> None:
    with memoryview(data) as view:
        num_written = 0
        while num_written < len(view):
            num_written += os.write(file_fd, view[num_written:])


def capacity_of(fd: int) -> int:
    """Bytes that the file system of an opened folder or file can hold in all; very many if it does not say."""
    found = os.fstatvfs(fd)
    return found.f_blocks * found.f_frsize or 2**63


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a file",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def _user_name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:  # in a container
        return f"user {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"{gid}"
