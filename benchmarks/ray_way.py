"""The same work over Ray: arrays by `ray.put` into its object store, an actor that makes PIL images of them.

Ray runs in a process of its own, which stands for the trainer: `python -m benchmarks.ray_way 256 1024` reads a line for
each round from its input, and answers with a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import images
from benchmarks.pipeline import BATCH_SIZE, Round
from tasks.media import PixelsHWC

ROOT = Path(__file__).parents[1]
STORE_BYTES = 4 * 2**30


class RayWay:
    """Ray, started, with one actor; ended as a context manager."""

    def __init__(self, num_images: int, size: int) -> None:
        self._num_images = num_images
        command = [
            sys.executable,
            "-m",
            "benchmarks.ray_way",
            f"{num_images}",
            f"{size}",
        ]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> RayWay:
        self.pids: tuple[int, ...] = tuple(self._answer()["pids"])
        return self

    def __exit__(
        self, *_: type[BaseException] | BaseException | TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait(30)

    def run(self) -> Round:
        """A round of all images."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        answer = self._answer()
        return Round(self._num_images, answer["total_s"], answer["held_s"])

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(
            "Ray has ended; is it installed? pip install 'rewardq[bench]'"
        )


def serve(num_images: int, size: int) -> None:
    """Run a round for each line of the input."""
    import ray  # its own environment may lack it

    pixels = images.draw(num_images, size)
    ray.init(
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=STORE_BYTES,
    )
    try:
        scorer = ray.remote(num_cpus=0)(_Scorer).remote()
        actor_pid = ray.get(scorer.pid.remote())
        print(json.dumps({"pids": [os.getpid(), actor_pid]}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(_round(ray, scorer, pixels)), flush=True)
    finally:
        ray.shutdown()


def _round(ray: Any, scorer: Any, pixels: Sequence[PixelsHWC]) -> dict[str, float]:
    held_s, answers = 0.0, []
    started = time.perf_counter()
    for start in range(0, len(pixels), BATCH_SIZE):
        putting = time.perf_counter()
        references = [ray.put(image) for image in pixels[start : start + BATCH_SIZE]]
        answers.append(scorer.score.remote(*references))
        held_s += time.perf_counter() - putting
        del references
    rewards = [reward for rewards in ray.get(answers) for reward in rewards]
    assert rewards == [1.0] * len(pixels)
    return {"total_s": time.perf_counter() - started, "held_s": held_s}


class _Scorer:
    def pid(self) -> int:
        return os.getpid()

    def score(self, *arrays: PixelsHWC) -> list[float]:
        from PIL import Image

        for array in arrays:
            Image.fromarray(array)
        return [1.0] * len(arrays)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
