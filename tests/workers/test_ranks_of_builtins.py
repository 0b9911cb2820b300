"""Every pointwise built-in and its rank through real workers: their numbers are those of other ways, ranked by hand."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks import catalog
from tasks.settings import load_settings
from tests.judges.scripted import MODEL, Answer, JudgeServer, Question, says, says_yes
from tests.pipeline.conftest import expected_ranks, jpeg_bytes
from tests.remote.json_server import Asked, JsonServer, gives
from tests.servers import ROOT, RedisServer, WorkerProcess
from tests.workers.checkpoints import ARCHITECTURE, Reference
from tests.workers.test_clip_models import hps_by_hand, ratings, save_hps
from tests.workers.test_ocr import drawn, expected
from trainer_client import RewardBatch, RewardClient, Sample
from workers.loading.building import reward_class

pytestmark = pytest.mark.timeout(300)

POINTWISE = tuple(name for name, entry in catalog.CATALOG.items() if entry.how == "each")

PROMPT = 'a sign "OPEN" on a wall'
SHOWN = ("OVEN", "OPEN", "SEEN", "SEEK", "OPEN", "CLAY")
"""What the members' images say; two the same, which for OCR is a tie."""

SAID = (0.15, 0.9, 0.4, 0.65, 0.4, 0.3)
"""What judges and reward servers say of them; a tie of two."""


def shown(word: str, i: int) -> Image.Image:
    """A sign in a colour and of a size of its own, by which servers know it."""
    colour = np.array([1.0 - 0.08 * i, 0.7 + 0.05 * i, 0.9 - 0.1 * (i % 3)])
    sign = np.pad(drawn(word), ((0, 8 * i), (0, 0), (0, 0)), mode="edge")
    return Image.fromarray((sign * colour).astype(np.uint8))


IMAGES = [shown(word, i) for i, word in enumerate(SHOWN)]
SAID_OF = {image.size: said for image, said in zip(IMAGES, SAID, strict=True)}
SOURCE = Image.new("RGB", (64, 64), (90, 120, 200))


class WorkerOfSmallArchitecture(WorkerProcess):
    """A worker whose open_clip has a ViT-H-14 that is as small as `file` describes it: the true one takes 4 GB."""

    file: Path

    @classmethod
    def command(cls, queue: str, concurrency: int | None) -> list[str]:
        documented = WorkerProcess.command(queue, concurrency)[3:]
        program = (
            f"import sys, open_clip; open_clip.add_model_config({str(cls.file)!r}); "
            f"sys.argv = ['celery', *{documented!r}]; from celery.__main__ import main; main()"
        )
        return [sys.executable, "-c", program]


# --- what each is asked with, and what it should say ---------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where the checkpoints and servers are."""

    clip: Path
    large_clip: Path
    head: Path
    hps: Path
    judge: str
    server: str


@dataclass(frozen=True)
class Case:
    """Options of a built-in, and its rewards of `IMAGES` by another way."""

    options: dict[str, Any]
    rewards: Callable[[], Sequence[float]]


def cases_at(at: Places) -> dict[str, Case]:
    """One for each pointwise built-in."""
    clip, judge = {"model_name_or_path": str(at.clip)}, {"vlm_model": MODEL, "api_base_url": at.judge}
    aesthetic = {"model_name_or_path": str(at.large_clip), "checkpoint_path": str(at.head)}
    kilobytes = [jpeg_bytes(np.asarray(image)) / 1000 for image in IMAGES]
    return {
        "PickScore": Case(
            {**clip, "processor_name_or_path": str(at.clip)},
            lambda: [Reference(at.clip).logit(PROMPT, image) / 26 for image in IMAGES],
        ),
        "CLIP": Case(clip, lambda: [Reference(at.clip).cosine(PROMPT, image) for image in IMAGES]),
        "HPSv2": Case(
            {"checkpoint_path": str(at.hps)},
            lambda: hps_by_hand(at.hps, "HPS_v2.1_compressed.pt", [PROMPT] * len(IMAGES), IMAGES),
        ),
        "aesthetic": Case(aesthetic, lambda: ratings(at.large_clip, at.head, IMAGES)),
        "OCR": Case({}, lambda: [expected("OPEN", word) for word in SHOWN]),
        "jpeg_compressibility": Case({}, lambda: [-k for k in kilobytes]),
        "jpeg_incompressibility": Case({}, lambda: kilobytes),
        "vllm_evaluate": Case(judge, lambda: SAID),
        "rational_rewards_t2i": Case(judge, lambda: SAID),
        "rational_rewards_edit": Case(judge, lambda: SAID),
        "RemotePointwiseRewardModel": Case({"server_url": at.server}, lambda: SAID),
    }


