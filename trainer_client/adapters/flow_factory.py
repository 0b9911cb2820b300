"""Flow-Factory's trainer on a client: its reward buffer, its advantages with masks, and a reward model of its kind."""

from __future__ import annotations

import functools
import json
import logging
import math
import numbers
import sys
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tasks.errors import CollectTimeoutError, ConfigError, ScoringError
from tasks.rewards import RewardConfig, Split
from tasks.samples import Sample
from tasks.settings import load_settings
from trainer_client.advantages.formulas import gdpo, weighted_sum
from trainer_client.advantages.metrics import Detail
from trainer_client.client import COLLECT_TIMEOUT_S, RewardClient
from trainer_client.ranks.verdict import OnFailure
from trainer_client.results import RewardBatch

log = logging.getLogger(__name__)

Kind = Literal["pointwise", "groupwise", "all"]

_THEIRS = ("rewards", "advantage")
"""What their trainer itself leaves in a sample's `extra_kwargs`."""


class RewardBuffer:
    """In the place of their `RewardBuffer`: rewards are computed by workers while the trainer samples.

        trainer.reward_buffer = RewardBuffer(client, group_size)
        trainer.eval_reward_buffer = RewardBuffer(client, 1, split="eval")

    Each `finalize()` after new samples is one step of the client, which serves this buffer of its split alone. On
    several ranks every `finalize()` is, also on a rank without samples: call it, and `clear()`, on all of them.

    Args:
        group_size: Samples of one prompt, over all ranks; for groupwise rewards. With 1 each sample is a group of its
            own, also where a prompt comes twice: a loader gives short ranks samples again that others have.
        split: `eval` for the rewards of evaluation.
        timeout_s: Of `collect()` in `finalize()`.
        on_failure: `raise`, or `nan`: their own advantages turn NaN by a single one; `aggregation` masks it.
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
        """Why `finalize()` raised; its samples have no place in what later ones return."""
        self._num_added = 0
        """Samples of this rank, ever."""

    def add_samples(self, samples: Sequence[Any]) -> None:
        """Submit samples (theirs) and return at once."""
        ours = [sample_of(sample) for sample in samples]
        if self.group_size == 1:
            for i, sample in enumerate(ours, self._num_added):
                sample.group = f"{self.client.rank}.{i}"
        self._is_open = True
        self.client.submit(ours, self._size_needed(), split=self.split, step=self._step)
        self.all_samples.extend(samples)
        self._num_added += len(samples)

    def finalize(
        self, store_to_samples: bool = True, split: Kind = "all"
    ) -> dict[str, Any]:
        """The rewards of all samples since `clear()`: by name, float32 CPU tensors `(N,)`.

        Args:
            store_to_samples: Also put them into each sample's `extra_kwargs["rewards"]`.
            split: Rewards of which kind of model; all are computed in any case.

        Raises:
            ScoringError: Some samples have no reward, and `on_failure` is `raise`, or more of them than the client's
                `max_failure_rate`; carries the batch. Raised again until `clear()`.
        """
        import torch

        if self._failed is not None:
            raise self._failed
        if self._is_open or self.client.world_size > 1:
            self._collect()
        rewards = {
            spec.name: torch.from_numpy(
                np.concatenate(
                    [
                        np.zeros(0, np.float32),
                        *(batch.rewards[spec.name] for batch in self.batches),
                    ]
                )
            )
            for spec in self.client.config.of(self.split)
            if split == "all" or spec.is_groupwise == (split == "groupwise")
        }
        if store_to_samples:
            for i, sample in enumerate(self.all_samples):
                sample.extra_kwargs["rewards"] = {
                    name: values[i] for name, values in rewards.items()
                }
        return rewards

    def clear(self) -> None:
        """Start over for the next epoch; what was submitted and not collected is given up."""
        if self._is_open:
            self.client.cancel(self.split)
        self._next_step()  # also where nothing is open: steps are numbered alike on all ranks
        self.all_samples, self.batches, self._failed = [], [], None

    def metrics(self, *, detail: Detail = "full") -> dict[str, float]:
        """Of what the last `finalize()` collected, over all ranks, for their `log_data`; empty before it.

        Under their names, `<split>/reward_<name>_mean` and so on; `<split>/adv_*` once samples have their advantages.
        `brief` is a shorter form, see `trainer_client.advantages.metrics`. Call it on all ranks.
        """
        if not self.batches:
            return {}
        batch = self.batches[-1]
        theirs = [
            sample.extra_kwargs
            for sample in self.all_samples[len(self.all_samples) - len(batch) :]
        ]
        has_advantages = all("advantage" in extra for extra in theirs)
        advantages = (
            [float(extra["advantage"]) for extra in theirs] if has_advantages else None
        )
        return self.client.metrics(batch, advantages, detail=detail)

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
        """The size of groups where rewards compare their members. Elsewhere it is free: a data set may have a prompt
        twice, whose samples are one group in their trainer."""
        is_needed = any(spec.is_groupwise for spec in self.client.config.of(self.split))
        return self.group_size if is_needed else None

    def _next_step(self) -> None:
        self._step, self._is_open = self._step + 1, False


def sample_of(theirs: Any) -> Sample:
    """Our sample of one of theirs; its group is the `unique_id`, its metadata what is plain data in `extra_kwargs`.

    The row of the data set, which is there as one JSON text (or mapping) under `metadata`, is laid out: its own keys
    are keys of ours, and go before others of the same name.
    """
    return Sample(
        prompt=theirs.prompt or "",
        image=theirs.image,
        video=theirs.video,
        audio=getattr(theirs, "audio", None),
        condition_images=_listed(getattr(theirs, "condition_images", None)),
        condition_videos=_listed(getattr(theirs, "condition_videos", None)),
        group=theirs.unique_id,
        metadata=_metadata_of(theirs.extra_kwargs),
        fps=_number(theirs, "frame_rate") or _number(theirs, "fps"),
        sample_rate=_number(theirs, "audio_sample_rate"),
    )


def aggregation(
    method: Literal["gdpo", "sum"] = "gdpo", *, noise_floor: bool = True
) -> Callable[..., Any]:
    """Advantages that mask samples without a reward, as a function that their `compute_advantages` takes.

        trainer.training_args.advantage_aggregation = aggregation("gdpo")

    Weights and `global_std` are the trainer's; statistics are exact over all its ranks. Their `compute_advantages`
    makes no metrics for a function: log `RewardBuffer.metrics()`.
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
    """What their processor reads of a reward model's answer."""

    rewards: Any
    extra_info: dict[str, Any] | None = None


