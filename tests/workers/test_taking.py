"""How a class of the user's is called, what it is told of a sample, and when it is not asked at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.errors import ModelLoadError
from tasks.messages import SampleRequest
from tests.workers.requests import Requests, make, plain, run
from workers import GroupwiseRewardModel, PointwiseRewardModel, RewardModelOutput
from workers.loading.signature import signature_of

GREY = np.full((4, 5, 3), 7, np.uint8)
VIDEO = np.full((2, 4, 5, 3), 9, np.uint8)
WAVE = np.float32([[0.5, -0.5, 0.25]])


@pytest.fixture
def requests() -> Requests:
    return Requests()


def reasons(outcomes) -> list[str]:
    return [o.failure.message for o in outcomes]


class Counts(PointwiseRewardModel):
    """What the metadata count."""

    required_fields = ("prompt", "image", "metadata")

    def __call__(self, prompt, image=None, metadata=None, **kwargs):
        return [float(m.get("n", -1)) for m in metadata]


def test_a_declared_field_that_was_not_sent_is_a_reason_with_the_line_for_the_config(requests):
    samples = [
        requests.sample(image=GREY, metadata={"n": 5}),
        requests.sample(image=GREY, withheld=("metadata",)),
        requests.sample(image=GREY),
        requests.sample(image=GREY, metadata={"n": 3}, withheld=("video",)),
    ]
    outcomes = run(make(Counts), samples, requests.payloads)
    assert plain(outcomes) == [5.0, "failed", -1.0, 3.0]
    (reason,) = reasons([outcomes[1]])
    assert "tests.Mine takes metadata, which the sample has and the trainer did not send" in reason
    assert "`required_fields: [prompt, image, metadata]` in the config" in reason


def test_a_field_that_a_call_names_without_declaring_it_counts_where_it_is_small(requests):
    class Names(PointwiseRewardModel):
        required_fields = ("prompt",)

        def __call__(self, prompt, metadata=None, image=None, audio_sample_rate=None):
            assert image is None
            return [float(m["n"] + r) for m, r in zip(metadata, audio_sample_rate, strict=True)]

    samples = [
        requests.sample(image=GREY, metadata={"n": 5}, sample_rate=16000),
        requests.sample(metadata={"n": 5}, sample_rate=1, withheld=("image",)),
        requests.sample(sample_rate=1, withheld=("metadata",)),
    ]
    outcomes = run(make(Names), samples, requests.payloads)
    assert plain(outcomes) == [16005.0, 6.0, "failed"]
    assert "`required_fields: [prompt, metadata, sample_rate]`" in outcomes[2].failure.message


def test_a_small_field_that_a_call_looks_up_in_its_kwargs_counts_as_one_that_it_names(requests):
    class LooksUp(PointwiseRewardModel):
        required_fields = ("prompt", "video")

        def __call__(self, prompt, video=None, **kwargs):
            rates = kwargs.get("frame_rate") or [0] * len(prompt)
            return [float(row["n"]) + (rate or 0) for row, rate in zip(kwargs["metadata"], rates, strict=True)]

    samples = [
        requests.sample(video=VIDEO, metadata={"n": 5}, fps=8.0),
        requests.sample(video=VIDEO, metadata={"n": 3}),
        requests.sample(video=VIDEO, withheld=("metadata",)),
    ]
    outcomes = run(make(LooksUp), samples, requests.payloads)
    assert plain(outcomes) == [13.0, 3.0, "failed"]
    assert "`required_fields: [prompt, video, metadata, fps]`" in outcomes[2].failure.message


def test_what_a_call_does_not_look_up_is_not_among_its_kwargs(requests):
    class Passes(PointwiseRewardModel):
        required_fields = ("prompt",)

        def __call__(self, prompt, **kwargs):
            return [float(len(kwargs))] * len(prompt)

    assert plain(run(make(Passes), [requests.sample(metadata={"n": 5}, fps=8.0)], requests.payloads)) == [0.0]


def test_media_that_a_class_has_an_argument_for_without_declaring_them_are_said_once(requests, caplog):
    class Edits(PointwiseRewardModel):
        required_fields = ("prompt", "image")

        def __call__(self, prompt, image=None, condition_images=None, condition_videos=None):
            return [1.0] * len(prompt)

    samples = [requests.sample(image=GREY, withheld=("condition_images", "video")) for _ in range(3)]
    assert plain(run(make(Edits), samples, requests.payloads)) == [1.0] * 3
    assert caplog.text.count("not sent reward=tests.Mine field=condition_images") == 1
    assert "field=video" not in caplog.text


def test_a_group_of_which_a_member_cannot_be_given_as_it_is_has_no_reward_at_all(requests):
    class Best(GroupwiseRewardModel):
        required_fields = ("prompt", "metadata")

        def __call__(self, prompt, metadata=None, **kwargs):
            return [float(m["n"]) for m in metadata]

    members = (requests.sample(metadata={"n": 1}), requests.sample(withheld=("metadata",)))
    group = SampleRequest(address="run:f:group", prompt="", media={}, members=members)
    (outcome,) = run(make(Best), [group], requests.payloads)
    assert [m.failure.kind for m in outcome.members] == ["failed", "failed"]
    assert "required_fields: [prompt, metadata]" in outcome.members[0].failure.message


def declaring(attribute: str, value) -> type[PointwiseRewardModel]:
    class Declares(PointwiseRewardModel):
        def __call__(self, prompt, **fields):
            return RewardModelOutput([float(len(fields))] * len(prompt), {"fields": [sorted(fields)] * len(prompt)})

    setattr(Declares, attribute, value)
    return Declares


@pytest.mark.parametrize(
    "value",
    [
        ("image", "metadata"),
        ["image", "metadata"],
        {"image": 1, "metadata": 2},
        property(lambda self: ("image", "metadata")),
        lambda self: ("image", "metadata"),
        classmethod(lambda cls: iter(["image", "metadata"])),
        staticmethod(lambda: ["image", "metadata"]),
    ],
)
def test_a_class_may_declare_its_fields_in_any_way(requests, value):
    sample = requests.sample(image=GREY, metadata={"n": 5}, video=VIDEO)
    (outcome,) = run(make(declaring("required_fields", value)), [sample], requests.payloads)
    assert outcome.info["fields"] == ["image", "metadata"]


def test_a_text_is_one_field(requests):
    (outcome,) = run(make(declaring("required_fields", "image")), [requests.sample(image=GREY)], requests.payloads)
    assert outcome.info["fields"] == ["image"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (("images",), "Declares declares what is none: a sample has no field 'images' (did you mean 'image'?)"),
        (("image", "split"), "a column of the data set is a key of its metadata"),
        (7, "required_fields must name fields of a sample, found 7"),
        ((None,), "required_fields must name fields of a sample, found (None,)"),
    ],
)
def test_what_is_no_field_is_refused_when_the_model_is_loaded(value, words):
    with pytest.raises(ModelLoadError) as caught:
        signature_of(make(declaring("required_fields", value)).model)
    assert words in str(caught.value)


def test_a_declaration_that_raises_is_the_reason_of_its_samples(requests):
    model = make(declaring("required_fields", property(lambda self: 1 / 0)))
    outcomes = run(model, [requests.sample(image=GREY)], requests.payloads)
    assert plain(outcomes) == ["failed"]
    assert "ZeroDivisionError: division by zero (test_taking.py:" in outcomes[0].failure.message


def test_a_call_gets_what_it_has_a_name_for_and_its_own_default_where_no_sample_has_it(requests):
    class Plain(PointwiseRewardModel):
        required_fields = ("prompt", "image", "video", "audio", "metadata")

        def __call__(self, image, video, audio_sample_rate=16000, fps=(24.0,)):
            rate = audio_sample_rate if isinstance(audio_sample_rate, int) else audio_sample_rate[0]
            return [float(rate + fps[0] + 1000 * (video is None))] * len(image)

    def reward(**fields) -> float:
        (outcome,) = run(make(Plain), [requests.sample(image=GREY, **fields)], requests.payloads)
        return outcome.reward

    assert reward() == 16000 + 24 + 1000
    assert reward(video=VIDEO, fps=12.5, audio=WAVE, sample_rate=8000) == 8000 + 12.5


def test_the_numbers_of_samples_arrive_as_they_were_and_none_for_one_that_has_none(requests):
    class Rates(PointwiseRewardModel):
        required_fields = ("prompt", "audio", "frame_rate", "sample_rate")

        def __call__(self, prompt, audio, sample_rate, **kwargs):
            assert sorted(kwargs) == ["frame_rate"]
            seen = [f"{rate} {fps}" for rate, fps in zip(sample_rate, kwargs["frame_rate"], strict=True)]
            return RewardModelOutput([0.0] * len(prompt), {"seen": seen})

    samples = [requests.sample(audio=WAVE, sample_rate=24000, fps=29.97), requests.sample(audio=WAVE, fps=30)]
    outcomes = run(make(Rates), samples, requests.payloads)
    assert [o.info["seen"] for o in outcomes] == ["24000 29.97", "None 30"]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_waveform_is_a_tensor_where_media_are(requests, as_tensor):
    class Loud(PointwiseRewardModel):
        required_fields = ("prompt", "audio")
        use_tensor_inputs = as_tensor

        def __call__(self, prompt, audio, **kwargs):
            assert all(isinstance(one, torch.Tensor if as_tensor else np.ndarray) for one in audio)
            return [float(one.mean(axis=-1).squeeze()) for one in audio]

    assert plain(run(make(Loud), [requests.sample(audio=WAVE)], requests.payloads)) == [float(WAVE.mean())]
