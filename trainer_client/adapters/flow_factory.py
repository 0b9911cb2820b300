"""Flow-Factory's trainer on a client: its reward buffer, its advantages with masks, and a reward model of its kind.

"They" and "theirs" are Flow-Factory's trainer and its classes.
"""

from __future__ import annotations

import sys
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tasks.errors import CollectTimeoutError, ConfigError, ScoringError
from tasks.rewards import OnFailure, RewardConfig, Split
from tasks.samples import Sample
from tasks.settings import load_settings
from trainer_client.adapters.flow_factory_samples import metadata_of, sample_of
from trainer_client.advantages.formulas import gdpo, weighted_sum
from trainer_client.advantages.metrics import Detail
from trainer_client.client import COLLECT_TIMEOUT_S, RewardClient
from trainer_client.results import RewardBatch

ModelKind = Literal["pointwise", "groupwise", "all"]


class RewardBuffer:
    """Replaces their `RewardBuffer`: workers compute rewards while the trainer samples.

        trainer.reward_buffer = RewardBuffer(client, group_size)
        trainer.eval_reward_buffer = RewardBuffer(client, 1, split="eval")

    Each `finalize()` after new samples is one step of the client. No other buffer of this split may use the client. On
    several ranks every `finalize()` is a step, also on a rank without samples: call `finalize()` and `clear()` on all
    ranks.

    Args:
        group_size: Samples of one prompt, over all ranks; for groupwise rewards. With 1 each sample is a group of its
            own, also where a prompt comes twice: a loader fills up short ranks with samples that other ranks have too.
        split: `eval` for the rewards of evaluation.
        timeout_s: Of `collect()` in `finalize()`.
        on_failure: `raise`, or `nan`: a single NaN makes all of their own advantages NaN; `aggregation` masks it.
    """

    def __init__(
        self,
        client: RewardClient,
        group_size: int | None = None,
        *,
        split: Split = "train",
        timeout_s: float = COLLECT_TIMEOUT_S,
        on_failure: OnFailure = "raise",
    ) -> None:
        self.client = client
        self.group_size = group_size
        self.split: Split = split
        self.timeout_s = timeout_s
        self.on_failure: OnFailure = on_failure
        self.all_samples: list[Any] = []
        self.batches: list[RewardBatch] = []
        """What was collected since `clear()`, for metrics and for the reasons of failures."""
        self._step = 0
        self._is_open = False
        """Whether the client may have this step open."""
        self._failed: ScoringError | None = None
        """Why `finalize()` raised: the samples of that step have no rewards, so later calls raise it again."""
        self._num_added = 0
        """Samples of this rank, ever."""

    def add_samples(self, samples: Sequence[Any]) -> None:
        """Submit samples (theirs) and return at once."""
        ours = list(map(sample_of, samples))
        if self.group_size == 1:
            for i, sample in enumerate(ours, self._num_added):
                sample.group = f"{self.client.rank}.{i}"
        self._is_open = True
        self.client.submit(ours, self._size_needed(), split=self.split, step=self._step)
        self.all_samples.extend(samples)
        self._num_added += len(samples)

    def finalize(
        self, store_to_samples: bool = True, split: ModelKind = "all"
    ) -> dict[str, Any]:
        """The rewards of all samples since `clear()`: by name, float32 CPU tensors `(N,)`.

        Args:
            store_to_samples: Also put them into each sample's `extra_kwargs["rewards"]`.
            split: The kind of reward models whose rewards are returned; all are computed in any case.

        Raises:
            ScoringError: Some samples have no reward, and `on_failure` is `raise`, or they are more than the client's
                `max_failure_rate` allows; carries the batch. Raised again until `clear()`.
        """
        if self._failed is not None:
            raise self._failed
        if self._is_open or self.client.world_size > 1:
            self._collect()

        rewards = {}
        for spec in self.client.config.of(self.split):
            kind = "groupwise" if spec.is_groupwise else "pointwise"
            if split in ("all", kind):
                rewards[spec.name] = self._tensor_of(spec.name)
        if store_to_samples:
            for i, sample in enumerate(self.all_samples):
                own = {name: values[i] for name, values in rewards.items()}
                sample.extra_kwargs["rewards"] = own
        return rewards

    def _tensor_of(self, reward: str) -> Any:
        """One reward of all samples since `clear()`, float32 `(N,)`."""
        import torch

        parts = [np.zeros(0, np.float32)]
        for batch in self.batches:
            parts.append(batch.rewards[reward])
        return torch.from_numpy(np.concatenate(parts))

    def clear(self) -> None:
        """Start over for the next epoch; what was submitted and not collected is given up."""
        if self._is_open:
            self.client.cancel(self.split)
        self._next_step()  # also where nothing is open: steps are numbered alike on all ranks
        self.all_samples, self.batches, self._failed = [], [], None

    def metrics(self, *, detail: Detail = "full") -> dict[str, float]:
        """Metrics of what the last `finalize()` collected, over all ranks, for their `log_data`; empty before it.

        Under their names, `<split>/reward_<name>_mean` and so on; `<split>/adv_*` once samples have their advantages.
        `brief` is a shorter form, see `trainer_client.advantages.metrics`. Call it on all ranks.
        """
        if not self.batches:
            return {}
        batch = self.batches[-1]
        first = len(self.all_samples) - len(batch)
        advantages = []
        for sample in self.all_samples[first:]:
            if "advantage" in sample.extra_kwargs:
                advantages.append(float(sample.extra_kwargs["advantage"]))
        has_all = len(advantages) == len(batch)
        return self.client.metrics(
            batch, advantages if has_all else None, detail=detail
        )

    def shutdown(self, wait: bool = False, cancel_futures: bool = True) -> None:
        """Close the client. Never waits for workers; the arguments are those of their buffer."""
        self.client.close()

    def _collect(self) -> None:
        self._is_open = True
        try:
            batch = self.client.collect(
                self.timeout_s,
                on_failure=self.on_failure,
                split=self.split,
                step=self._step,
                max_failure_rate=self.client.max_failure_rate,
            )
        except CollectTimeoutError:
            raise  # the step is still open: finalize() again, or clear()
        except ScoringError as error:
            self._failed = error
            self._next_step()
            raise
        self.batches.append(batch)
        self._next_step()

    def _size_needed(self) -> int | None:
        """The size of groups if a reward compares their members.

        Otherwise groups may have any size: a data set may have a prompt twice, and in their trainer the samples of both
        are one group.
        """
        is_needed = any(spec.is_groupwise for spec in self.client.config.of(self.split))
        return self.group_size if is_needed else None

    def _next_step(self) -> None:
        self._step, self._is_open = self._step + 1, False


