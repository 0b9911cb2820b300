"""Remote rewards through real workers: from a trainer's samples to a server and back."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.judges.scripted import Answer
from tests.remote.json_server import gives, pixels_of, says_error
from tests.servers import wait_until
from trainer_client import RewardClient, Sample

GUIDE = """
rewards:
  - name: "remote_reward_1"
    reward_model: "flow_factory.rewards.my_reward_remote.RemotePointwiseRewardModel"
    server_url: "{first}"
    batch_size: 4
    async_reward: true     # compute during sampling, not after
    num_workers: 1
    timeout: 60.0          # optional, default 60s
    retry_attempts: 3      # optional, default 3
  - name: "remote_ranking"
    reward_model: "flow_factory.rewards.my_reward_remote.RemoteGroupwiseRewardModel"
    server_url: "{second}"
    timeout: 60.0
    retry_attempts: 3
"""


def code(*arrays: np.ndarray, text: str = "") -> float:
    """A number below 2**24 that says of what pixels, in what order and shape, and of what text it is."""
    found = hashlib.sha256(text.encode())
    for array in arrays:
        found.update(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return float(int.from_bytes(found.digest()[:3], "big"))


def pixels(number: int, height: int = 6, width: int = 4) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def remote(url, kind: str = "Pointwise", **more):
    return {"name": "remote", "reward_model": f"Remote{kind}RewardModel", "server_url": url, **more}


def run(settings, rewards, samples, timeout_s: float = 60.0, **options):
    """The batch of one step."""
    group_size = options.pop("group_size", None)
    options.setdefault("max_failure_rate", 1.0)  # tests of servers that fail have few others
    with RewardClient.from_dict({"rewards": rewards}, "remote", settings=settings, **options) as client:
        client.submit(samples, group_size=group_size)
        return client.collect(timeout_s, on_failure="nan", progress=False)


def test_flow_factorys_rewards_are_computed_by_servers_that_speak_only_its_json(
    settings, workers, json_server, tmp_path
):
    def pixel_codes(asked):
        return gives([code(pixels_of(one), text=p) for p, one in zip(asked.prompts, asked.body["image"], strict=True)])

    def ranks(asked):
        means = np.array([pixels_of(one).mean() for one in asked.body["image"]])
        return gives([float((means < mean).sum()) / len(means) for mean in means])

    first, second = json_server(pixel_codes), json_server(ranks)
    (tmp_path / "rewards.yaml").write_text(GUIDE.format(first=first.url, second=second.url))
    workers("vlm")
    images = [pixels(n, 5 + n % 3, 4 + n % 2) for n in range(8)]
    samples = [
        Sample(prompt=f"prompté {n // 4}", image=image, group=n // 4, metadata={"secret": n})
        for n, image in enumerate(images)
    ]
    with RewardClient.from_yaml(tmp_path / "rewards.yaml", run="guide", settings=settings) as client:
        client.submit(samples, group_size=4)
        batch = client.collect(60)
    expected = [code(image, text=f"prompté {n // 4}") for n, image in enumerate(images)]
    assert batch.rewards["remote_reward_1"].tolist() == expected
    means = np.array([image.mean() for image in images]).reshape(2, 4)
    assert batch.rewards["remote_ranking"].tolist() == (means.argsort().argsort() / 4).reshape(-1).tolist()
    assert [len(asked.prompts) for asked in first.asked] == [4, 4]
    assert [len(asked.prompts) for asked in second.asked] == [4, 4], "each group whole"
    for asked in first.asked + second.asked:
        assert asked.body.keys() == {"prompt", "image", "video", "condition_images", "condition_videos"}
        assert asked.body["condition_images"] is None


def all_media(sample: Sample) -> list[np.ndarray]:
    image = [sample.image] if sample.image is not None else []
    conditions = [frame for video in sample.condition_videos for frame in video]
    return [*image, *(sample.video if sample.video is not None else ()), *sample.condition_images, *conditions]


@pytest.mark.parametrize("kind", ["Pointwise", "Groupwise"])
def test_every_declared_field_reaches_our_server_as_it_was(settings, workers, serve, kind):
    num_calls = []

    def compute(prompt, image, video, condition_images, condition_videos, metadata, fps):
        num_calls.append(len(prompt))
        rewards = []
        for i, text in enumerate(prompt):
            arrays = [np.asarray(one) for one in (image[i], *video[i], *condition_images[i])]
            arrays += [np.asarray(frame) for one in condition_videos[i] for frame in one]
            rewards.append(code(*arrays, text=f"{text}{json.dumps(metadata[i])}{fps[i]}"))
        return rewards

    url = serve(compute)
    workers("vlm")
    samples = [
        Sample(
            prompt=f"sample {n}",
            image=pixels(n, 3 + n, 4),
            video=np.stack([pixels(10 * n + k, 2, 2 + n) for k in range(1 + n)]),
            condition_images=[pixels(100 + n, 5, 5), pixels(200 + n, 1, 9)],
            condition_videos=[np.stack([pixels(300 + n)] * 2), np.stack([pixels(400 + n, 2, 2)])],
            metadata={"n": n, "text": "ü", "list": [1.5, None, True]},
            fps=23.976 + n,
            group=0,
        )
        for n in range(4)
    ]
    fields = ["prompt", "image", "video", "condition_images", "condition_videos", "metadata", "fps"]
    batch = run(settings, remote(url, kind, batch_size=4, required_fields=fields), samples, group_size=4)
    expected = [code(*all_media(s), text=f"{s.prompt}{json.dumps(dict(s.metadata))}{s.fps}") for s in samples]
    assert batch.rewards["remote"].tolist() == expected, batch.describe_failures()
    assert num_calls == [4]


def test_a_sample_without_a_declared_field_is_refused_at_once(settings):
    with (
        RewardClient.from_dict(
            {"rewards": remote("http://localhost:1", required_fields=["image", "condition_images"])},
            "remote",
            settings=settings,
        ) as client,
        pytest.raises(ValueError, match="needs condition_images"),
    ):
        client.submit([Sample(prompt="a", image=pixels(0))])


ODD = {"sample 1": float("nan"), "sample 3": None}

FAULTS = {
    "too few": lambda asked: gives([1.0] * (len(asked.prompts) - 1)),
    "hangs": lambda _: Answer(delay_s=60),
    "hangs past timeout_s": lambda _: Answer(delay_s=60),
    "dies mid-request once": lambda a: Answer(body=b'{"rewards": [1.0', cut_after=5) if a.number == 0 else right(a),
    "dies mid-request": lambda _: Answer(body=b'{"rewards": [1.0', cut_after=5),
    "503 twice": lambda a: says_error(503, {"error": "full"}, Retry_After="1") if a.number < 2 else right(a),
    "503 always": lambda _: says_error(503, {"error": "full"}, Retry_After="1"),
    "500 always": lambda _: says_error(500, {"detail": "CUDA is out of order"}),
    "NaN": lambda asked: gives([ODD.get(p, float(p[-1])) for p in asked.prompts]),
    "one is bad": lambda a: says_error(500, {"detail": "no face"}) if "sample 2" in a.prompts else right(a),
    "well": lambda asked: right(asked),
}

REASONS = {
    # what becomes of the four samples: rewards, or (kind, words of the reason)
    "too few": [("failed", "gave 3 rewards for 4 samples")] * 4,
    "hangs": [("timeout", "no answer to /compute within 1 seconds after 2 requests")] * 4,
    "hangs past timeout_s": [("timeout", "within timeout_s=3 seconds")] * 4,
    "dies mid-request once": [0, 1, 2, 3],
    "dies mid-request": [("failed", "after 2 requests")] * 4,
    "503 twice": [0, 1, 2, 3],
    "503 always": [("timeout", "answered 503: full after")] * 4,
    "500 always": [("failed", "answered 500: CUDA is out of order after 2 requests")] * 4,
    "NaN": [0, ("failed", "returned nan"), 2, ("failed", "NoneType")],
    "one is bad": [0, 1, ("failed", "answered 500: no face after 2 requests"), 3],
    "well": [0, 1, 2, 3],
}
OPTIONS = {
    "hangs": {"timeout": 1},
    "hangs past timeout_s": {"timeout_s": 3},
    "503 always": {"timeout_s": 4},
    "one is bad": {"timeout_s": 15},
}


def right(asked) -> Answer:
    return gives([float(p.removeprefix("sample ")) for p in asked.prompts])


def test_servers_that_fail_give_right_rewards_or_true_reasons_in_time(settings, workers, json_server):
    servers = {name: json_server(script) for name, script in FAULTS.items()}
    workers("vlm")
    rewards = [
        remote(
            server.url, **{"name": name, "batch_size": 4, "retry_attempts": 2, "timeout_s": 20, **OPTIONS.get(name, {})}
        )
        for name, server in servers.items()
    ]
    samples = [Sample(prompt=f"sample {n}", image=pixels(n)) for n in range(4)]
    started = time.monotonic()
    batch = run(settings, rewards, samples, timeout_s=50)
    assert time.monotonic() - started < 50
    failures = {(f.reward, f.sample): f for f in batch.failures}
    for name, expected in REASONS.items():
        for i, one in enumerate(expected):
            if isinstance(one, tuple):
                failure = failures.pop((name, i))
                assert (failure.kind, one[1] in failure.message) == (one[0], True), (name, failure)
                assert np.isnan(batch.rewards[name][i])
            else:
                assert batch.rewards[name][i] == one, (name, i, failures.get((name, i)))
    assert failures == {}


def test_a_server_that_hangs_does_not_hold_collect_past_its_deadline(settings, workers, json_server):
    server = json_server(lambda _: Answer(delay_s=60))
    workers("vlm")
    with RewardClient.from_dict({"rewards": remote(server.url)}, "remote", settings=settings) as client:
        client.submit([Sample(prompt="a", image=pixels(0))])
        wait_until(lambda: server.asked)
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            client.collect(2.0, progress=False)
    assert time.monotonic() - started < 10


SLOW = """
import sys, time
from PIL import Image
from workers.server import RewardServer

