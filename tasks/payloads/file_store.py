"""Payloads as files in memory, for workers on the trainer's host."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.errors import RedisUnreachableError, SettingsError
from tasks.media.arrays import flat
from tasks.payloads.buffers import Buffers
from tasks.payloads.folder import Folder, capacity_of
from tasks.payloads.names import MAX_REQUEST_BYTES, run_of
from tasks.payloads.spare_files import SpareFiles
from tasks.payloads.store import Data

_NAME = re.compile(r"[\w~-][\w.~-]{0,199}", re.ASCII)

_IDENTITY = re.compile(rb"[0-9a-f]{16}")


class FileStore:
    """Payloads as files below a folder in memory (`/dev/shm`), for workers on the trainer's host.

    A file's time of modification is when it expires. Expired files are swept when somebody asks how many bytes are in
    use, and at most every 10 s when somebody puts payloads or asks for the identity, as each worker's heartbeat does.
    Files of other names are not touched: other programs may use the folder too.

    Payloads are read into memory that was read into before (`Buffers`).

    Args:
        folder: Where the files are. Each call but the constructor refuses a folder to which others may write, and one
            that another user owns, by a `SettingsError`.
        group: Number of the group of users that share the store; None for this user alone.
        keeps_spares: Whether files that are freed wait a while for a payload of the same size, which is written over
            one. A reader that has opened it before reads something else then, or a mixture: whoever fetches compares
            the checksum of what was read.
    """

    SWEEP_EVERY_S = 10.0
    WRITING_S = 60.0
    """A file that is being written is not swept for so long."""
    IDENTITY = "identity"
    SUFFIX = ".payload"
    """Of all files that are swept and counted; those that are being written begin with a dot."""
    SPARE = ".spare."
    """How files begin that are kept to be written over. They are swept as those that are being written, not counted."""

    def __init__(
        self, folder: Path, group: int | None = None, *, keeps_spares: bool = False
    ) -> None:
        self._folder = Folder(folder, group)
        self._folder.make()
        self._swept_at = 0.0
        self._buffers = Buffers()
        self._spares = SpareFiles() if keeps_spares else SpareFiles(most_bytes=0)

    def identity(self) -> str:
        self._sweep_now_and_then()
        known = self._read_identity()
        if known is None:
            with contextlib.suppress(FileExistsError):
                new = secrets.token_hex(8).encode()
                self._write(self.IDENTITY, new, only_new=True)
            known = self._read_identity()
        if known is None or not _IDENTITY.fullmatch(known):
            raise SettingsError(
                f"REWARDQ_PAYLOAD_URL: the file {self._folder.path / self.IDENTITY} is no identity of a payload store; "
                "remove it"
            )
        return known.decode()

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        self._sweep_now_and_then()
        expires_at = time.time() + ttl_s
        for name, data in payloads.items():
            self._put(self._file(name), flat(data), expires_at)

    def _put(self, file: str, data: Any, expires_at: float) -> None:
        if self._write_over_a_spare(file, data, expires_at):
            return
        try:
            self._write(file, data, expires_at)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._drop_all_spares():
                raise
            self._write(file, data, expires_at)

    def get(self, names: Sequence[str]) -> list[Data | None]:
        with self._opened() as fd:
            found: list[Data | None] = []
            for name in names:
                file = self._file(name)
                data = None
                if fd is not None:
                    data = self._folder.read(fd, file, memory=self._buffers.take)
                found.append(data)
            return found

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        now = time.time()
        gone: list[str] = []
        with self._opened() as fd:
            for name in names:
                file = self._file(name)
                if fd is None or not self._renew(fd, file, now, now + ttl_s):
                    gone.append(name)
        return gone

    def free(self, names: Sequence[str]) -> None:
        with self._opened() as fd:
            for name in names:
                file = self._file(name)
                if fd is not None and not self._keep_as_spare(fd, file):
                    self._drop(fd, file)
            if fd is not None:
                self._drop_spares(fd, self._spares.take_expired())

    def bytes_in_use(self) -> int:
        self.sweep()
        with self._opened() as fd:
            payloads = () if fd is None else self._payloads(fd)
            return sum(one.st_size for _, one in payloads)

    def sweep(self) -> int:
        """Drop the files that have expired; returns how many."""
        now, num_dropped = time.time(), 0
        with self._opened() as fd:
            if fd is None:
                return 0
            self._drop_spares(fd, self._spares.take_expired())
            for name, found in self._files(fd):
                is_being_written = name.startswith(".")
                grace_s = self.WRITING_S if is_being_written else 0.0
                if found.st_mtime + grace_s < now:
                    num_dropped += self._drop(fd, name)
        return num_dropped

    def bytes_by_run(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        with self._opened() as fd:
            for name, one in () if fd is None else self._payloads(fd):
                found[run_of(name.removeprefix("."))] += one.st_size
        return dict(found)

    def value_bytes(self) -> int:
        return MAX_REQUEST_BYTES  # media are one file, whatever their size

    def capacity_bytes(self) -> int | None:
        with self._opened() as fd:
            return None if fd is None else capacity_of(fd)

    def check(self) -> None:
        with self._opened():
            if not os.access(self._folder.path, os.W_OK | os.X_OK):
                raise RedisUnreachableError(
                    f"the payload folder {self._folder.path} cannot be written to by this user"
                )

    def close(self) -> None:
        """Nothing is held open; spare files are dropped."""
        spares = self._spares.take_expired(and_all=True)
        if not spares:
            return
        # A folder that is refused by now is somebody else's matter: its files are swept when they have expired.
        with contextlib.suppress(SettingsError, OSError), self._opened() as fd:
            if fd is not None:
                self._drop_spares(fd, spares)

    # --- files that are written over ---------------------------------------------------------------------------------

    def _write_over_a_spare(self, file: str, data: Any, expires_at: float) -> bool:
        """Whether a payload was written over a spare file, which has its name then."""
        spare = self._spares.take(len(data))
        if spare is None:
            return False
        with self._opened() as fd:
            if fd is None:
                return False
            try:
                self._folder.write_over(fd, spare, data)
                os.utime(spare, (expires_at, expires_at), dir_fd=fd)
                os.rename(spare, file, src_dir_fd=fd, dst_dir_fd=fd)
            except IsADirectoryError:
                self._drop(fd, spare)
                raise self._folder.file_refusal(fd, file) from None
            except OSError:
                # It was swept, since we were stopped for long, or its room was needed; or it is no file of ours now.
                self._drop(fd, spare)
                return False
        return True

    def _keep_as_spare(self, fd: int, file: str) -> bool:
        """Whether a payload's file is a spare one now; what is no file of ours is not."""
        found = self._folder.stat(fd, file)
        if found is None or not self._folder.is_ours(found):
            return False
        if not self._spares.wants(found.st_size):
            return False
        name = f"{self.SPARE}{secrets.token_hex(8)}{self.SUFFIX}"
        try:
            os.rename(file, name, src_dir_fd=fd, dst_dir_fd=fd)
            os.utime(name, dir_fd=fd)
        except (FileNotFoundError, PermissionError):
            return False
        self._spares.keep(name, found.st_size)
        return True

    def _drop_spares(self, fd: int, names: Sequence[str]) -> None:
        for name in names:
            self._drop(fd, name)

    def _drop_all_spares(self) -> bool:
        """Give the room of everybody's spare files back; whether there were any."""
        num_dropped = 0
        with self._opened() as fd:
            for name, _ in () if fd is None else self._files(fd):
                if name.startswith(self.SPARE) and fd is not None:
                    num_dropped += self._drop(fd, name)
        return num_dropped > 0

    # -----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        """The folder, opened and checked; None where it was removed by hand: the next `put` makes it again."""
        with contextlib.ExitStack() as stack:
            try:
                fd: int | None = stack.enter_context(self._folder.opened())
            except FileNotFoundError:
                fd = None
            yield fd

    def _file(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"not a payload name: {name!r}")
        return f"{name}{self.SUFFIX}"

    def _files(self, fd: int) -> Iterator[tuple[str, os.stat_result]]:
        """Our payloads, those that are being written, and spare files. A file that claims more than there can be is
        none of ours."""
        most_bytes = capacity_of(fd)
        for name in os.listdir(fd):
            if not name.endswith(self.SUFFIX):
                continue
            found = self._folder.stat(fd, name)
            if found is None or not self._folder.is_ours(found):
                continue
            if found.st_size <= most_bytes:
                yield name, found

    def _payloads(self, fd: int) -> Iterator[tuple[str, os.stat_result]]:
        """Our payloads, and those that are being written."""
        for name, found in self._files(fd):
            if not name.startswith(self.SPARE):
                yield name, found

    def _sweep_now_and_then(self) -> None:
        if time.monotonic() - self._swept_at > self.SWEEP_EVERY_S:
            self._swept_at = time.monotonic()
            self.sweep()

    @staticmethod
    def _drop(fd: int, file: str) -> bool:
        """Whether a file was dropped; a folder of its name is left alone."""
        try:
            os.unlink(file, dir_fd=fd)
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            return False
        return True

    def _renew(self, fd: int, file: str, now: float, expires_at: float) -> bool:
        """Whether a file of ours was there. An expired file counts as gone: somebody may be about to sweep it."""
        found = self._folder.stat(fd, file)
        if found is None or not self._folder.is_ours(found) or found.st_mtime <= now:
            return False
        try:
            os.utime(file, (expires_at, expires_at), dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except PermissionError:
            # Of another user of the group: the file lives for as long as that user says.
            return True
        return True

    def _read_identity(self) -> bytes | None:
        with self._opened() as fd:
            if fd is None:
                return None
            found = self._folder.read(fd, self.IDENTITY, most_bytes=64)
            return None if found is None else bytes(found)

    def _write(
        self,
        file: str,
        data: Any,
        expires_at: float | None = None,
        only_new: bool = False,
    ) -> None:
        try:
            self._write_beside(file, data, expires_at, only_new)
        except FileNotFoundError:  # the folder was removed by hand, or we were stopped for long, and our file swept
            self._folder.make()
            self._write_beside(file, data, expires_at, only_new)

    def _write_beside(
        self, file: str, data: Any, expires_at: float | None, only_new: bool
    ) -> None:
        """Write beside, then rename, so that a reader sees all or nothing."""
        beside = f".{file}.{secrets.token_hex(4)}{self.SUFFIX}"
        with self._folder.opened() as fd:
            try:
                self._folder.write(fd, beside, data)
                if expires_at is not None:
                    os.utime(beside, (expires_at, expires_at), dir_fd=fd)
                if only_new:
                    os.link(beside, file, src_dir_fd=fd, dst_dir_fd=fd)
                else:
                    os.rename(beside, file, src_dir_fd=fd, dst_dir_fd=fd)
            except IsADirectoryError:
                raise self._folder.file_refusal(fd, file) from None
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside, dir_fd=fd)
