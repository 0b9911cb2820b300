"""Payload stores: media and requests by key, with a time to live. Redis, or files in memory shared on one host.

A key is `<client id>.<digest or request id>`: content is stored once within one client process, and no client frees
what another needs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import unquote, urlsplit

from tasks import keys
from tasks.errors import RedisUnreachableError, SettingsError
from tasks.servers.connections import (
    DEFAULT_SENTINELS,
    check_eviction,
    check_reachable,
    connect_for_media,
)
from tasks.settings import Sentinels, Settings

NAMES_A_CALL = 1000
"""Payloads renewed or dropped in one call of a script; more go in several, so that Redis serves others between them."""


class PayloadStore(Protocol):
    """Where payloads are. Safe between threads."""

    def identity(self) -> str:
        """The same text for every process that reaches the same store, and for no other store."""

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        """Store bytes-like payloads; each lives `ttl_s` from now. Storing the same key again is harmless."""

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """The payloads in order, None where there is none."""

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        """Let payloads live `ttl_s` from now; returns the names that are gone."""

    def free(self, names: Sequence[str]) -> None:
        """Drop payloads. A payload that is gone already is no error."""

    def bytes_in_use(self) -> int:
        """Payload bytes of all clients."""

    def check(self) -> None:
        """Raise unless the store can be reached and written to."""

    def close(self) -> None:
        """Give back connections."""


def open_store(settings: Settings) -> PayloadStore:
    """The store at `settings.payloads`."""
    parts = urlsplit(settings.payloads)
    if parts.scheme == "file":
        return FileStore(Path(unquote(parts.path)))
    return RedisStore(settings.payloads, settings.sentinels)


_LEDGER = """
local ledger, sum, ttl_ms = KEYS[1], KEYS[2], tonumber(ARGV[1])
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local function forget(member)
  if redis.call('ZREM', ledger, member) == 1 then redis.call('DECRBY', sum, string.match(member, '^(%d+)|')) end
