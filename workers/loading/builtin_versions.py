"""Whether a built-in here is of the version that a trainer asks for."""

from __future__ import annotations

import platform
from pathlib import Path

from tasks import catalog
from tasks.errors import ModelLoadError, StaleCodeError
from tasks.source.code import hash_on_disk
from tasks.version import __version__

_CATALOG_FILES = tuple(sorted(Path(catalog.__file__).parent.glob("*.py")))
_CATALOG_AT_START = {path: hash_on_disk(path) for path in _CATALOG_FILES}


def check_builtin(model: str, version: str) -> None:
    """Check the version of a built-in. An upgrade changes nothing in a process that runs.

    Args:
        version: The catalog's of the trainer, perhaps with the user's own behind a `/`.

    Raises:
        StaleCodeError: rewardq was upgraded on this host since this process started.
        ModelLoadError: It was not; names both versions.
    """
    ours, asked = catalog.CATALOG[model].version, version.partition("/")[0]
    if ours == asked:
        return
    for path, before in _CATALOG_AT_START.items():
        if hash_on_disk(path) != before:
            raise StaleCodeError(["rewardq"])
    raise ModelLoadError(
        f"reward model {model} is of version {ours} in the rewardq {__version__} on {platform.node()}, and the trainer "
        f"asks for version {asked}; install the same rewardq on both and restart them"
    )
