"""Replies of megabytes are read from the socket into the place where they stay.

redis-py reads a value in pieces, joins them and cuts the end off: each is a copy into fresh memory. With hiredis it is
one copy less. Here a large value is read once, into memory that its reader names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis
from redis._parsers import _RESP2Parser
from redis._parsers.socket import SERVER_CLOSED_CONNECTION_ERROR, SocketBuffer

LEAST_BYTES = 2**16
"""A smaller value is read as redis-py does it, into `bytes`."""

READ_BYTES = 2**14
"""Read from the socket at once where the size of what comes is not known: the beginning of a large value is copied."""

Memory = Callable[[int], bytearray]
"""Gives a buffer of exactly so many bytes."""


class LargeReplies(_RESP2Parser):
    """A parser of redis-py whose large values are bytearrays of `memory`."""

    def __init__(self, socket_read_size: int, memory: Memory = bytearray) -> None:
        super().__init__(socket_read_size)  # type: ignore[no-untyped-call]
        self._memory = memory

    def on_connect(self, connection: Any) -> None:
        """Read from the socket of a connection from now on."""
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        self._buffer = _Socket(
            connection._sock, self.socket_read_size, connection.socket_timeout
        )
        self._buffer.memory = self._memory


class _Socket(SocketBuffer):
    """What was read from a connection's socket, and is not parsed yet."""

    memory: Memory = bytearray

    def read(self, length: int, *timeout: Any, **named: Any) -> Any:
        """A value of `length` bytes; what ends it is read too, and dropped."""
        if length < LEAST_BYTES:
            return super().read(length, *timeout, **named)
        data = self.memory(length)
        with memoryview(data) as view:
            num_read = self._buffer.readinto(view)
            while num_read < length:
                num = self._sock.recv_into(view[num_read:])
                if num == 0:
                    raise redis.ConnectionError(SERVER_CLOSED_CONNECTION_ERROR)
                num_read += num
        super().read(0, *timeout, **named)
        return data
