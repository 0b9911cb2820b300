from __future__ import annotations

import contextlib
import math
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tasks.messages import pack_outcome, unpack_outcome
from tasks.settings import load_settings
from tests.reward_models import image_of
from tests.workers.requests import Requests, call_of, iter_run, make, plain, run
from workers import PointwiseRewardModel, RewardModelOutput, Unscored
from workers.scoring.runner import ModelRunner

RNG = np.random.default_rng(5)


@pytest.fixture
def requests() -> Requests:
    return Requests()


def numbered(requests: Requests, num: int) -> list:
    return [requests.sample(prompt=str(i), image=image_of(i)) for i in range(num)]


def returning(make_output) -> type[PointwiseRewardModel]:
    """A model that returns `make_output(number of samples)`."""

    class Returning(PointwiseRewardModel):
        required_fields = ("image",)

        def __call__(self, prompt, image=None, **kwargs):
            return make_output(len(prompt))

    return Returning


def watched() -> tuple[ModelRunner, list]:
    """A runner, and what is under its watch at any time."""
    watching = []

    @contextlib.contextmanager
    def watch(samples, timeout_s):
        watching.append(samples)
        try:
            yield
        finally:
            watching.pop()

    return ModelRunner(load_settings(), watch=watch), watching


def outcomes_for(requests, make_output, num: int = 3):
    return run(make(returning(make_output)), numbered(requests, num), requests.payloads)


def info_for(requests, extra_info, num: int = 3) -> list[dict]:
    outcomes = outcomes_for(requests, lambda n: RewardModelOutput([1.0] * n, extra_info), num)
    assert [o.reward for o in outcomes] == [1.0] * num
    assert [unpack_outcome(pack_outcome(o)) for o in outcomes]
    return [o.info for o in outcomes]


@pytest.mark.parametrize(
    "rewards",
    [
        [0.5, -1.0, 3],
        (0.5, -1.0, 3),
        np.array([0.5, -1.0, 3.0]),
        np.array([0.5, -1.0, 3.0], np.float16),
        [np.float32(0.5), np.float64(-1.0), np.int64(3)],
        [np.array(0.5), np.array([-1.0]), np.array([[3.0]])],
    ],
    ids=["list", "tuple", "array", "half array", "numpy scalars", "arrays of one"],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_rewards_of_every_form_are_rewards(requests, rewards, wrapped):
    outcomes = outcomes_for(requests, lambda n: RewardModelOutput(rewards) if wrapped else rewards)
    assert plain(outcomes) == [0.5, -1.0, 3.0]
    assert all(type(o.reward) is float for o in outcomes)


def test_tensors_of_every_form_are_rewards(requests):
    import torch

    values = torch.tensor([0.5, -1.0, 3.0])
    forms = [
        values,
        values.bfloat16(),
        values.half(),
        values.double(),
        values.clone().requires_grad_(),
        torch.tensor([5, -10, 30]) // 10 + torch.tensor([0.5, 0.0, 0.0]),
        list(values),
        [values[0], values[1:2], values[2].reshape(1, 1)],
    ]
    for form in forms:
        assert plain(outcomes_for(requests, lambda n, form=form: RewardModelOutput(form))) == [0.5, -1.0, 3.0]
    whole = torch.tensor([1, -1, 3])
    assert plain(outcomes_for(requests, lambda n: RewardModelOutput(whole))) == [1.0, -1.0, 3.0]


def test_a_reward_keeps_the_digits_it_came_with(requests):
    import torch

    value = 0.1234567890123456
    for form in ([value], np.array([value]), torch.tensor([value], dtype=torch.float64)):
        (outcome,) = outcomes_for(requests, lambda n, form=form: RewardModelOutput(form), num=1)
        assert outcome.reward == value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "0.5", True, [0.5], {}, 1j, 1e300, 10**400])