class QueuedRewardModel:
    """A reward model for their unmodified trainer; scoring is done by our workers.

        rewards:
          - name: text
            reward_model: trainer_client.adapters.flow_factory.QueuedRewardModel
            model: OCR              # ours, with its options beside it
            run: flux-ocr-7
            batch_size: 16
            async_reward: true
            num_workers: 8          # batches in flight

    It is pointwise and sees what their processor passes: prompt, media with their rates, the row of the data set as
    metadata. Their trainer has no masks, so a sample without a reward raises, on its rank alone, unless
    `on_failure: {value: x}` says what it counts. Each instance is a launch of its own: of a class of yours without
    `version` it shares no rewards with the others.
    """

    required_fields: tuple[str, ...] = ("prompt",)
    use_tensor_inputs = True

    def __init__(self, config: Any, accelerator: Any) -> None:
        import torch

        options = dict(config.extra_kwargs)
        model, run = options.pop("model", None), options.pop("run", None)
        if not model or not run:
            raise ConfigError(
                f"reward {config.name!r}: QueuedRewardModel needs model: and run:"
            )
        reward = {
            "name": config.name,
            "reward_model": model,
            "dtype": str(config.dtype),
            **options,
        }
        parsed = RewardConfig.from_dict(
            {"rewards": {**reward, "batch_size": config.batch_size}}
        )
        if parsed.rewards[0].on_failure == "nan":
            raise ConfigError(
                f"reward {config.name!r}: one NaN makes their advantages NaN; use on_failure: {{value: x}}, or "
                "RewardBuffer with aggregation"
            )
        if parsed.rewards[0].is_groupwise:
            raise ConfigError(
                f"reward {config.name!r}: {model} compares a whole group; use RewardBuffer"
            )
        _count_as_theirs(type(self))
        self.config, self.accelerator = config, accelerator
        self.device = torch.device("cpu")  # media come here on their way to the workers
        self.dtype = config.dtype
        self.model = None
        self._name = config.name
        # A launch of the environment is one for all ranks and rewards; this client is alone, and its rank always 0.
        # Its batches are a few samples, of which a single failure may be more than half.
        self.client = RewardClient(
            parsed,
            run,
            launch=uuid.uuid4().hex,
            settings=load_settings(),
            max_failure_rate=1.0,
        )
        weakref.finalize(self, self.client.close)

    def to(self, device: Any) -> QueuedRewardModel:
        """Nothing is here to be moved."""
        return self

    def __call__(
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
            "condition_images": condition_images and list(map(list, condition_images)),
            "condition_videos": condition_videos and list(map(list, condition_videos)),
            "metadata": metadata
            and [_metadata_of({"metadata": row}) for row in metadata],
            "fps": frame_rate,
            "sample_rate": audio_sample_rate,
        }
        samples = [  # nobody compares them here: a group of its own spares each a look at its condition media
            Sample(
                prompt=text,
                group=uuid.uuid4().hex,
                **{
                    name: values[i]
                    for name, values in fields.items()
                    if values is not None
                },
            )
            for i, text in enumerate(prompt)
        ]
        batch = self.client.collect(ticket=self.client.submit(samples), progress=False)
        return Output(batch.to_torch()[self._name])


