"""What passes through the pipeline in the long run: `SOAK_SAMPLES` tiny images, and `SOAK_LARGE` large ones."""

from __future__ import annotations

import os

from tests.soak.long_run import Load

LOADS = (
    Load("tiny", int(os.environ.get("SOAK_SAMPLES", "1000000")), side=8, step_size=1000),
    Load("large", int(os.environ.get("SOAK_LARGE", "10000")), side=1024, step_size=32, has_pools=False),
)