def test_what_is_no_finite_number_is_a_reason_for_its_sample_alone(requests, bad):
    outcomes = outcomes_for(requests, lambda n: RewardModelOutput([1.0, bad, 2.0]))
    assert plain(outcomes) == [1.0, "failed", 2.0]
    assert outcomes[1].failure.message.startswith("the model returned ")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_in_a_tensor_or_array_is_a_reason_for_its_sample_alone(requests, bad):
    import torch

    for form in (np.array([1.0, bad, 2.0]), torch.tensor([1.0, bad, 2.0]), torch.tensor([1.0, bad, 2.0]).bfloat16()):
        outcomes = outcomes_for(requests, lambda n, form=form: RewardModelOutput(form))
        assert plain(outcomes) == [1.0, "failed", 2.0]
        assert str(bad) in outcomes[1].failure.message


def test_truth_values_are_no_rewards_whatever_holds_them(requests):
    import torch

    for form in ([True, False, True], np.array([True, False, True]), torch.tensor([True, False, True])):
        outcomes = outcomes_for(requests, lambda n, form=form: RewardModelOutput(form))
        assert plain(outcomes) == ["failed"] * 3
        assert "bool where a number is needed" in outcomes[0].failure.message


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([1.0, 2.0], "2 rewards for 3 samples"),
        ([1.0] * 4, "4 rewards for 3 samples"),
        ([], "0 rewards for 3 samples"),
        (np.zeros((3, 1)), "shape (3, 1)"),
        (np.zeros((1, 3)), "shape (1, 3)"),
        (np.array(1.0), "shape ()"),
        (0.5, "a float"),
        (None, "a NoneType"),
        ("abc", "a str"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "a dict"),
        ((x for x in (1.0, 2.0, 3.0)), "a generator"),
    ],
)
def test_a_wrong_number_or_shape_is_a_reason_for_all(requests, rewards, words):
    outcomes = outcomes_for(requests, lambda n: RewardModelOutput(rewards))
    assert plain(outcomes) == ["failed"] * 3
    assert {o.failure.message for o in outcomes} == {outcomes[0].failure.message}
    assert words in outcomes[0].failure.message


def test_a_tensor_of_a_wrong_shape_is_a_reason_for_all(requests):
    import torch

    for form in (torch.zeros(3, 1), torch.tensor(1.0), torch.zeros(2)):
        outcomes = outcomes_for(requests, lambda n, form=form: RewardModelOutput(form))
        assert plain(outcomes) == ["failed"] * 3


def test_nothing_at_all_is_a_reason(requests):
    assert plain(outcomes_for(requests, lambda n: None)) == ["failed"] * 3


def test_a_sample_that_is_not_scored_says_why_and_keeps_its_information(requests):
    none = Unscored("unparsable", "no score in the answer", {"answer": "maybe"})
    outcomes = outcomes_for(requests, lambda n: RewardModelOutput([1.0, none, 2.0]))
    assert plain(outcomes) == [1.0, "unparsable", 2.0]
    assert outcomes[1].failure.message == "no score in the answer"
    assert outcomes[1].info["answer"] == "maybe"


class RaisesOn(PointwiseRewardModel):
    """Raises `error` if any prompt is in `bad`; else the prompt as a number. Notes the sizes of its calls."""

    required_fields = ("prompt", "image")
    bad: tuple[str, ...] = ()
    error: BaseException = ValueError("bad sample")

    def __call__(self, prompt, image=None, **kwargs):
        self.sizes = [*getattr(self, "sizes", []), len(prompt)]
        if set(prompt) & set(self.bad):
            raise self.error
        return RewardModelOutput([float(p) for p in prompt])


