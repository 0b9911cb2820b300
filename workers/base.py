"""What a reward model is: the classes to subclass, what they are given, and what they return."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from tasks.errors import FailureKind
from workers import deadline


class Unscored(Exception):  # noqa: N818  (a reason, raised or returned; not always an error)
    """Why a sample has no reward. Raise it when called with one sample, or return it instead of a number.

    Args:
        kind: `failed`, `timeout`, `unparsable`, `invalid` or `abstained`.
        message: What was found and what was needed. It reaches the trainer.
        info: What is kept beside the reason, for example a judge's text.
    """

    def __init__(
        self, kind: FailureKind, message: str, info: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(kind, message, info)
        self.kind, self.message, self.info = kind, message, dict(info or {})

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class RewardModelOutput:
    """What a call returns.

    Attributes:
        rewards: One finite number for each sample, in order: a tensor or array `(N,)` or a list. In a list an
            `Unscored` says why a sample has no reward, and a `BusyError` that the sample is to be sent again.
        extra_info: By name, a list of `N` values, or one value for all samples. Numbers, texts, lists and mappings.
    """

    rewards: Any
    extra_info: Mapping[str, Any] | None = None


_TRAINERS = ("weight", "async_reward", "num_workers")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Stands in for `accelerate.Accelerator`: one process that knows its device."""

    device_name: str = ""
    process_index: int = 0
    local_process_index: int = 0
    num_processes: int = 1
    is_main_process: bool = True
    is_local_main_process: bool = True

    @property
    def device(self) -> Any:
        """A `torch.device`: REWARDQ_DEVICE, else cuda if there is one, else the CPU."""
        return _device(self.device_name)

    def prepare(self, *objects: Any) -> Any:
        """The objects as they are."""
        return objects[0] if len(objects) == 1 else objects

    def wait_for_everyone(self) -> None:
        """There is nobody else."""


@dataclass(frozen=True)
class RewardArguments:
    """Stands in for Flow-Factory's `RewardArguments`: one reward's configuration.

    Further keys of the YAML are in `extra_kwargs`, and attributes as well. What only the trainer needs (`weight`,
    `async_reward`, `num_workers`) does not reach a worker: these raise AttributeError, so that
    `getattr(config, "weight", 1.0)` works.
    """

    name: str = ""
    reward_model: str = ""
    batch_size: int = 16
    dtype_name: str = "bfloat16"
    device_name: str = ""
    timeout_s: float = 600.0
    image_format: str = "raw"
    extra_kwargs: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def dtype(self) -> Any:
        """The `torch.dtype`."""
        import torch

        return getattr(torch, self.dtype_name)

    @cached_property
    def device(self) -> Any:
        """The `torch.device` to compute on, the same as the accelerator's. The worker's REWARDQ_DEVICE decides, not
        `device` in the YAML."""
        return _device(self.device_name)

    def __getattr__(self, name: str) -> Any:
        given = self.__dict__.get("extra_kwargs", {})  # absent while it is being copied
        if name in given:
            return given[name]
        if name in _TRAINERS:
            raise AttributeError(
                f"{name} is the trainer's and reaches no worker: rewards that differ in it are one computation"
            )
        raise AttributeError(
            f"this reward has no option {name!r}; given: {sorted(given)}"
        )


