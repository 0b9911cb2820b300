"""What is wrong is said clearly, before anything is sent or as the reason of its own sample; nothing is lost."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.messages import WIRE_VERSION
from tasks.servers.connections import connect
from tasks.settings import load_settings
from tests.pipeline.conftest import assert_rewards, samples_of
from tests.reward_models import image_of
from tests.servers import ends_with_us, free_port, messages_in, wait_until, worker_env
from trainer_client import (
    CollectTimeoutError,
    ConfigError,
    InvalidSampleError,
    RedisUnreachableError,
    RewardClient,
    Sample,
    TicketError,
)
from trainer_client.engine.intake import UNSTORED_SAMPLES


def truncated_jpeg():
    buffer = io.BytesIO()
    Image.fromarray(image_of(1, 128, 128)).save(buffer, "JPEG")
    return Image.open(io.BytesIO(buffer.getvalue()[:2000]))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(prompt="p"), "reward 'jpeg_compressibility' .* needs image or video, found none"),
        (Sample(prompt="p", image=np.zeros((3, 8, 8), np.uint8)), r"sample 1: image: needs .*found uint8 \(3, 8, 8\)"),
        (Sample(prompt="p", image=np.zeros((8, 8, 3), np.int64)), r"found numpy int64 \(8, 8, 3\)"),
        (Sample(prompt="p", image="cat.png"), "image: needs a PIL image.*found a str"),
        (Sample(prompt="p", image=Image.new("CMYK", (8, 8))), "mode 'CMYK'.*convert"),
        (Sample(prompt="p", image=Image.new("RGB", (9000, 9000))), "more than REWARDQ_MAX_PIXELS"),
        (Sample(prompt=7, image=image_of(1)), "prompt must be text, found a int"),
        (Sample(prompt="p", image=image_of(1), metadata={"x": {1, 2}}), r"metadata\['x'\] is a set"),
        (
            Sample(prompt="p", image=image_of(1), group=torch.tensor([3])),
            r"sample 1: group .*found a Tensor of shape \(1,\).*group=ids\[i\]",
        ),
        (
            Sample(prompt="p", image=image_of(1), group=np.float64("nan")),
            "sample 1: group is NaN, which equals nothing",
        ),
        ({"prompt": "p"}, "needs a Sample, found a dict"),
    ],
)
def test_submit_refuses_a_sample_that_is_plainly_wrong_and_sends_nothing(clients, settings, sample, message):
    client = clients({"reward_model": "jpeg_compressibility"})
    with pytest.raises(InvalidSampleError, match=message):
        client.submit([Sample(prompt="p", image=image_of(1)), sample])
    client.flush()
    assert client.pending() == 0
    with connect(settings.broker) as broker:
        assert messages_in(broker, "gpu") == []


def test_submit_refuses_an_empty_prompt_where_a_reward_needs_one(clients):
    client = clients({"reward_model": "OCR"})
    with pytest.raises(InvalidSampleError, match=r"reward 'OCR' \(OCR\) needs prompt, found an empty prompt '  '"):
        client.submit([Sample(prompt="  ", image=image_of(1))])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"on_failure": "zero"}, "must be 'raise' or 'nan', found 'zero'"),
        ({"on_failure": {"value": 0.0}}, "found {'value': 0.0}; a number .* in the config"),
        ({"on_failure": None}, "must be 'raise' or 'nan', found None"),
        ({"timeout_s": float("nan")}, "timeout_s must be a number of seconds, found nan"),
        ({"timeout_s": None}, "timeout_s must be a number of seconds, found None"),
        ({"split": "Eval"}, "split must be 'train' or 'eval', found 'Eval'"),
        ({"step": 0.0}, "step must be a whole number, found 0.0"),
    ],
)
def test_collect_refuses_what_it_does_not_know_and_leaves_the_step_open(clients, given, message):
    client = clients("PixelCode")
    client.submit(samples_of([1]))
    with pytest.raises((ConfigError, InvalidSampleError), match=message):
        client.collect(**{"timeout_s": 0.1, **given})
    assert client.pending() == 1


def test_a_split_that_there_is_not_is_no_split_of_training(clients):
    client = clients("PixelCode")
    with pytest.raises(ConfigError, match="split must be 'train' or 'eval', found 'evaluation'"):
        client.submit(samples_of([1]), split="evaluation")


@pytest.mark.parametrize("share", [50, -0.1, float("nan"), "0.5", True])
def test_a_failure_rate_is_a_share(clients, share):
    with pytest.raises(ConfigError, match="max_failure_rate must be a share, from"):
        clients("PixelCode", max_failure_rate=share)


def test_what_needs_a_pass_over_the_pixels_becomes_the_reason_of_its_own_sample(clients, workers):
    workers("gpu")
    client = clients("PixelCode")
    nan = torch.zeros(3, 8, 8)
    nan[0, 0, 0] = float("nan")
    bad = [
        Sample(image=nan),
        Sample(image=np.full((3, 8, 8), -0.5, np.float32)),
        Sample(image=truncated_jpeg()),
        Sample(image=Image.new("RGBA", (8, 8), (1, 2, 3, 100))),
    ]
    client.submit([*bad[:2], *samples_of([11]), *bad[2:], *samples_of([12])])
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert batch.valid["PixelCode"].tolist() == [False, False, True, False, False, True]
    assert batch.rewards["PixelCode"][[2, 5]].tolist() == [11.0, 12.0]
    found = {f.sample: (f.kind, f.message) for f in batch.failures}
    for sample, words in {0: "NaN", 1: "[-0.5, -0.5]", 3: "cannot be read", 4: "transparent"}.items():
        kind, message = found[sample]
        assert kind == "invalid"
        assert words in message


def test_a_tensor_changed_before_it_was_sent_is_invalid_and_not_a_wrong_reward(clients, redis_url, workers):
    settings = load_settings(broker_url=redis_url, max_store_bytes=100, claim_ttl_s=2, reconcile_s=0.5)
    client = clients({"reward_model": "PixelCode", "batch_size": 1}, settings=settings)
    num_ahead = UNSTORED_SAMPLES + 2 * settings.sender_threads  # encoded while they wait for room: changed in vain
    tensors = [torch.full((3, 16, 16), n / 255) for n in range(num_ahead + 5)]
    client.submit([Sample(image=t) for t in tensors])
    with pytest.raises(CollectTimeoutError):  # the store is full after the first
        client.flush(timeout_s=1)
    tensors[-1].zero_()
    workers("gpu", settings=settings)
    batch = client.collect(timeout_s=60, on_failure="nan")
    (failure,) = batch.failures
    assert (failure.sample, failure.kind) == (len(tensors) - 1, "invalid")
    assert "changed in place" in failure.message
    assert batch.rewards["PixelCode"][:-1].tolist() == [n << 16 | n << 8 | n for n in range(len(tensors) - 1)]


def test_an_unreachable_redis_is_named_without_its_password_and_with_what_to_start():
    port = free_port()
    settings = load_settings(broker_url=f"redis://trainer:secret@127.0.0.1:{port}/0")
    with pytest.raises(RedisUnreachableError) as caught:
        RewardClient.from_dict({"rewards": {"reward_model": "OCR"}}, "run", settings=settings)
    assert f"redis://trainer:***@127.0.0.1:{port}/0" in str(caught.value)
    assert "redis-server" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_wrong_password_is_said_as_such(private_redis):
    server = private_redis("--requirepass", "right")
    settings = load_settings(broker_url=f"redis://:wrong@127.0.0.1:{server.port}/0")
    with pytest.raises(RedisUnreachableError, match="refuses this user") as caught:
        RewardClient.from_dict({"rewards": {"reward_model": "OCR"}}, "run", settings=settings)
    assert "wrong@" not in str(caught.value)


def start_worker_of_wire_version(version: int, settings, folder: Path) -> subprocess.Popen[bytes]:
    program = (
        f"import sys, tasks.messages as m; m.WIRE_VERSION = {version}\n"
        "from celery.__main__ import main\n"
        "sys.argv = ['celery', '-A', 'tasks', 'worker', '-Q', 'gpu']; main()\n"
    )
    return subprocess.Popen(
        [*ends_with_us("KILL"), sys.executable, "-c", program],
        cwd=folder,
        env=worker_env(settings, {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_a_worker_of_an_older_wire_version_is_named_and_a_right_one_takes_over(clients, workers, settings, tmp_path):
    old = start_worker_of_wire_version(0, settings, tmp_path)
    try:
        client = clients("PixelCode")
        wait_until(client._engine.outcomes.workers, 30)
        client.submit(samples_of([1, 2, 3]))
        words = rf"wire version {WIRE_VERSION}\): gpu\.\d+@\S+ speaks wire version 0; install the same rewardq on both"
        with pytest.raises(CollectTimeoutError, match=words):
            client.collect(timeout_s=4)
        old.terminate()  # while both serve it is chance who takes a message, and after each pause there is but one
        old.wait(30)
        workers("gpu")
        assert_rewards(client.collect(timeout_s=60), [1, 2, 3])
    finally:
        old.kill()
        old.wait()


def test_a_worker_with_another_payload_store_is_named_and_a_right_one_takes_over(clients, workers, settings, redis_url):
    other = load_settings(broker_url=redis_url, payload_url=f"{redis_url[:-1]}5", claim_ttl_s=2, reconcile_s=0.5)
    (wrong,) = workers("gpu", settings=other)
    client = clients("PixelCode")
    client.submit(samples_of([1, 2, 3]))
    with pytest.raises(CollectTimeoutError, match="no worker of queue 'gpu' uses this client's payload store"):
        client.collect(timeout_s=4)
    workers("gpu")
    wrong.stop()
    assert_rewards(client.collect(timeout_s=60), [1, 2, 3])


def test_a_module_that_a_worker_may_not_import_is_named_with_the_variable_to_set(clients, workers):
    workers("gpu")
    client = clients({"reward_model": "os.path.Join", "name": "evil"})
    client.submit(samples_of([1]))
    batch = client.collect(timeout_s=60, on_failure="nan")
    assert "REWARDQ_MODULES=tests.reward_models,os.path" in batch.failures[0].message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "a b"}, "run must be"),
        ({"run": "r", "rank": 2, "world_size": 2}, r"rank must be in \[0, world_size\)"),
        ({"run": "r", "rank": 0, "world_size": 2}, "give launch="),
    ],
)
def test_a_wrong_run_or_rank_is_refused(settings, options, message):
    with pytest.raises(ConfigError, match=message):
        RewardClient.from_dict({"rewards": {"reward_model": "OCR"}}, settings=settings, **options)


def test_a_ticket_of_another_run_or_of_other_rewards_is_refused(clients):
    first = clients("PixelCode", run="first")
    ticket = first.submit(samples_of([1]))
    with pytest.raises(TicketError, match="run 'first'"):
        clients("PixelCode", run="second").collect(ticket=ticket)
    other = clients({"reward_model": "PixelCode", "add": 1}, run="first", launch=None)
    with pytest.raises(TicketError, match="this client has"):
        other.collect(ticket=ticket)
    first.cancel()