def raising(error: BaseException, *bad: str):
    return make(type("Raising", (RaisesOn,), {"bad": bad, "error": error}))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("bad sample"), "failed", "ValueError: bad sample"),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (MemoryError(), "failed", "MemoryError"),
        (RecursionError("deep"), "failed", "RecursionError: deep"),
        (TimeoutError("slow"), "timeout", "TimeoutError: slow"),
        (AssertionError(), "failed", "AssertionError"),
        (Unscored("abstained", "no opinion"), "abstained", "no opinion"),
        (Unscored("timeout", "too late", {"tries": 3}), "timeout", "too late"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_sample_that_makes_the_model_raise_fails_alone(requests, error, kind, words):
    model = raising(error, "3", "6")
    outcomes = run(model, numbered(requests, 8), requests.payloads)
    assert plain(outcomes) == [0.0, 1.0, 2.0, kind, 4.0, 5.0, kind, 7.0]
    assert words in outcomes[3].failure.message
    assert max(model.model.sizes) == 8


def test_a_keyboard_interrupt_in_a_model_is_a_reason_and_ends_no_thread(requests):
    outcomes = run(raising(KeyboardInterrupt(), "1"), numbered(requests, 3), requests.payloads)
    assert plain(outcomes)[1] == "failed"


def test_a_model_that_always_raises_fails_every_sample(requests):
    model = raising(RuntimeError("broken"), *map(str, range(5)))
    assert plain(run(model, numbered(requests, 5), requests.payloads)) == ["failed"] * 5


def test_batches_are_no_larger_than_the_batch_size(requests):
    model = raising(ValueError(), "none")
    run(model, numbered(requests, 10), requests.payloads, batch_size=4)
    assert model.model.sizes == [4, 4, 2]


def test_outcomes_come_batch_by_batch(requests):
    model = raising(ValueError(), "none")
    call = call_of(reward_model="tests.Mine", batch_size=2)
    batches = [len(o) for o in iter_run(model, call, numbered(requests, 5), requests.payloads)]
    assert batches == [2, 2, 1]


OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})
"""Named as torch's, which needs a GPU to be raised for real."""


class Fits(PointwiseRewardModel):
    """Has room for `options["room"]` samples."""

    required_fields = ("prompt", "image")

    def __call__(self, prompt, image=None, **kwargs):
        self.sizes = [*getattr(self, "sizes", []), len(prompt)]
        if len(prompt) > self.config.room:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return RewardModelOutput([float(p) for p in prompt])


def test_a_batch_too_large_for_the_device_is_halved_and_the_size_is_kept(requests):
    model = make(Fits, room=3)
    assert plain(run(model, numbered(requests, 8), requests.payloads, batch_size=8)) == list(map(float, range(8)))
    assert model.model.sizes == [8, 4, 2, 2, 2, 2]
    model.model.sizes = []
    run(model, numbered(requests, 4), requests.payloads, batch_size=8)
    assert model.model.sizes == [2, 2]


def test_the_size_that_fits_holds_for_the_rest_of_the_same_chunk(requests):
    model = make(Fits, room=2)
    run(model, numbered(requests, 12), requests.payloads, batch_size=4)
    assert model.model.sizes == [4, 2, 2, 2, 2, 2, 2]


def test_a_sample_too_large_for_the_device_fails_alone(requests):
    model = make(Fits, room=0)
    outcomes = run(model, numbered(requests, 2), requests.payloads)
    assert plain(outcomes) == ["failed", "failed"]
    assert "CUDA out of memory" in outcomes[0].failure.message


@pytest.mark.parametrize("num", [1, 8])
def test_a_sample_too_large_for_the_device_does_not_bound_the_batches_of_others(requests, num):
    class FitsButForOne(Fits):
        def __call__(self, prompt, image=None, **kwargs):
            if "0" in prompt:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 200 GiB")
            return super().__call__(prompt, image)

    model = make(FitsButForOne, room=4)
    outcomes = run(model, numbered(requests, num), requests.payloads)
    assert plain(outcomes) == ["failed", *map(float, range(1, num))]
    model.model.sizes = []
    assert plain(run(model, numbered(requests, 13)[1:], requests.payloads)) == list(map(float, range(1, 13)))
    assert model.model.sizes == [12, 6, 3, 3, 3, 3], "halved for what has no room, not to one"