def _count_as_theirs(ours: type) -> None:
    """Their processor asks `isinstance(model, PointwiseRewardModel)`; theirs is an abstract base class."""
    abc = sys.modules.get("flow_factory.rewards.abc")
    if abc is not None:
        abc.PointwiseRewardModel.register(ours)


def _gather(mine: Any) -> Sequence[Any]:
    from accelerate.utils import gather_object

    return list(gather_object([mine]))


def _listed(values: Iterable[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _metadata_of(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What is plain data in their `extra_kwargs`, with the row of the data set laid out."""
    row = _row_of(extra.get("metadata"))
    found = _plain_of(
        {key: value for key, value in extra.items() if key not in _THEIRS}
    )
    if row is not None:
        found.pop("metadata", None)
        laid_out = _plain_of({key: _without_numpy(value) for key, value in row.items()})
        for key in row.keys() - laid_out.keys():
            _say_left_out(str(key), type(row[key]).__name__)
        found.update(laid_out)
    return found


def _plain_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is plain data among values by name; a number of numpy as one of Python."""
    plain = {
        key: value.item() if isinstance(value, np.generic) else value
        for key, value in values.items()
    }
    return {key: value for key, value in plain.items() if _is_plain({key: value})}


def _without_numpy(value: Any) -> Any:
    """A value of a row with its arrays as lists: a data set may give either."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _without_numpy(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_numpy(one) for one in value]
    return value


@functools.cache
def _say_left_out(key: str, kind: str) -> None:
    log.warning(
        "the data set's %r is a %s, which is no plain data: no reward is given it; make it text, numbers or lists",
        key, kind,
    )  # fmt: skip


def _row_of(metadata: Any) -> Mapping[str, Any] | None:
    """The row of the data set in what they call metadata; None if that is something else."""
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError):
            return None
        return (
            {} if metadata is None else metadata if isinstance(metadata, dict) else None
        )
    return metadata if isinstance(metadata, Mapping) else None


def _number(theirs: Any, name: str) -> float | None:
    """A number above 0 that one of their samples has as an attribute or in its `extra_kwargs`."""
    value = getattr(theirs, name, None)
    value = theirs.extra_kwargs.get(name) if value is None else value
    if getattr(value, "ndim", None) == 0:  # a tensor or array of one number
        value = value.item()
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return value if is_number and 0 < value < math.inf else None  # type: ignore[return-value]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(
            isinstance(key, str) and _is_plain(one) for key, one in value.items()
        )
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
