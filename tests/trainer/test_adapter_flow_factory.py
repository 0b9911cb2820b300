"""Flow-Factory's buffer and reward model on real workers, called as its trainer calls them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tasks.errors import ConfigError, ScoringError
from tasks.settings import Settings
from tests.pipeline.conftest import together
from tests.reward_models import image_of
from tests.servers import ROOT, run_python
from trainer_client import RewardClient
from trainer_client.adapters.flow_factory import QueuedRewardModel, RewardBuffer, aggregation
from trainer_client.adapters.flow_factory_samples import sample_of
from trainer_client.advantages.formulas import gdpo, weighted_sum

CONFIG = {
    "rewards": [
        {"name": "number", "reward_model": "tests.reward_models.PixelCode", "batch_size": 4},
        {"name": "picky", "reward_model": "tests.reward_models.RaisesOn", "weight": 0.5},
    ],
    "eval_rewards": {"name": "more", "reward_model": "tests.reward_models.PixelCode", "add": 100},
}


@dataclass
class TheirSample:
    """What their samples have and the adapter reads; media are tensors as their constructor makes them."""

    prompt: str | None = None
    image: Any = None
    video: Any = None
    audio: Any = None
    condition_images: Any = None
    all_latents: Any = None
    extra_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def unique_id(self) -> int:
        return 2**60 + len(self.prompt or "")


def tensor_of(number: int) -> torch.Tensor:
    """An image as theirs are: float `(3, H, W)` in [0, 1]."""
    return torch.from_numpy(image_of(number)).permute(2, 0, 1).float() / 255


def samples_of(numbers: list[int], **extra: Any) -> list[TheirSample]:
    return [TheirSample(f"draw {'x' * (n // 4)}", tensor_of(n), extra_kwargs=dict(extra)) for n in numbers]


@pytest.fixture
def client(settings: Settings, workers: Callable[..., Any]) -> Iterator[RewardClient]:
    workers("gpu")
    with RewardClient.from_dict(CONFIG, "flow-factory", settings=settings) as client:
        yield client


def test_the_buffer_returns_their_dict_of_tensors_and_stores_it_in_the_samples(client: RewardClient) -> None:
    buffer = RewardBuffer(client, 4)
    for epoch in range(2):
        buffer.clear()
        numbers = list(range(100 * epoch, 100 * epoch + 12))
        samples = [s for start in (0, 5, 8) for s in samples_of(numbers[start : {0: 5, 5: 8, 8: 12}[start]])]
        for start, stop in ((0, 5), (5, 8), (8, 12)):
            buffer.add_samples(samples[start:stop])
        rewards = buffer.finalize(store_to_samples=True, split="all")
        assert list(rewards) == ["number", "picky"]
        for values in rewards.values():
            assert values.dtype == torch.float32
            assert values.device.type == "cpu"
            assert values.tolist() == [float(n) for n in numbers]
        assert [s.extra_kwargs["rewards"]["number"].item() for s in samples] == numbers
        assert buffer.finalize(store_to_samples=False)["number"].tolist() == rewards["number"].tolist()
        assert len(buffer.batches[0]) == 12


def test_evaluation_has_its_own_rewards_and_may_be_open_at_the_same_time(client: RewardClient) -> None:
    train, evaluation = RewardBuffer(client, 4), RewardBuffer(client, 1, split="eval")
    train.add_samples(samples_of([1, 2, 3, 4]))
    evaluation.add_samples(samples_of([7]))
    assert {n: v.tolist() for n, v in evaluation.finalize(split="pointwise").items()} == {"more": [107.0]}
    assert train.finalize()["number"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_rewards_of_either_kind_are_given_when_asked_for(settings: Settings, workers: Callable[..., Any]) -> None:
    workers("gpu")
    names = ("jpeg_incompressibility", "jpeg_incompressibility_Rank")
    config = {"rewards": [{"name": name, "reward_model": name} for name in names]}
    with RewardClient.from_dict(config, "flow-factory", settings=settings) as client:
        buffer = RewardBuffer(client, 2)
        pictures = [torch.rand(3, size, size) for size in (8, 64, 64, 8)]
        buffer.add_samples([TheirSample("xx"[: i // 2], picture) for i, picture in enumerate(pictures)])
        assert list(buffer.finalize(split="pointwise")) == ["jpeg_incompressibility"]
        ranks = buffer.finalize(split="groupwise")
        assert {name: values.tolist() for name, values in ranks.items()} == {
            "jpeg_incompressibility_Rank": [0.0, 0.5, 0.5, 0.0]
        }
        assert list(buffer.finalize()) == list(names)


def test_a_sample_without_a_reward_raises_or_is_masked_as_asked(client: RewardClient) -> None:
    samples = [*samples_of([8, 9]), *samples_of([10], abstain=True), *samples_of([11])]
    strict = RewardBuffer(client, 4)
    strict.add_samples(samples)
    with pytest.raises(ScoringError, match=r"reward 'picky': 1 of 4 samples \(1 abstained\).*no opinion"):
        strict.finalize()
    strict.add_samples(samples_of([8]))
    with pytest.raises(ScoringError, match="no opinion"):  # else later samples would be given the rewards of others
        strict.finalize()
    strict.clear()
    strict.add_samples(samples[:2])
    assert strict.finalize()["picky"].tolist() == [8.0, 9.0]

    strict.clear()
    lenient = RewardBuffer(client, 4, on_failure="nan")
    lenient._step = strict._step
    lenient.add_samples(samples)
    rewards = lenient.finalize()
    assert torch.isnan(rewards["picky"]).tolist() == [False, False, True, False]
    processor: Any = SimpleNamespace(
        reward_weights={"number": 1.0, "picky": 0.5},
        global_std=True,
        accelerator=SimpleNamespace(num_processes=1, device="cpu"),
    )
    groups = [s.unique_id for s in samples]
    for method, function in (("gdpo", gdpo), ("sum", weighted_sum)):
        found = aggregation(method)(processor, samples, rewards, True)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.numpy(), function(rewards, groups, processor.reward_weights))
        assert torch.isfinite(found).all()
        assert [s.extra_kwargs["advantage"].item() for s in samples] == found.tolist()


def test_clearing_gives_up_what_was_submitted(client: RewardClient) -> None:
    buffer = RewardBuffer(client, 4)
    buffer.add_samples(samples_of([1, 2]))
    buffer.clear()
    buffer.add_samples(samples_of([3]))
    assert buffer.finalize()["number"].tolist() == [3.0]
    buffer.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def ranks(settings: Settings, workers: Callable[..., Any]) -> Iterator[Callable[..., list[RewardClient]]]:
    """Makes the clients of two ranks of one job: `ranks(config)`."""
    workers("gpu")
    made: list[RewardClient] = []

    def make(config: dict[str, Any]) -> list[RewardClient]:
        for rank in range(2):
            options: dict[str, Any] = {"rank": rank, "world_size": 2, "launch": "one", "settings": settings}
            made.append(RewardClient.from_dict(config, "flow-factory", **options))
        return made

    yield make
    for client in made:
        client.close()


def test_a_rank_without_samples_keeps_step_with_the_others(ranks: Callable[..., list[RewardClient]]) -> None:
    first, second = (RewardBuffer(client, 4, timeout_s=60) for client in ranks(CONFIG))
    for numbers in ([1, 2], [3]):
        for buffer in (first, second):
            buffer.clear()
        first.add_samples(samples_of(numbers))
        found, empty = together(first.finalize, second.finalize)
        assert found["number"].tolist() == numbers
        assert {name: len(values) for name, values in empty.items()} == {"number": 0, "picky": 0}
        logged = together(first.metrics, second.metrics)
        assert logged[0] == logged[1]
        assert logged[0]["train/reward_number_mean"] == np.mean(numbers)
    first.add_samples(samples_of([4]))
    for buffer in (first, second):
        buffer.clear()  # the first gives a step up that the second never had
        buffer.add_samples(samples_of([5]))
    assert [found["number"].tolist() for found in together(first.finalize, second.finalize)] == [[5.0], [5.0]]


def test_a_sample_that_a_loader_gives_two_ranks_is_compared_with_none(
    ranks: Callable[..., list[RewardClient]],
) -> None:
    config = {"rewards": {"name": "rank", "reward_model": "jpeg_incompressibility_Rank"}}
    buffers = [RewardBuffer(client, 1, split="eval", timeout_s=60) for client in ranks(config)]
    for buffer in buffers:
        buffer.add_samples(samples_of([1, 2]))  # of one prompt
        buffer.add_samples(samples_of([1]))
    found = together(*(buffer.finalize for buffer in buffers))
    assert [rewards["rank"].tolist() for rewards in found] == [[0.0, 0.0, 0.0]] * 2


def test_the_buffer_has_the_metrics_that_a_function_for_advantages_leaves_out(client: RewardClient) -> None:
    buffer = RewardBuffer(client, 4, on_failure="nan")
    assert buffer.metrics() == {}
    samples = [*samples_of([8, 9]), *samples_of([10], abstain=True), *samples_of([11])]
    buffer.add_samples(samples)
    rewards = buffer.finalize()
    before = buffer.metrics()
    assert before["train/reward_number_mean"] == pytest.approx(9.5)
    assert before["train/reward_picky_mean"] == pytest.approx((8 + 9 + 11) / 3)
    assert before["train/reward_picky_failure_rate"] == 0.25
    assert not any("/adv_" in name for name in before)
    processor: Any = SimpleNamespace(
        reward_weights={"number": 1.0, "picky": 0.5},
        global_std=True,
        accelerator=SimpleNamespace(num_processes=1, device="cpu"),
    )
    advantages = aggregation()(processor, samples, rewards, True)
    after = buffer.metrics()
    assert after["train/adv_max"] == pytest.approx(float(advantages.max()))
    assert after["train/adv_abs_mean"] == pytest.approx(float(advantages.abs().mean()))


def test_their_sample_becomes_ours() -> None:
    theirs = TheirSample(
        "an edit",
        image=tensor_of(1),
        condition_images=(tensor_of(2), tensor_of(3)),
        extra_kwargs={
            "metadata": {"target": "cat", "tags": ["a", 1]},
            "seed": 7,
            "latents": torch.zeros(3),
            "nested": {"tensor": torch.zeros(1)},
            "rewards": {"old": 1.0},
            "advantage": 0.5,
        },
    )
    ours = sample_of(theirs)
    assert (ours.prompt, ours.group) == ("an edit", theirs.unique_id)
    assert ours.image is theirs.image
    assert isinstance(ours.condition_images, list)
    assert ours.condition_videos is None
    assert ours.metadata == {"target": "cat", "tags": ["a", 1], "seed": 7}
    assert (ours.fps, ours.sample_rate) == (None, None)


@pytest.mark.parametrize(
    ("extra", "metadata"),
    [
        ({"metadata": '{"text": "QUACK", "n": [1, null, {"a": 2.5}]}'}, {"text": "QUACK", "n": [1, None, {"a": 2.5}]}),
        ({"metadata": '{"seed": 1}', "seed": 7, "tag": "x"}, {"seed": 1, "tag": "x"}),
        ({"metadata": {"text": "QUACK", "latents": torch.zeros(2)}}, {"text": "QUACK"}),
        ({"text": "QUACK"}, {"text": "QUACK"}),
        ({"metadata": {"n": np.int64(3), "x": np.float32(0.5)}, "y": np.str_("z")}, {"n": 3, "x": 0.5, "y": "z"}),
        ({"metadata": {"box": np.arange(3), "deep": {"n": [np.int64(3)]}}}, {"box": [0, 1, 2], "deep": {"n": [3]}}),
        ({"metadata": {"rewards": [0.5], "advantage": 2}, "rewards": {"old": 1.0}}, {"rewards": [0.5], "advantage": 2}),
        ({"metadata": "{}"}, {}),
        ({"metadata": "null"}, {}),
        ({"metadata": None}, {"metadata": None}),
        ({"metadata": '["a", "list"]'}, {"metadata": '["a", "list"]'}),
        ({"metadata": "no {json"}, {"metadata": "no {json"}),
        ({"metadata": "[" * 100_000}, {"metadata": "[" * 100_000}),
    ],
)
def test_the_row_of_the_data_set_is_the_metadata_however_they_pack_it(extra: dict, metadata: dict) -> None:
    assert sample_of(TheirSample("a duck", extra_kwargs=extra)).metadata == metadata


def test_what_of_the_row_cannot_travel_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        sample_of(TheirSample("a duck", extra_kwargs={"metadata": {"text": "QUACK", "mask": torch.zeros(2)}}))
    (said,) = [r.getMessage() for r in caplog.records if "'mask'" in r.getMessage()]
    assert said.startswith("the data set's 'mask' is a Tensor, which is not plain data: no reward is given it")


@pytest.mark.parametrize(
    ("attributes", "extra", "rates"),
    [
        ({"audio_sample_rate": 24000}, {"frame_rate": 24.0}, (24.0, 24000)),
        ({"frame_rate": 25, "audio_sample_rate": None}, {}, (25, None)),
        ({}, {"fps": 30, "audio_sample_rate": 16000}, (30, 16000)),
        ({"frame_rate": torch.tensor(24.0)}, {"audio_sample_rate": np.array(16000)}, (24.0, 16000)),
        ({}, {"fps": float("inf"), "audio_sample_rate": float("nan")}, (None, None)),
        ({}, {"fps": "thirty", "frame_rate": True, "audio_sample_rate": -1}, (None, None)),
    ],
)
def test_the_rates_of_their_media_are_the_samples(attributes: dict, extra: dict, rates: tuple) -> None:
    theirs: Any = TheirSample("a duck", extra_kwargs=extra)
    for name, value in attributes.items():
        setattr(theirs, name, value)
    ours = sample_of(theirs)
    assert (ours.fps, ours.sample_rate) == rates


def arguments(name: str = "number", **extra: Any) -> Any:
    """Their `RewardArguments` as a reward model reads them: unknown keys are in `extra_kwargs`."""
    return SimpleNamespace(
        name=name, dtype=torch.bfloat16, device=torch.device("cuda"), batch_size=4, extra_kwargs=extra
    )


@pytest.fixture
def their_settings(settings: Settings, workers: Callable[..., Any], in_env: Callable[..., Any]) -> Settings:
    """The model is made by their loader, which knows no settings: they are in the environment."""
    workers("gpu")
    in_env(
        REWARDQ_BROKER_URL=settings.broker,
        REWARDQ_CLAIM_TTL_S=f"{settings.claim_ttl_s}",
        REWARDQ_RECONCILE_S=f"{settings.reconcile_s}",
    )
    return settings


def test_the_reward_model_scores_batches_of_several_threads(their_settings: Settings) -> None:
    model = QueuedRewardModel(
        config=arguments(run="ff", model="tests.reward_models.PixelCode", add=1), accelerator=SimpleNamespace()
    )
    assert model.device == torch.device("cpu")
    assert model.to("cuda") is model

    def batch(start: int) -> list[float]:
        numbers = range(start, start + 4)
        output = model(prompt=["p"] * 4, image=torch.stack([tensor_of(n) for n in numbers]))
        return list(output.rewards.tolist())

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(batch, range(0, 40, 4)))
    assert [reward for rewards in found for reward in rewards] == [float(n + 1) for n in range(40)]
    model.client.close()


def test_the_reward_model_passes_the_row_of_the_data_set_on(their_settings: Settings) -> None:
    model = QueuedRewardModel(arguments(run="ff", model="tests.reward_models.RaisesOn"), SimpleNamespace())
    rows = ['{"raise": false}', '{"abstain": false}']
    images = [tensor_of(3), tensor_of(4)]
    assert model(prompt=["p", "q"], image=images, metadata=rows).rewards.tolist() == [3.0, 4.0]
    with pytest.raises(ScoringError, match=r"ValueError: this sample is bad \(reward_models\.py:\d+ in __call__\)"):
        model(prompt=["p"], image=[tensor_of(5)], metadata=['{"raise": true}'])
    model.client.close()


def test_several_rewards_and_several_ranks_of_an_elastic_launch_do_not_take_each_others_place(
    their_settings: Settings, in_env: Callable[..., Any]
) -> None:
    in_env(TORCHELASTIC_RUN_ID="job-7", TORCHELASTIC_RESTART_COUNT="0", PYTHONPATH=str(ROOT))
    another_rank = (
        "from tests.trainer.test_adapter_flow_factory import *\n"
        "model = QueuedRewardModel(arguments(run='ff', model='tests.reward_models.PixelCode'), SimpleNamespace())\n"
        "print(model(prompt=['p'], image=[tensor_of(7)]).rewards.tolist())\n"
        "model.client.close()"
    )
    models = [
        QueuedRewardModel(arguments(run="ff", model="tests.reward_models.PixelCode", add=add), SimpleNamespace())
        for add in (0, 100)
    ]
    assert run_python("-c", another_rank, env=os.environ).stdout.strip() == "[7.0]"
    assert [model(prompt=["p"], image=[tensor_of(7)]).rewards.tolist() for model in models] == [[7.0], [107.0]]
    for model in models:
        model.client.close()


def test_the_reward_model_raises_where_there_is_no_reward_or_counts_what_it_was_told(their_settings: Settings) -> None:
    dotted = "tests.reward_models.NaNModel"
    strict = QueuedRewardModel(arguments(run="ff", model=dotted), SimpleNamespace())
    with pytest.raises(ScoringError, match="reward 'number': 1 of 1 samples"):
        strict(prompt=["p"], image=[tensor_of(1)])
    strict.client.close()
    lenient = QueuedRewardModel(arguments(run="ff", model=dotted, on_failure={"value": -1.0}), SimpleNamespace())
    assert lenient(prompt=["p"], image=[tensor_of(1)]).rewards.tolist() == [-1.0]
    lenient.client.close()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"model": "OCR"}, "QueuedRewardModel needs model: and run:"),
        ({"run": "ff"}, "QueuedRewardModel needs model: and run:"),
        ({"run": "ff", "model": "OCR", "on_failure": "nan"}, "one NaN makes their advantages NaN"),
        ({"run": "ff", "model": "OCR_Rank"}, "OCR_Rank compares a whole group; use RewardBuffer"),
        ({"run": "ff", "model": "OCRR"}, "unknown reward model 'OCRR'"),
    ],
)
def test_a_reward_model_that_cannot_work_is_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QueuedRewardModel(arguments(**extra), SimpleNamespace())


def test_their_processor_takes_it_for_one_of_theirs(their_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from abc import ABC

    theirs = type("PointwiseRewardModel", (ABC,), {})
    monkeypatch.setitem(sys.modules, "flow_factory.rewards.abc", SimpleNamespace(PointwiseRewardModel=theirs))  # type: ignore[arg-type]
    model = QueuedRewardModel(arguments(run="ff", model="tests.reward_models.Null"), SimpleNamespace())
    assert isinstance(model, theirs)
    model.client.close()


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_async", [False, True])
def test_their_loader_processor_and_buffer_work_with_it(their_settings: Settings, is_async: bool) -> None:
    from accelerate import Accelerator
    from flow_factory import rewards as theirs
    from flow_factory.advantage.advantage_processor import AdvantageProcessor
    from flow_factory.hparams import MultiRewardArguments
    from flow_factory.samples import I2ISample

    entries = [
        {
            "name": name,
            "reward_model": "trainer_client.adapters.flow_factory.QueuedRewardModel",
            "model": "tests.reward_models.PixelCode",
            "run": "ff",
            "add": add,
            "batch_size": 3,
            "async_reward": is_async,
            "num_workers": 4,
        }
        for name, add in (("number", 0), ("more", 100))
    ]
    accelerator = Accelerator(cpu=True)
    loader = theirs.MultiRewardLoader(MultiRewardArguments.from_dict(entries), accelerator).load()
    processor = theirs.RewardProcessor(
        accelerator, loader.get_training_reward_models(), loader.get_reward_configs("train"), verbose=False
    )
    buffer = theirs.RewardBuffer(processor, 4)
    samples = [
        I2ISample(prompt=f"p{n // 4}", image=tensor_of(n), condition_images=[tensor_of(1), tensor_of(2)])
        for n in range(8)
    ]
    for _ in range(2):
        buffer.clear()
        buffer.add_samples(samples[:5])
        buffer.add_samples(samples[5:])
        found = buffer.finalize()
        assert found["number"].tolist() == [float(n) for n in range(8)]
        assert found["more"].tolist() == [float(n + 100) for n in range(8)]
    buffer.shutdown()

    ours = RewardBuffer(loader.get_training_reward_models()["number"].client, 4)
    ours.add_samples(samples)
    rewards = ours.finalize()
    assert rewards["number"].tolist() == found["number"].tolist()
    advantages = AdvantageProcessor(accelerator, {"number": 1.0}, 4, sampler_type="group_contiguous")
    masked = advantages.compute_advantages(samples, rewards, True, aggregation("gdpo"))
    plain = advantages.compute_advantages(samples, rewards, True, "gdpo")
    np.testing.assert_allclose(masked.cpu(), plain.cpu(), rtol=1e-4)
    for model in loader.get_training_reward_models().values():
        model.client.close()