def test_the_devices_memory_is_freed_once_the_failed_call_holds_none_any_more(requests, monkeypatch):
    """The error's traceback holds the frames of the failed forward, and with them its tensors."""
    import gc
    import weakref

    from workers.scoring import batches

    class Activations:
        pass

    alive = []

    class Greedy(Fits):
        def __call__(self, prompt, image=None, **kwargs):
            activations = Activations()
            alive.append(weakref.ref(activations))
            return super().__call__(prompt, image)

    seen = []
    monkeypatch.setattr(batches, "free_memory", lambda: seen.append([ref() is not None for ref in alive]))
    gc.disable()
    try:
        run(make(Greedy, room=1), numbered(requests, 2), requests.payloads)
    finally:
        gc.enable()
    assert seen == [[False]]


@pytest.mark.parametrize(("device", "asked"), [("cuda:3", "cuda:3"), ("cuda", "cuda"), ("", None), ("cpu", None)])
def test_after_an_error_the_workers_own_gpu_is_asked_whether_it_is_lost(requests, in_env, monkeypatch, device, asked):
    """Another one would answer that all is well, and a context there takes memory of the process it belongs to."""
    import torch

    seen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda which=None: seen.append((which, len(watching))))
    in_env(REWARDQ_DEVICE=device)
    runner, watching = watched()
    call = call_of(reward_model="tests.Mine")
    list(runner.run(raising(ValueError(), "0"), call, numbered(requests, 1), requests.payloads))
    assert seen == [(asked, 1)], "a GPU that hangs must not do so where nobody looks"


@pytest.mark.parametrize("message", ["\ud800", "x" * 100_000, "tab\0nul"])
def test_a_reason_of_any_text_can_be_written(requests, message):
    outcomes = run(raising(ValueError(message), "0"), numbered(requests, 2), requests.payloads)
    assert plain(outcomes) == ["failed", 1.0]
    assert len(outcomes[0].failure.message) < 3000
    assert unpack_outcome(pack_outcome(outcomes[0])).failure.kind == "failed"
    given = Unscored("invalid", message, {message: message})
    (outcome, _) = run(raising(given, "0"), numbered(requests, 2), requests.payloads)
    assert unpack_outcome(pack_outcome(outcome)).failure.kind == "invalid"


def test_information_that_is_a_list_of_the_samples_is_given_to_each(requests):
    values = {"text": ["a", "b", "c"], "score": np.array([1, 2, 3]), "aspects": ({"x": 1}, None, [1.5])}
    assert info_for(requests, values) == [
        {"text": "a", "score": 1, "aspects": {"x": 1}},
        {"text": "b", "score": 2, "aspects": None},
        {"text": "c", "score": 3, "aspects": [1.5]},
    ]


def test_information_that_is_one_value_is_given_to_all(requests):
    values = {"model": "v2", "scale": np.float32(0.5), "limits": [1, 2], "nothing": None, 7: {"deep": (1, 2)}}
    assert (
        info_for(requests, values)
        == [{"model": "v2", "scale": 0.5, "limits": [1, 2], "nothing": None, "7": {"deep": [1, 2]}}] * 3
    )


def test_information_in_tensors_becomes_plain(requests):
    import torch

    values = {
        "score": torch.tensor([1.5, 2.5, 3.5]),
        "embedding": torch.eye(3).bfloat16(),
        "temperature": torch.tensor(0.25),
        "of_one": [torch.tensor(1.0), torch.tensor([2.0]), torch.ones(1, 1)],
        "array": np.array(4),
    }
    infos = info_for(requests, values)
    assert [i["score"] for i in infos] == [1.5, 2.5, 3.5]
    assert infos[1]["embedding"] == [0.0, 1.0, 0.0]
    assert {i["temperature"] for i in infos} == {0.25}
    assert [i["of_one"] for i in infos] == [1.0, [2.0], [[1.0]]]
    assert {i["array"] for i in infos} == {4}


class Odd:
    """Has neither a plain form nor a short name."""

    def __repr__(self) -> str:
        return "odd \ud800 " + "x" * 10_000


