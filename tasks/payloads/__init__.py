"""Payload stores: media and requests by key, with a time to live. Redis, or files in memory shared on one host.

A name begins with the id of a client: content is stored once within one client process, and no client frees what
another needs.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from tasks.payloads.file_store import FileStore
from tasks.payloads.names import (
    MAX_REQUEST_BYTES,
    PART_BYTES,
    name_in_parts,
    new_client_id,
)
from tasks.payloads.redis_store import RedisStore
from tasks.payloads.store import Data, PayloadStore
from tasks.settings import Settings

__all__ = [
    "MAX_REQUEST_BYTES",
    "PART_BYTES",
    "Data",
    "FileStore",
    "PayloadStore",
    "RedisStore",
    "name_in_parts",
    "new_client_id",
    "open_store",
]


def open_store(settings: Settings, *, keeps_spares: bool = False) -> PayloadStore:
    """The store at `settings.payloads`.

    Args:
        settings: Of this process.
        keeps_spares: Whether files are reused, by a process that stores and frees many.

    Raises:
        SettingsError: Another user may write to the folder of a `file://` store.
    """
    parts = urlsplit(settings.payloads)
    if parts.scheme != "file":
        return RedisStore(settings.payloads, settings.sentinels)
    folder = Path(unquote(parts.path))
    store = FileStore(folder, settings.payload_gid, keeps_spares=keeps_spares)
    store.check()
    return store