class Slow(RewardServer):
    def compute_reward(self, prompt, image):
        print("computing", flush=True)
        time.sleep(0.3)
        return [float(p.removeprefix("sample ")) for p in prompt]

Slow().run(port=int(sys.argv[2]))
"""


def test_a_server_killed_in_the_middle_and_started_again_gives_all_rewards(settings, workers, server_process, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    server = server_process(tmp_path / "slow.py")
    workers("vlm")
    samples = [Sample(prompt=f"sample {n}", image=pixels(n)) for n in range(24)]
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(run, settings, remote(server.url, batch_size=2, retry_attempts=8), samples)
        wait_until(lambda: server.log.read_text().count("computing") >= 3, 30)
        server.kill()
        time.sleep(0.5)
        server.start()
        rewards = batch.result().rewards["remote"]
    assert rewards.tolist() == [float(n) for n in range(24)]


def test_of_two_servers_one_may_die_in_the_middle(settings, workers, server_process, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    servers = [server_process(tmp_path / "slow.py") for _ in range(2)]
    workers("vlm")
    samples = [Sample(prompt=f"sample {n}", image=pixels(n)) for n in range(24)]
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(run, settings, remote([s.url for s in servers], batch_size=2, retry_attempts=1), samples)
        wait_until(lambda: "computing" in servers[0].log.read_text() and "computing" in servers[1].log.read_text(), 30)
        servers[0].kill()
        rewards = batch.result().rewards["remote"]
    assert rewards.tolist() == [float(n) for n in range(24)]
    assert servers[1].log.read_text().count("computing") > 6


def test_what_our_server_says_of_a_sample_reaches_the_trainer(settings, workers, serve):
    def compute(prompt, image):
        if any(p == "sample 3" for p in prompt):
            raise LookupError("no such colour in sample 3")
        return [ValueError("no face") if p == "sample 1" else float(p[-1]) for p in prompt]

    url = serve(compute)
    workers("vlm")
    batch = run(settings, remote(url), [Sample(prompt=f"sample {n}", image=pixels(n)) for n in range(5)])
    found = {f.sample: (f.kind, f.message) for f in batch.failures}
    assert found == {
        1: ("failed", f"{url}: ValueError: no face"),
        3: ("failed", f"{url}: LookupError: no such colour in sample 3"),
    }
    assert batch.rewards["remote"][[0, 2, 4]].tolist() == [0.0, 2.0, 4.0]


def test_without_a_version_each_launch_is_scored_by_the_server_as_it_is_now(settings, workers, serve):
    offset, lock, num_scored = [0.0], threading.Lock(), [0]

    def compute(prompt, image):
        with lock:
            num_scored[0] += len(prompt)
        return [offset[0] + float(p[-1]) for p in prompt]

    url = serve(compute)
    workers("vlm")
    samples = [Sample(prompt=f"sample {n}", image=pixels(n)) for n in range(3)]
    for version, second in ((None, [10.0, 11.0, 12.0]), ("1", [0.0, 1.0, 2.0])):
        offset[0], num_scored[0] = 0.0, 0
        one, other = remote(url, version=version), remote(url, version=version, retry_attempts=5, timeout=30)
        assert run(settings, one, samples, launch="a").rewards["remote"].tolist() == [0.0, 1.0, 2.0]
        offset[0] = 10.0
        again = run(settings, other, samples, launch="a").rewards["remote"].tolist()
        assert again == [0.0, 1.0, 2.0], "how it is asked makes no other reward"
        assert num_scored[0] == 3
        assert run(settings, one, samples, launch="b").rewards["remote"].tolist() == second
        offset[0] = 0.0


def test_the_rank_of_a_remote_reward_is_taken_in_each_group(settings, workers, serve):
    url = serve(lambda prompt, image: [float(np.asarray(one)[0, 0, 0]) for one in image])
    workers("vlm")
    reds = [40, 10, 30, 20]
    images = [np.full((2, 2, 3), red, np.uint8) for red in reds]
    reward = {"name": "remote", "reward_model": "RemotePointwiseRewardModel_Rank", "server_url": url}
    batch = run(settings, reward, [Sample(prompt="p", image=i, group=0) for i in images], group_size=4)
    assert batch.rewards["remote"].tolist() == [0.75, 0.0, 0.5, 0.25]


def test_a_group_of_two_ranks_has_one_outcome_where_a_part_failed_before_both_had_seen_it_sealed(
    settings, workers, serve
):
    failed = set()

    def compute(prompt, image):
        if prompt[0].endswith("!") and prompt[0] not in failed:
            failed.add(prompt[0])
            raise RuntimeError("a hiccup")
        return [float(np.asarray(one)[0, 0, 0]) for one in image]

    reward = {
        **remote(serve(compute), version="1", batch_size=1, retry_attempts=1),
        "reward_model": "RemotePointwiseRewardModel_Rank",
    }
    workers("vlm")
    options = {"settings": settings, "world_size": 2, "launch": "one"}

    def collect(clients, step):
        with ThreadPoolExecutor(2) as pool:
            batches = pool.map(lambda one: one.collect(60, on_failure="nan", step=step, progress=False), clients)
            return [batch.rewards["remote"].tolist() for batch in batches]

    with (
        RewardClient.from_dict({"rewards": reward}, "remote", rank=0, **options) as first,
        RewardClient.from_dict({"rewards": reward}, "remote", rank=1, **options) as second,
    ):
        for step in range(4):
            own = [
                Sample(prompt=f"{step}{'!' * (red == 10)}", image=np.full((2, 2, 3), red, np.uint8), group=0)
                for red in (0, 10, 20, 30)
            ]
            for again in (False, True):
                first.submit(own[:2], 4, step=step)
                first.flush()
                time.sleep(0.1 * step)  # it looks for what others have sealed twice a second while nobody waits
                second.submit(own[2:], 4, step=step)
                wait_until(lambda: second.pending() == 0, 30)
                whole = [[0.0, 0.25], [0.5, 0.75]]
                lacking = [[0.0, np.nan], [np.float32(1 / 3), np.float32(2 / 3)]]
                np.testing.assert_array_equal(collect((first, second), step), whole if again else lacking)