class Hostile:
    """Has no words for itself."""

    def __repr__(self) -> str:
        raise RuntimeError("ask somebody else")


def cyclic() -> list:
    one: list = []
    one.append(one)
    return one


@pytest.mark.parametrize(
    "value",
    [Odd(), Hostile(), {1, 2}, 2**80, -(2**70), "\ud800", {"\udfff": 1}, np.datetime64("2026-01-01"), np.array([Odd()]),
     b"raw", math.nan, 1j, cyclic(), {("a", 1): 2}, range(4)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_information_of_any_kind_can_be_written_and_costs_no_reward(requests, value):
    (info, _) = info_for(requests, {"odd": [value, None]}, num=2)
    assert len(repr(info)) < 4000
    info_for(requests, {"odd": value}, num=2)


@pytest.mark.parametrize("extra_info", [["a", "b", "c"], "text", 5])
def test_information_of_another_form_costs_no_reward(requests, extra_info):
    assert len(info_for(requests, extra_info)) == 3


def test_rewards_are_read_under_the_watch_and_the_lock_of_the_call(requests):
    """A tensor on a GPU is computed by the time it is read: one that never is must not hang where nobody looks."""
    seen = []

    class OnDevice(np.ndarray):
        """Stands in for such a tensor."""

        def tolist(self):
            seen.append((len(watching), model.lock.locked()))
            return super().tolist()

    model = make(returning(lambda n: np.ones(n).view(OnDevice)))
    runner, watching = watched()
    call = call_of(reward_model="tests.Mine")
    (outcomes,) = runner.run(model, call, numbered(requests, 3), requests.payloads)
    assert plain(outcomes.values()) == [1.0] * 3
    assert seen == [(1, True)]


def test_an_outcome_says_what_it_was_computed_with(requests):
    (outcome,) = outcomes_for(requests, lambda n: [1.0], num=1)
    assert outcome.origin["versions"]["pillow"]
    assert outcome.origin["decode_s"] >= 0
    assert outcome.origin["score_s"] >= 0


def test_an_outcome_says_which_device_a_model_of_one_uses(requests):
    """A worker whose GPU is gone computes on the CPU, unless told: slow, and nowhere else to be seen."""

    class OnDevice(PointwiseRewardModel):
        def __call__(self, prompt, image=None, **kwargs):
            return [float(self.device.type == "cpu")] * len(prompt)

    (outcome,) = run(make(OnDevice), numbered(requests, 1), requests.payloads)
    assert (outcome.reward, outcome.origin["device"]) == (1.0, "cpu")
    (outcome,) = outcomes_for(requests, lambda n: [1.0], num=1)
    assert "device" not in outcome.origin


class Sees(PointwiseRewardModel):
    """Keeps what it is called with."""

    def __call__(self, prompt, **fields):
        self.seen = {"prompt": prompt, **fields}
        return RewardModelOutput([0.0] * len(prompt))


def seen_by(requests, samples, **attributes) -> dict:
    model = make(type("Seeing", (Sees,), attributes))
    outcomes = run(model, samples, requests.payloads)
    assert plain(outcomes) == [0.0] * len(samples), outcomes[0].failure
    return model.model.seen


IMAGES = [RNG.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((4, 5), (4, 5), (6, 3))]
VIDEOS = [RNG.integers(0, 256, (t, h, w, 3), np.uint8) for t, h, w in ((2, 4, 5), (2, 4, 5), (3, 2, 2))]
ALL = {
    "image": IMAGES[0],
    "video": VIDEOS[0],
    "audio": np.float32([[0.5, -0.5]]),
    "condition_images": [IMAGES[1], IMAGES[2]],
    "condition_videos": [VIDEOS[1]],
}


def test_only_declared_fields_reach_the_model(requests):
    sample = requests.sample(prompt="p", metadata={"text": "x"}, **ALL)
    assert set(seen_by(requests, [sample], required_fields=("prompt",))) == {"prompt"}
    assert set(seen_by(requests, [sample], required_fields=("image",))) == {"prompt", "image"}
    declared = {"required_fields": ("video", "condition_images"), "optional_fields": ("metadata", "audio")}
    assert set(seen_by(requests, [sample], **declared)) == {"prompt", *declared["required_fields"], "metadata", "audio"}


def test_images_arrive_as_pil_images_of_the_same_pixels(requests):
    samples = [requests.sample(prompt=str(i), image=image) for i, image in enumerate(IMAGES)]
    seen = seen_by(requests, samples, required_fields=("prompt", "image"))
    assert seen["prompt"] == ["0", "1", "2"]
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in seen["image"])
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(seen["image"], IMAGES, strict=True))


