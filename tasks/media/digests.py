"""Digests of content, as bytes in a row: who it is, and whether it has come as it was sent.

A digest is two hashes of the same bytes, one behind the other:

- 32 hex digits of BLAKE3 say who the content is. It has no known collisions, and is computed once, where content is
  encoded: it costs ten times what the other does.
- 16 hex digits of XXH3 say whether media are those of a digest, after they were fetched. It finds accidents (a cut
  payload, a file that is written to while it is read) and no intent: whoever can write to the payload store can make
  other media of the same checksum. Requests, which are small, are compared by the whole digest.
"""

from __future__ import annotations

from typing import Any

import xxhash
from blake3 import blake3

from tasks.media.arrays import flat

IDENTITY_DIGITS = 32
CHECKSUM_DIGITS = 16

PIECE_BYTES = 2**18
"""What both hashes read, one after the other, while the processor has it at hand: half a level-2 cache or less."""


def digest(data: Any) -> str:
    """48 hex digits that two contents have alike only if they are equal.

    Args:
        data: Contiguous bytes: an array, a `bytes`, a view.
    """
    view = flat(data)
    checksum, identity = xxhash.xxh3_64(), blake3()
    for start in range(0, len(view), PIECE_BYTES):
        piece = view[start : start + PIECE_BYTES]
        # The checksum first. Bytes that change under our hands have a checksum then that does not fit what is stored
        # of them, whichever of them the identity is of.
        checksum.update(piece)
        identity.update(piece)
    return identity.hexdigest()[:IDENTITY_DIGITS] + checksum.hexdigest()


def fits(data: Any, known: str) -> bool:
    """Whether bytes are those that have the digest `known`, by its checksum alone."""
    return xxhash.xxh3_64_hexdigest(flat(data)) == known[IDENTITY_DIGITS:]