def judge_says(question: Question) -> Answer:
    """Of the last image shown, as a yes/no judge or by the rubric."""
    with Image.open(io.BytesIO(question.images[-1][1])) as image:
        said = SAID_OF[image.size]
    if question.body.get("logprobs"):
        return says_yes(said)
    titles = ("Text Faithfulness", "Image Faithfulness", "Physical and Visual Quality", "Text Rendering")
    return says("\n".join(f"{title}:\nScore: {1 + 3 * said:.2f}" for title in titles))


def server_says(asked: Asked) -> Answer:
    images = [Image.open(io.BytesIO(base64.b64decode(png))) for png in asked.body["image"]]
    return gives([SAID_OF[image.size] for image in images])


@pytest.fixture(scope="module")
def places(tmp_path_factory, clip_folder, large_clip_folder, head_file) -> Iterator[Places]:
    judge, server = JudgeServer(judge_says), JsonServer(server_says)
    hps = save_hps(tmp_path_factory.mktemp("hps"))
    yield Places(clip_folder, large_clip_folder, head_file, hps, judge.url, server.url)
    judge.stop()
    server.stop()


@pytest.fixture(scope="module")
def scored(tmp_path_factory, places) -> RewardBatch:
    """A group of six, scored by every built-in and ranked by each, in chunks of four and two."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "ViT-H-14.json").write_text(json.dumps(ARCHITECTURE))
    WorkerOfSmallArchitecture.file = folder / "ViT-H-14.json"
    rewards = [
        {"name": model, "reward_model": model, "dtype": "float32", "batch_size": 4, **case.options}
        for name, case in cases_at(places).items()
        for model in (name, f"{name}_Rank")
    ]
    redis = RedisServer(folder)
    settings = load_settings(broker_url=redis.url)
    workers = [WorkerOfSmallArchitecture(*(q, settings, folder, n, {})) for q, n in (("gpu", None), ("vlm", 32))]
    try:
        with RewardClient.from_dict({"rewards": rewards}, "ranks", settings=settings) as client:
            samples = [Sample(PROMPT, image=i, condition_images=[SOURCE], group="g") for i in IMAGES]
            client.submit(samples, group_size=len(samples))
            return client.collect(timeout_s=200, on_failure="nan")
    finally:
        for worker in workers:
            worker.stop()
            print(worker.log_text)
        redis.stop()


# --- that it does --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POINTWISE)
def test_a_built_in_gives_the_rewards_of_another_way_and_ranks_them_as_by_hand(scored, places, name):
    cases = cases_at(places)
    assert name in cases, f"a new built-in needs a case here; there are {', '.join(cases)}"
    by_other_way = cases[name].rewards()
    assert len({round(float(r), 4) for r in by_other_way}) >= 4, "inputs must matter"
    np.testing.assert_allclose(scored.rewards[name], by_other_way, rtol=0, atol=1e-5, err_msg=why(scored, name))
    ranks = expected_ranks([round(float(r), 5) for r in by_other_way])
    np.testing.assert_allclose(scored.rewards[f"{name}_Rank"], ranks, atol=1e-6, err_msg=why(scored, f"{name}_Rank"))


def why(batch: RewardBatch, name: str) -> str:
    return "; ".join(dict.fromkeys(f.message for f in batch.failures if f.reward == name))


# --- what is said of them ------------------------------------------------------------------------------

ROW = re.compile(r"^\| (?P<names>`[^|]*`) \|.*\| (?P<version>\d+) \|$", re.MULTILINE)
"""A row of the README's table of reward models."""


def test_the_readmes_table_has_every_built_in_with_its_version_and_those_of_the_gpu_first():
    table = {
        name: row["version"]
        for row in ROW.finditer((ROOT / "README.md").read_text())
        for name in re.findall(r"`(\w+)`", row["names"])
    }
    assert table == {name: entry.version for name, entry in catalog.CATALOG.items() if entry.how != "rank"}
    queues = [catalog.CATALOG[name].queue for name in table]
    assert queues == sorted(queues, key=[catalog.GPU, catalog.VLM].index)


@pytest.mark.parametrize("name", [n for n, e in catalog.CATALOG.items() if e.how != "rank" and not e.is_yours])
def test_the_docstring_of_a_built_in_says_its_version(name):
    said = re.findall(r"\bVersion (\d+)\.", reward_class(name, load_settings()).__doc__)
    assert said == [catalog.CATALOG[name].version]
