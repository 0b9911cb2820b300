"""Where a reward was computed, as its outcome's origin says: the libraries, and the user's code."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from typing import Any

from tasks.catalog import CATALOG
from tasks.messages import RewardCall
from workers.loading.code import LOADED_CODE

LIBRARIES = (
    "rewardq",
    "torch",
    "transformers",
    "open_clip_torch",
    "onnxruntime",
    "rapidocr",
    "pillow",
    "openai",
)
"""What a reward may depend on besides its inputs."""


@cache
def environment() -> dict[str, Any]:
    """The versions of the libraries in this environment."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions}


def code_of(call: RewardCall) -> dict[str, str]:
    """The digest of the code of a class of the user's; empty for a built-in, of which the version says all."""
    digest = "" if call.model in CATALOG else LOADED_CODE.digest(call.model, call.code)
    return {"code": digest} if digest else {}