class RewardModel:
    """Base of all reward models; subclass one of the two below.

    `config` is the reward's configuration and `accelerator` knows the device, as in Flow-Factory.
    """

    required_fields: ClassVar[tuple[str, ...]] = ("prompt", "image")
    """Fields of a sample that reach `__call__`, as in Flow-Factory. A field that a sample lacks is None.

    A sample without any of the declared media is refused. A class that needs a field which a sample lacks returns
    `Unscored("invalid", ...)` instead of the reward. Besides these fields travel the prompt, `fps` with a video and
    `sample_rate` with audio. `metadata`, `fps` and `sample_rate` travel also if `__call__` has an argument of that
    name, or looks it up in its `**kwargs` (`kwargs["metadata"]`)."""
    optional_fields: ClassVar[tuple[str, ...]] = ()
    """More of the same. A required field that a sample lacks is refused only by the classes of this package."""
    use_tensor_inputs: ClassVar[bool] = False
    """Media as torch tensors in [0, 1] instead of PIL images."""
    thread_safe: ClassVar[bool] = False
    """Whether several threads may call it at once. A judge may be: it waits on the network. A local model may be if it
    preprocesses outside and holds `self.forward()` around what one thread at a time may do."""
    asks_servers: ClassVar[bool] = False
    """Whether `warm_up()` asks a server. A worker starts though that server does not answer yet."""

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self._forward_lock = threading.Lock()

    def admit(self) -> None:
        """Raise `BusyError` if the model cannot be called now. A task asks before it claims, so it must be quick."""

    def warm_up(self) -> None:
        """Make the first call as fast as the next ones. A worker calls it once, when it preloads the model."""

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Held around the forward of a thread-safe local model: one thread computes while others preprocess.

        In a worker no time of `timeout_s` passes while a thread waits for another one's forward.
        """
        with deadline.paused(waits_for_model=True):
            self._forward_lock.acquire()
        try:
            yield
        finally:
            self._forward_lock.release()

    @cached_property
    def device(self) -> Any:
        """`torch.device` to compute on, the accelerator's; a class may set another, as in Flow-Factory."""
        return self.accelerator.device

    @cached_property
    def dtype(self) -> Any:
        """`torch.dtype` that the config asks for; a class may set another, as in Flow-Factory."""
        return self.config.dtype


@dataclass(frozen=True, slots=True)
class Inputs:
    """The arguments of one call of a reward model; see `PointwiseRewardModel.__call__` for what each holds."""

    prompt: Sequence[str]
    image: Sequence[Any] | None
    video: Sequence[Any] | None
    condition_images: Sequence[Any] | None
    condition_videos: Sequence[Any] | None
    others: Mapping[str, Any]
    """By name, what the call was given besides: `metadata`, `audio`, `fps`, `sample_rate`."""

    def frames(self) -> list[list[Any]]:
        """The frames of each sample: those of its video, else its one image."""
        num_samples = len(self.prompt)
        images = self.image or [None] * num_samples
        videos = self.video or [None] * num_samples
        frames = []
        for image, video in zip(images, videos, strict=True):
            frames.append(list(video) if video is not None else [image])
        return frames


class PointwiseRewardModel(RewardModel):
    """Scores each sample by itself; called with up to `config.batch_size` samples."""

    def __call__(
        self,
        prompt: Sequence[str],
        image: Sequence[Any] | None = None,
        video: Sequence[Any] | None = None,
        condition_images: Sequence[Any] | None = None,
        condition_videos: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> RewardModelOutput:
        """Rewards of `N` samples.

        Args:
            prompt: `N` texts.
            image: `N` PIL images (or tensors `(3, H, W)`); None where not declared or not given.
            video: `N` lists of PIL images (or tensors `(T, 3, H, W)`).
            condition_images: `N` lists of PIL images (or tensors `(K, 3, H, W)`, lists of tensors if sizes differ).
            condition_videos: `N` lists of videos (or tensors `(K, T, 3, H, W)`, lists of tensors if sizes differ).
            **kwargs: `audio` (arrays `(C, T)`, or tensors), `metadata` (mappings), `fps` and `sample_rate` (numbers,
                None for a sample without), lists of `N`, where declared or named. A call gets only what it has an
                argument for.
        """
        return self.score_inputs(
            Inputs(
                prompt, image, video, condition_images, condition_videos, others=kwargs
            )
        )

    def score_inputs(self, inputs: Inputs) -> RewardModelOutput:
        """The same for a class of this package, which overrides this method and leaves `__call__` as it is here."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__ of its own")


class GroupwiseRewardModel(PointwiseRewardModel):
    """Scores the samples of one prompt against each other; called once with the whole group."""


def _device(name: str) -> Any:
    """The `torch.device` of this name; of none, cuda if there is one, else the CPU."""
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
