"""A process that scores images of given shapes and prints what it gave and its peak memory: `peak_memory.py JOB`.

JOB is JSON: `model`, `entry` (of the config), `shapes` (`[height, width]` each). Prints JSON: `rewards` (a number, or
the kind and message of a reason) and `peak_bytes` (of the whole process, as Linux counts it) before and after.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tasks.rewards import RewardConfig
from tasks.settings import Settings
from workers import Unscored
from workers.loading.building import build

PROMPT = 'a sign "OPEN"'


def main(job: dict[str, Any]) -> None:
    (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": job["model"], **job["entry"]}}).rewards
    model = build(spec.call, Settings(device="cpu"))
    model([PROMPT], image=[Image.new("RGB", (512, 512), "white")])
    before = peak_bytes()
    rewards = []
    for height, width in job["shapes"]:
        (reward,) = model([PROMPT], image=[Image.new("RGB", (width, height), "white")]).rewards
        rewards.append([reward.kind, reward.message] if isinstance(reward, Unscored) else float(reward))
    print(json.dumps({"rewards": rewards, "peak_bytes": [before, peak_bytes()]}))


def peak_bytes() -> int:
    """The most that this process has had in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