def aggregation(
    method: Literal["gdpo", "sum"] = "gdpo", *, noise_floor: bool = True
) -> Callable[..., Any]:
    """A function for their `compute_advantages`: advantages that mask samples without a reward.

        trainer.training_args.advantage_aggregation = aggregation("gdpo")

    Weights and `global_std` are the trainer's; statistics are exact over all its ranks. Their `compute_advantages`
    computes no metrics if it is given a function: log `RewardBuffer.metrics()`.
    """

    def aggregate(
        processor: Any,
        samples: Sequence[Any],
        rewards: Mapping[str, Any],
        store_to_samples: bool,
    ) -> Any:
        import torch

        gather = _gather if processor.accelerator.num_processes > 1 else None
        weights = {name: processor.reward_weights[name] for name in rewards}
        groups = [sample.unique_id for sample in samples]
        if method == "gdpo":
            found = gdpo(
                rewards, groups, weights, gather=gather, noise_floor=noise_floor
            )
        else:
            found = weighted_sum(
                rewards,
                groups,
                weights,
                global_std=processor.global_std,
                gather=gather,
                noise_floor=noise_floor,
            )
        advantages = torch.from_numpy(found).to(processor.accelerator.device)
        if store_to_samples:
            for sample, advantage in zip(samples, advantages, strict=True):
                sample.extra_kwargs["advantage"] = advantage
        return advantages

    return aggregate


@dataclass(frozen=True, slots=True)
class Output:
    """What a reward model returns, as far as their processor reads it."""

    rewards: Any
    extra_info: dict[str, Any] | None = None