def test_every_field_arrives_in_its_pil_form(requests):
    sample = requests.sample(metadata={"text": "x", "list": [1]}, **ALL)
    seen = seen_by(requests, [sample], required_fields=(), optional_fields=(*ALL, "metadata"))
    assert [np.asarray(f).tolist() for f in seen["video"][0]] == VIDEOS[0].tolist()
    assert [np.asarray(f).tolist() for f in seen["condition_images"][0]] == [IMAGES[1].tolist(), IMAGES[2].tolist()]
    assert [np.asarray(f).tolist() for f in seen["condition_videos"][0][0]] == VIDEOS[1].tolist()
    assert np.asarray(seen["audio"][0]).tolist() == [[0.5, -0.5]]
    assert not seen["audio"][0].flags.writeable, "samples of equal audio share it"
    assert seen["metadata"] == [{"text": "x", "list": [1]}]


def test_a_field_that_no_sample_has_is_none_and_one_that_some_lack_has_gaps(requests):
    samples = [requests.sample(image=IMAGES[0]), requests.sample(video=VIDEOS[0])]
    seen = seen_by(requests, samples, required_fields=(), optional_fields=("image", "video", "condition_images"))
    assert [v is None for v in seen["image"]] == [False, True]
    assert [v is None for v in seen["video"]] == [True, False]
    assert seen["condition_images"] is None


def test_tensors_have_the_documented_shapes_and_values(requests):
    import torch

    same = {**ALL, "condition_images": [IMAGES[0], IMAGES[1]], "condition_videos": [VIDEOS[0], VIDEOS[1]]}
    samples = [requests.sample(**same), requests.sample(**{**same, "image": IMAGES[2]})]
    seen = seen_by(requests, samples, required_fields=(), optional_fields=tuple(same), use_tensor_inputs=True)
    assert [tuple(t.shape) for t in seen["image"]] == [(3, 4, 5), (3, 6, 3)]
    assert tuple(seen["video"][0].shape) == (2, 3, 4, 5)
    assert tuple(seen["condition_images"][0].shape) == (2, 3, 4, 5)
    assert tuple(seen["condition_videos"][0].shape) == (2, 2, 3, 4, 5)
    assert seen["image"][0].dtype == torch.float32
    assert torch.allclose(seen["image"][0].permute(1, 2, 0) * 255, torch.from_numpy(IMAGES[0].copy()).float())
    expected = torch.from_numpy(np.stack([VIDEOS[0], VIDEOS[1]])).permute(0, 1, 4, 2, 3) / 255
    assert torch.allclose(seen["condition_videos"][0], expected)


def test_conditions_of_several_sizes_arrive_as_lists_of_tensors(requests):
    sample = requests.sample(condition_images=[IMAGES[0], IMAGES[2]], condition_videos=[VIDEOS[0], VIDEOS[2]])
    fields = ("condition_images", "condition_videos")
    seen = seen_by(requests, [sample], required_fields=fields, use_tensor_inputs=True)
    assert [tuple(t.shape) for t in seen["condition_images"][0]] == [(3, 4, 5), (3, 6, 3)]
    assert [tuple(t.shape) for t in seen["condition_videos"][0]] == [(2, 3, 4, 5), (3, 3, 2, 2)]


