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
from tasks.connections import DEFAULT_SENTINELS, check_reachable, connect_for_media
from tasks.errors import RedisUnreachableError, SettingsError
from tasks.settings import Sentinels, Settings


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
        """Drop payloads; one that is gone already is no error."""

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
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local function forget(member)
  if redis.call('ZREM', KEYS[1], member) == 1 then
    redis.call('DECRBY', KEYS[2], string.match(member, '^(%d+)|'))
  end
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms, 'LIMIT', 0, 1000)) do forget(member) end
local ttl_ms = tonumber(ARGV[1])
for i = 2, #ARGV do
  if ttl_ms == 0 then forget(ARGV[i])
  elseif redis.call('ZADD', KEYS[1], now_ms + ttl_ms, ARGV[i]) == 1 then
    redis.call('INCRBY', KEYS[2], string.match(ARGV[i], '^(%d+)|'))
  end
end
if ttl_ms > 0 then
  for i = 1, 2 do
    if redis.call('PTTL', KEYS[i]) < ttl_ms then redis.call('PEXPIRE', KEYS[i], ttl_ms) end
  end
end
return redis.call('GET', KEYS[2])
"""
"""KEYS: ledger, sum. ARGV: time to live in ms (0 forgets), then members `<num_bytes>|<name>`. Returns the sum."""


class RedisStore:
    """Payloads as Redis strings with an expiry, counted in a ledger that forgets what expired."""

    def __init__(self, url: str, sentinels: Sentinels = DEFAULT_SENTINELS) -> None:
        self._url = url
        self._redis = connect_for_media(url, sentinels)
        self._sizes: dict[str, int] = {}

    def identity(self) -> str:
        known = cast(bytes | None, self._redis.get(keys.STORE_IDENTITY))
        if known is None:  # not written in vain each time: a server that is full refuses that
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.set(keys.STORE_IDENTITY, secrets.token_hex(8), nx=True)
                pipe.get(keys.STORE_IDENTITY)
                known = pipe.execute()[1]
        return known.decode()

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        ttl_ms = round(1000 * ttl_s)
        views = {name: _flat(data) for name, data in payloads.items()}
        sizes = {name: len(view) for name, view in views.items()}
        with self._redis.pipeline(transaction=False) as pipe:
            for name, view in views.items():
                pipe.set(keys.payload(name), view, px=ttl_ms)
            self._count(pipe, sizes, ttl_ms)
            pipe.execute()
        self._sizes.update(sizes)

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        if not names:
            return []
        with self._redis.pipeline(transaction=False) as pipe:  # MGET's one reply would be put together in memory
            for name in names:
                pipe.get(keys.payload(name))
            return cast(list[bytes | None], pipe.execute())

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        if not names:
            return []
        ttl_ms = round(1000 * ttl_s)
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.pexpire(keys.payload(name), ttl_ms)
            there = pipe.execute()
        found = dict(zip(names, there, strict=True))
        live = {name: self._sizes[name] for name in found if found[name] and name in self._sizes}
        self._count(self._redis, live, ttl_ms)
        return [name for name in found if not found[name]]

    def free(self, names: Sequence[str]) -> None:
        if not names:
            return
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.unlink(*(keys.payload(name) for name in names))
            self._count(pipe, {n: self._sizes[n] for n in names if n in self._sizes}, 0)
            pipe.execute()
        for name in names:
            self._sizes.pop(name, None)

    def bytes_in_use(self) -> int:
        return int(self._redis.eval(_LEDGER, 2, keys.PAYLOAD_LEDGER, keys.PAYLOAD_BYTES, 0) or 0)

    def check(self) -> None:
        check_reachable(self._redis, self._url, "Redis for payloads")

    def close(self) -> None:
        self._redis.close()

    def _count(self, client: Any, sizes: Mapping[str, int], ttl_ms: int) -> None:
        """Enter payloads in the ledger until they expire; 0 takes them out."""
        if sizes:
            members = [f"{num_bytes}|{name}" for name, num_bytes in sizes.items()]
            # The script itself and not its hash, which redis-py would ask for before each pipeline.
            client.eval(_LEDGER, 2, keys.PAYLOAD_LEDGER, keys.PAYLOAD_BYTES, ttl_ms, *members)


def _flat(data: Any) -> Any:
    """Bytes-like data as plain bytes in a row; redis-py takes neither arrays nor views of another shape."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else b""


class FileStore:
    """Payloads as files below a folder in memory (`/dev/shm`), for workers on the trainer's host.

    A file's time of modification is when it expires. Expired files are swept by whoever puts, at most every 10 s, and
    by whoever asks how many bytes are in use.
    """

    SWEEP_EVERY_S = 10.0
    WRITING_S = 60.0
    """A file that is being written is left alone for so long."""
    IDENTITY = "identity"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._swept_at = 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"REWARDQ_PAYLOAD_URL: cannot make the folder {folder}: {error.strerror}") from None

    def identity(self) -> str:
        path = self._folder / self.IDENTITY
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                self._write(path, secrets.token_hex(8).encode(), only_new=True)
        return path.read_text()

    def put(self, payloads: Mapping[str, Any], ttl_s: float) -> None:
        if time.monotonic() - self._swept_at > self.SWEEP_EVERY_S:
            self._swept_at = time.monotonic()
            self.sweep()
        expires_at = time.time() + ttl_s
        for name, data in payloads.items():
            self._write(self._path(name), data, expires_at)

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        return [self._read(self._path(name)) for name in names]

    def renew(self, names: Sequence[str], ttl_s: float) -> list[str]:
        expires_at = time.time() + ttl_s
        gone = []
        for name in names:
            try:
                os.utime(self._path(name), (expires_at, expires_at))
            except FileNotFoundError:
                gone.append(name)
        return gone

    def free(self, names: Sequence[str]) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def bytes_in_use(self) -> int:
        self.sweep()
        return sum(stat.st_size for _, stat in self._files())

    def sweep(self) -> int:
        """Drop what has expired; returns how many files."""
        now, num_dropped = time.time(), 0
        for path, stat in self._files():
            if stat.st_mtime + (self.WRITING_S if path.name.startswith(".") else 0.0) < now:
                path.unlink(missing_ok=True)
                num_dropped += 1
        return num_dropped

    def check(self) -> None:
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise RedisUnreachableError(f"the payload folder {self._folder} cannot be written to by this user")

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, name: str) -> Path:
        if "/" in name or name.startswith(".") or name == self.IDENTITY:
            raise ValueError(f"not a payload name: {name!r}")
        return self._folder / name

    def _files(self) -> Iterable[tuple[Path, os.stat_result]]:
        try:
            entries = os.scandir(self._folder)
        except FileNotFoundError:  # removed by hand; the next put makes it again
            return
        with entries:
            for entry in entries:
                if entry.name != self.IDENTITY:
                    with contextlib.suppress(FileNotFoundError):
                        yield Path(entry.path), entry.stat()

    @staticmethod
    def _read(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def _write(self, path: Path, data: Any, expires_at: float | None = None, only_new: bool = False) -> None:
        """Write beside, then rename, so that a reader sees all or nothing."""
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            try:
                beside.write_bytes(data)
            except FileNotFoundError:  # the folder was removed by hand
                self._folder.mkdir(parents=True, exist_ok=True)
                beside.write_bytes(data)
            if expires_at is not None:
                os.utime(beside, (expires_at, expires_at))
            if only_new:
                os.link(beside, path)
            else:
                beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)