class QueuedRewardModel:
    """A reward model for their unmodified trainer; our workers score.

        rewards:
          - name: text
            reward_model: trainer_client.adapters.flow_factory.QueuedRewardModel
            model: OCR              # ours, with its options beside it
            run: flux-ocr-7
            batch_size: 16
            async_reward: true
            num_workers: 8          # batches in flight

    It is pointwise and sees what their processor passes: prompt, media with their rates, the row of the data set as
    metadata. Their trainer has no masks. So a sample without a reward raises, on its rank alone, unless
    `on_failure: {value: x}` gives the sample a number. Each instance is a launch of its own: instances share no rewards
    of a class of yours without `version`.
    """

    required_fields: tuple[str, ...] = ("prompt",)
    use_tensor_inputs = True

    def __init__(self, config: Any, accelerator: Any) -> None:
        import torch

        parsed, run = _config_of(config)
        _count_as_theirs(type(self))
        self.config, self.accelerator = config, accelerator
        self.device = torch.device("cpu")  # media come here on their way to the workers
        self.dtype = config.dtype
        self.model = None
        self._name = config.name
        # A launch in the environment is that of all ranks and rewards; this client is one of many, each with rank 0.
        # Its batches are a few samples, and a single failure may be more than half of them.
        self.client = RewardClient(
            parsed,
            run,
            launch=uuid.uuid4().hex,
            settings=load_settings(),
            max_failure_rate=1.0,
        )
        weakref.finalize(self, self.client.close)

    def to(self, device: Any) -> QueuedRewardModel:
        """Returns itself: the model is in a worker."""
        return self

    def __call__(  # noqa: PLR0913  (their signature)
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        audio: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
        metadata: Any = None,
        frame_rate: Any = None,
        audio_sample_rate: Any = None,
    ) -> Output:
        """The rewards of a batch, float32 `(batch_size,)`; called by several threads at once.

        Raises:
            ScoringError: Some samples have no reward; names the reasons.
        """
        fields = {
            "image": image,
            "video": video,
            "audio": audio,
            "condition_images": _lists_of(condition_images),
            "condition_videos": _lists_of(condition_videos),
            "metadata": _rows_of(metadata),
            "fps": frame_rate,
            "sample_rate": audio_sample_rate,
        }
        given = {name: values for name, values in fields.items() if values is not None}
        samples = []
        for i, text in enumerate(prompt):
            own = {name: values[i] for name, values in given.items()}
            # Nobody compares samples here. With a group of its own, a sample is spared a pass over its condition media.
            samples.append(Sample(prompt=text, group=uuid.uuid4().hex, **own))
        batch = self.client.collect(ticket=self.client.submit(samples), progress=False)
        return Output(batch.to_torch()[self._name])


def _config_of(theirs: Any) -> tuple[RewardConfig, str]:
    """The reward that one of their reward configs names in its options, and the run.

    Raises:
        ConfigError: It names no model or run, or a reward that their trainer cannot use.
    """
    options = dict(theirs.extra_kwargs)
    model, run = options.pop("model", None), options.pop("run", None)
    if not model or not run:
        raise ConfigError(
            f"reward {theirs.name!r}: QueuedRewardModel needs model: and run:"
        )
    reward = {
        "name": theirs.name,
        "reward_model": model,
        "dtype": str(theirs.dtype),
        **options,
        "batch_size": theirs.batch_size,
    }
    config = RewardConfig.from_dict({"rewards": reward})
    if config.rewards[0].on_failure == "nan":
        raise ConfigError(
            f"reward {theirs.name!r}: one NaN makes their advantages NaN; use on_failure: {{value: x}}, or "
            "RewardBuffer with aggregation"
        )
    if config.rewards[0].is_groupwise:
        raise ConfigError(
            f"reward {theirs.name!r}: {model} compares a whole group; use RewardBuffer"
        )
    return config, run


def _lists_of(conditions: Any) -> list[list[Any]] | None:
    return None if conditions is None else list(map(list, conditions))


def _rows_of(metadata: Any) -> list[dict[str, Any]] | None:
    if metadata is None:
        return None
    return [metadata_of({"metadata": row}) for row in metadata]


def _count_as_theirs(ours: type) -> None:
    """Their processor asks `isinstance(model, PointwiseRewardModel)`; theirs is an abstract base class."""
    abc = sys.modules.get("flow_factory.rewards.abc")
    if abc is not None:
        abc.PointwiseRewardModel.register(ours)


def _gather(mine: Any) -> Sequence[Any]:
    from accelerate.utils import gather_object

    return list(gather_object([mine]))