def test_no_conditions_arrive_as_an_empty_list(requests):
    samples = [requests.sample(condition_images=[]), requests.sample(condition_images=[IMAGES[0]])]
    for as_tensor in (False, True):
        fields = {"required_fields": (), "optional_fields": ("condition_images",), "use_tensor_inputs": as_tensor}
        assert len(seen_by(requests, samples, **fields)["condition_images"][0]) == 0


def test_jpeg_payloads_arrive_as_pixels(requests):
    smooth = np.linspace(0, 255, 32 * 24 * 3).reshape(32, 24, 3).astype(np.uint8)
    sample = requests.sample(kind="jpeg", image=smooth, video=np.stack([smooth, smooth[::-1]]))
    seen = seen_by(requests, [sample], required_fields=("image", "video"))
    assert np.abs(np.asarray(seen["image"][0]).astype(int) - smooth).mean() < 2
    assert np.abs(np.asarray(seen["video"][0][1]).astype(int) - smooth[::-1]).mean() < 2


def test_a_model_may_change_what_it_is_given(requests):

    class Rude(PointwiseRewardModel):
        required_fields = ("image",)
        use_tensor_inputs = True

        def __call__(self, prompt, image=None, **kwargs):
            for one in image:
                one.mul_(0)
            return [float(one.sum()) for one in image]

    sample = requests.sample(image=IMAGES[0])
    assert plain(run(make(Rude), [sample], requests.payloads)) == [0.0]
    assert requests.payloads["c.0"] == IMAGES[0].tobytes()


def test_a_field_that_a_sample_lacks_is_none_to_a_class_of_the_users_and_one_without_any_media_fails_alone(requests):
    class Edits(PointwiseRewardModel):
        required_fields = ("prompt", "image", "condition_images")

        def __call__(self, prompt, image=None, condition_images=None, **kwargs):
            pairs = zip(image, condition_images or [None] * len(image), strict=True)
            return [float(i is not None) + 2.0 * (c is not None) for i, c in pairs]

    samples = [
        requests.sample(image=IMAGES[0], condition_images=[IMAGES[1]]),
        requests.sample(condition_images=[IMAGES[1]]),
        requests.sample(),
        requests.sample(image=IMAGES[0]),
    ]
    outcomes = run(make(Edits), samples, requests.payloads)
    assert plain(outcomes) == [3.0, 2.0, "invalid", 1.0]
    assert "needs image or condition_images, which the sample has not" in outcomes[2].failure.message


def test_a_payload_that_cannot_be_decoded_is_a_reason_for_its_sample_alone(requests):
    samples = [requests.sample(prompt=str(i), image=IMAGES[0], kind=k) for i, k in enumerate(("raw", "raw", "jpeg"))]
    requests.payloads["c.1"] = b"of another length"
    requests.payloads["c.2"] = b"\0\0\0\x04junk"
    model = raising(ValueError(), "none")
    outcomes = run(model, [*samples, requests.sample(prompt="3", image=IMAGES[0])], requests.payloads)
    assert plain(outcomes) == [0.0, "failed", "failed", 3.0]
    assert "cannot be decoded" in outcomes[1].failure.message


@pytest.mark.parametrize(("thread_safe", "most"), [(False, 1), (True, 4)])
def test_a_model_is_called_by_one_thread_at_a_time_unless_it_is_thread_safe(requests, thread_safe, most):
    lock, together, inside, found = threading.Lock(), threading.Barrier(most), [], []

    class Meets(PointwiseRewardModel):
        """Notes how many threads are inside at once; waits for as many as may be."""

        required_fields = ("prompt",)

        def __call__(self, prompt, **kwargs):
            with lock:
                inside.append(prompt)
                found.append(len(inside))
            together.wait(30)
            time.sleep(0.05)
            with lock:
                inside.remove(prompt)
            return [0.0] * len(prompt)

    Meets.thread_safe = thread_safe
    model = make(Meets)
    samples = [requests.sample() for _ in range(4)]
    threads = [threading.Thread(target=run, args=(model, [s], requests.payloads)) for s in samples]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert max(found) == most