end
local gone = {}
for i = 3, #KEYS do
  local member = redis.call('STRLEN', KEYS[i]) .. '|' .. KEYS[i]
  if ttl_ms == 0 then
    redis.call('UNLINK', KEYS[i])
    forget(member)
  elseif redis.call('PEXPIRE', KEYS[i], ttl_ms) == 0 then
    gone[#gone + 1] = i - 3
  elseif redis.call('ZADD', ledger, now_ms + ttl_ms, member) == 1 then
    redis.call('INCRBY', sum, string.match(member, '^(%d+)|'))
  end
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', ledger, '-inf', now_ms, 'LIMIT', 0, 1000)) do forget(member) end
if redis.call('EXISTS', ledger) < redis.call('EXISTS', sum) then redis.call('DEL', sum) end
if ttl_ms > 0 then
  for i = 1, 2 do
    if redis.call('PTTL', KEYS[i]) < ttl_ms then redis.call('PEXPIRE', KEYS[i], ttl_ms) end
  end
end
return {tonumber(redis.call('GET', sum) or '0'), gone}
"""
"""KEYS: ledger, sum, then payloads, which live `ARGV[1]` ms from now and are counted so long; 0 drops them. Returns the
sum, and the indices of the payloads that are gone.

The script asks for the sizes itself: whoever renews or drops a payload need not have stored it. A server that is full
refuses writes that need room, but none once a script has begun to write: no such write comes first here, so that the
sum stays the ledger's."""


class RedisStore:
    """Payloads as Redis strings with an expiry, counted in a ledger that forgets what expired."""

    def __init__(self, url: str, sentinels: Sentinels = DEFAULT_SENTINELS) -> None:
        self._url = url
        self._redis = connect_for_media(url, sentinels)

    def identity(self) -> str:
        known = cast(bytes | None, self._redis.get(keys.STORE_IDENTITY))
        if known is None:  # read first: a server that is full refuses each write
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.set(keys.STORE_IDENTITY, secrets.token_hex(8), nx=True)
                pipe.get(keys.STORE_IDENTITY)
                known = pipe.execute()[1]
        return known.decode()

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        ttl_ms = round(1000 * ttl_s)
        with self._redis.pipeline(transaction=False) as pipe:
            for name, data in payloads.items():
                pipe.set(keys.payload(name), _flat(data), px=ttl_ms)
            for batch in _in_batches(list(payloads)):
                self._count(pipe, batch, ttl_ms)
            pipe.execute()

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        if not names:
            return []
        # A pipeline and no MGET, whose one reply the server would put together in memory.
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.get(keys.payload(name))
            return cast(list[bytes | None], pipe.execute())

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        ttl_ms = round(1000 * ttl_s)
        gone: list[str] = []
        for batch in _in_batches(names):
            _, indices = self._count(self._redis, batch, ttl_ms)
            gone += [batch[i] for i in indices]
        return gone

    def free(self, names: Sequence[str]) -> None:
        for batch in _in_batches(names):
            self._count(self._redis, batch, 0)

    def bytes_in_use(self) -> int:
        return int(self._count(self._redis, (), 0)[0])

    def check(self) -> None:
        check_reachable(self._redis, self._url, "Redis for payloads")
        check_eviction(self._redis, self._url)

    def close(self) -> None:
        self._redis.close()

    @staticmethod
    def _count(client: Any, names: Sequence[str], ttl_ms: int) -> Any:
        """Let payloads live on and be counted; 0 drops them. Returns the script's answer, or a pipeline to execute."""
        own = [keys.PAYLOAD_LEDGER, keys.PAYLOAD_BYTES, *map(keys.payload, names)]
        # The script itself and not its hash, which redis-py would ask for before each pipeline.
        return client.eval(_LEDGER, len(own), *own, ttl_ms)


def _in_batches(names: Sequence[str]) -> Iterable[Sequence[str]]:
    """The names in batches of `NAMES_A_CALL`."""
    return (
        names[start : start + NAMES_A_CALL]
        for start in range(0, len(names), NAMES_A_CALL)
    )


def _flat(data: Any) -> Any:
    """Bytes-like data as plain bytes in a row; redis-py takes neither arrays nor views of another shape."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else b""


class FileStore:
    """Payloads as files below a folder in memory (`/dev/shm`), for workers on the trainer's host.

    A file's time of modification is when it expires. Expired files are swept when somebody asks how many bytes are in
    use, and at most every 10 s when somebody puts payloads or asks for the identity, as each worker's heartbeat does.
    Files of other names are not touched: others may use the folder too.
    """

    SWEEP_EVERY_S = 10.0
    WRITING_S = 60.0
    """A file that is being written is not swept for so long."""
    IDENTITY = "identity"
    SUFFIX = ".payload"
    """Of all files that are swept and counted; those that are being written begin with a dot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._swept_at = 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"REWARDQ_PAYLOAD_URL: cannot make the folder {folder}: {error.strerror}"
            ) from None

    def identity(self) -> str:
        self._sweep_now_and_then()
        path = self._folder / self.IDENTITY
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                self._write(path, secrets.token_hex(8).encode(), only_new=True)
        return path.read_text()

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        self._sweep_now_and_then()
        expires_at = time.time() + ttl_s
        for name, data in payloads.items():
            self._write(self._path(name), data, expires_at)

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        return [self._read(self._path(name)) for name in names]

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        now = time.time()
        gone: list[str] = []
        for name in names:
            if not self._renew(self._path(name), now, now + ttl_s):
                gone.append(name)
        return gone

    def free(self, names: Sequence[str]) -> None:
        for name in names:
            self._drop(self._path(name))

    def bytes_in_use(self) -> int:
        self.sweep()
        return sum(stat.st_size for _, stat in self._files())

    def sweep(self) -> int:
        """Drop the files that have expired; returns how many."""
        now, num_dropped = time.time(), 0
        for path, stat in self._files():
            is_being_written = path.name.startswith(".")
            grace_s = self.WRITING_S if is_being_written else 0.0
            if stat.st_mtime + grace_s < now:
                num_dropped += self._drop(path)
        return num_dropped

    def check(self) -> None:
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise RedisUnreachableError(
                f"the payload folder {self._folder} cannot be written to by this user"
            )

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, name: str) -> Path:
        if "/" in name or name.startswith("."):
            raise ValueError(f"not a payload name: {name!r}")
        return self._folder / f"{name}{self.SUFFIX}"

    def _files(self) -> Iterable[tuple[Path, os.stat_result]]:
        try:
            entries = os.scandir(self._folder)
        except FileNotFoundError:  # removed by hand; the next put makes it again
            return
        with entries:
            for entry in entries:
                is_file = entry.is_file(follow_symlinks=False)
                if is_file and entry.name.endswith(self.SUFFIX):
                    with contextlib.suppress(FileNotFoundError):
                        yield Path(entry.path), entry.stat(follow_symlinks=False)

    def _sweep_now_and_then(self) -> None:
        if time.monotonic() - self._swept_at > self.SWEEP_EVERY_S:
            self._swept_at = time.monotonic()
            self.sweep()

    @staticmethod
    def _drop(path: Path) -> bool:
        """Whether the file was dropped. In a folder like `/tmp` (mode 1777) only its own user may drop a file."""
        try:
            path.unlink()
        except (FileNotFoundError, PermissionError):
            return False
        return True

    @staticmethod
    def _renew(path: Path, now: float, expires_at: float) -> bool:
        """Whether the file was there. An expired file counts as gone: somebody may be about to sweep it."""
        try:
            if path.stat().st_mtime <= now:
                return False
            os.utime(path, (expires_at, expires_at))
        except FileNotFoundError:
            return False
        except PermissionError:
            # Another user's file, which lives for as long as that user says.
            return True
        return True

    @staticmethod
    def _read(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def _write(
        self,
        path: Path,
        data: Any,
        expires_at: float | None = None,
        only_new: bool = False,
    ) -> None:
        try:
            self._write_beside(path, data, expires_at, only_new)
        except FileNotFoundError:  # the folder was removed by hand, or we were stopped for long, and our file swept
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_beside(path, data, expires_at, only_new)

    def _write_beside(
        self, path: Path, data: Any, expires_at: float | None, only_new: bool
    ) -> None:
        """Write beside, then rename, so that a reader sees all or nothing."""
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{self.SUFFIX}")
        try:
            beside.write_bytes(data)
            if expires_at is not None:
                os.utime(beside, (expires_at, expires_at))
            if only_new:
                os.link(beside, path)
            else:
                beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)
