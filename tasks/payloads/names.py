"""What the name of a payload says: of which run it is, and in how many parts it lies.

A name is `<client id>.<number>.<digest>`, or `.request` in the place of the digest. A client id is
`<run>~<12 hex digits>`: so whoever sees which payloads fill a store sees whose they are.

A Redis bounds the size of a value, and a video may be larger: `<name>.of60` lies in 60 parts. So whoever has the name
can fetch, renew and free the whole, and asks nobody how many parts there are.
"""

from __future__ import annotations

import re
import uuid

PART_BYTES = 32 * 2**20
"""Of media, the largest value that a store is given: an image is one value, a long video lies in parts. Both sides hold
one part in memory beside the payload."""

MAX_REQUEST_BYTES = 256 * 2**20
"""Of a request, which is one value: half of what Redis takes unless it is told otherwise."""

MOST_PARTS = 2**16
"""Of a payload: 2 TiB. A name that says more is none of ours."""

_AFTER_RUN = "~"
"""No name of a run has it."""

_IN_PARTS = re.compile(r"\.of([1-9]\d{0,5})\Z", re.ASCII)


def new_client_id(run: str) -> str:
    """How the names of a client of this run begin; no other client has the same."""
    return f"{run}{_AFTER_RUN}{uuid.uuid4().hex[:12]}"


def run_of(name: str) -> str:
    """The run whose client has stored the payload of this name; empty if the name does not say."""
    run, found, _ = name.partition(_AFTER_RUN)
    return run if found else ""


def name_in_parts(name: str, num_bytes: int, part_bytes: int) -> str:
    """The name under which a payload of so many bytes is stored, in parts of at most `part_bytes`."""
    num = -(-num_bytes // part_bytes)
    return f"{name}.of{num}" if num > 1 else name


def num_parts(name: str) -> int:
    """In how many parts the payload of this name lies."""
    found = _IN_PARTS.search(name)
    return min(int(found[1]), MOST_PARTS) if found else 1
