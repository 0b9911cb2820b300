"""Turns off what libraries send to their makers, before they are imported."""

from __future__ import annotations

import logging
import os
import sys

log = logging.getLogger(__name__)

TURNED_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime 1.32 asks for mobile.events.data.microsoft.com once it has a session
    "HF_HUB_DISABLE_TELEMETRY": "1",  # the hub is told no more than which file
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers has the hub convert a model that has no safetensors
}
"""Variables of the environment, and the values that they get unless the environment has others."""


def turn_off() -> None:
    """Set the variables, for this process and its children.

    onnxruntime reads its variable while it is imported. If that has happened already, nothing helps but to say so.
    """
    is_too_late = (
        "onnxruntime" in sys.modules and "ORT_DISABLE_TELEMETRY" not in os.environ
    )
    for name, value in TURNED_OFF.items():
        os.environ.setdefault(name, value)
    if is_too_late:
        log.warning(
            "onnxruntime was imported before rewardq's workers in process %d, and may send telemetry to Microsoft; "
            "import workers first, or set ORT_DISABLE_TELEMETRY=1 where the process is started",
            os.getpid(),
        )
