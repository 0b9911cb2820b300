"""Reward functions for TRL's `GRPOTrainer`: one for each reward of a client, all answered by one submission."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from tasks.media import is_tensor
from tasks.rewards import Split
from tasks.samples import Sample
from trainer_client.client import COLLECT_TIMEOUT_S, RewardClient
from trainer_client.progress import is_terminal
from trainer_client.results import RewardBatch
from trainer_client.steps.grouping import groups_of
from trainer_client.steps.sample_checks import check

RewardFunction = Callable[..., Any]
"""`(prompts, completions, **columns) -> list[float | None]`, or the same as a coroutine function."""

ToSamples = Callable[
    [Sequence[Any], Sequence[Any], Mapping[str, Sequence[Any]]], Sequence[Sample]
]
"""Prompts, completions and the data set's columns, `N` of each, to `N` samples. A group may be left to us."""

_NO_COLUMNS = (
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)
"""What the trainer passes besides the columns of the data set."""


def reward_functions(
    client: RewardClient,
    *,
    to_samples: ToSamples | None = None,
    num_generations: int | None = None,
    num_generations_eval: int | None = None,
    timeout_s: float = COLLECT_TIMEOUT_S,
    split: Split = "train",
    is_async: bool = False,
) -> list[RewardFunction]:
    """A function for each reward of the client, in its order, for `GRPOTrainer(reward_funcs=...)`.

    The first one that the trainer calls for its completions submits them for all rewards and the others take theirs
    from the same batch. The client is theirs alone: they submit and collect its steps of this split.

    Args:
        to_samples: Makes samples of the trainer's rows; `samples_of` unless given.
        num_generations: The trainer's, for rewards that compare the completions of a prompt: a group is that many rows,
            one after another over all ranks. On one rank, where the rows are not so, it is those with the same prompt
            and condition media.
        num_generations_eval: The trainer's for its evaluation; `num_generations` unless given.
        timeout_s: Of `collect()`. What is missing then is None.
        split: `eval` for the rewards of evaluation.
        is_async: Give coroutine functions; the trainer awaits these together.

    Returns:
        Functions that give None where there is no reward, and raise `ScoringError` for a reward whose `on_failure` is
        `raise`, and where more of a step failed than the client's `max_failure_rate`. Where the trainer has
        `log_metric`, each logs `rewards/<name>/failure_rate`. With several ranks and rewards that compare, they raise
        `ValueError` for rows that are not in groups of these sizes.
    """
    sizes = (num_generations, num_generations_eval or num_generations)
    rounds = _Rounds(client, to_samples, sizes, timeout_s, split)
    make = _async_function if is_async else _function
    return [make(rounds, spec.name) for spec in client.config.of(split)]


def reward_weights(client: RewardClient, split: Split = "train") -> list[float]:
    """The weights of the same rewards in the same order, for `GRPOConfig(reward_weights=...)`."""
    return [spec.weight for spec in client.config.of(split)]


def samples_of(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[Sample]:
    """A sample for each row.

    The image is the completion if it is one, else that of the column `image`. The text of a completion is
    `metadata["completion"]`, for a reward model of your own that declares `metadata`. Columns `fps` and `sample_rate`
    are the sample's.
    """
    nothing = [None] * len(prompts)
    images, fps, rates = (
        columns.get(name, nothing) for name in ("image", "fps", "sample_rate")
    )
    samples = []
    for prompt, completion, image, each_fps, rate in zip(
        prompts, completions, images, fps, rates, strict=True
    ):
        is_image = isinstance(completion, Image.Image | np.ndarray) or is_tensor(
            completion
        )
        samples.append(
            Sample(
                prompt=text_of(prompt),
                image=completion if is_image else image,
                metadata={} if is_image else {"completion": text_of(completion)},
                fps=each_fps,
                sample_rate=rate,
            )
        )
    return samples


def text_of(messages: Any) -> str:
    """The text of a prompt or completion; of a conversation, that of its messages but the system's, a line each."""
    if isinstance(messages, str):
        return messages
    lines = []
    for message in messages:
        content = message.get("content") or ""
        parts = (
            [content]
            if isinstance(content, str)
            else [part.get("text") or "" for part in content]
        )
        lines += [part for part in parts if part and message.get("role") != "system"]
    return "\n".join(lines)


@dataclass(slots=True, eq=False)
class _Round:
    """One call of the trainer for all its reward functions."""

    completions: Any
    """Kept, so that no other list can have its identity meanwhile."""
    number: int
    batch: Future[RewardBatch] = field(default_factory=Future)
    asked: set[str] = field(default_factory=set)


class _Rounds:
    def __init__(
        self,
        client: RewardClient,
        to_samples: ToSamples | None,
        sizes: tuple[int | None, int | None],
        timeout_s: float,
        split: Split,
    ) -> None:
        self._client = client
        self._to_samples = to_samples or samples_of
        self._sizes = sizes
        """Of a group in training, and in evaluation."""
        self._timeout_s = timeout_s
        self._split: Split = split
        self._lock = threading.Lock()
        self._scoring = threading.Lock()
        self._round: _Round | None = None

    def join(self, name: str, completions: Any) -> tuple[_Round, bool]:
        """The round of these completions, and whether the caller is the first and has to score it."""
        with self._lock:
            current = self._round
            is_new = (
                current is None
                or current.completions is not completions
                or name in current.asked
            )
            if current is None or is_new:
                current = self._round = _Round(
                    completions, current.number + 1 if current else 0
                )
            current.asked.add(name)
            return current, is_new

    def score(
        self, current: _Round, prompts: Sequence[Any], given: Mapping[str, Any]
    ) -> None:
        """Submit, collect, and tell all who wait."""
        try:
            with self._scoring:
                current.batch.set_result(self._scored(current, prompts, given))
        except BaseException as error:  # whatever it is, the functions that wait for this round must hear of it
            current.batch.set_exception(error)

    def _scored(
        self, current: _Round, prompts: Sequence[Any], given: Mapping[str, Any]
    ) -> RewardBatch:
        columns = {
            name: values for name, values in given.items() if name not in _NO_COLUMNS
        }
        samples = self._to_samples(prompts, current.completions, columns)
        if len(samples) != len(prompts):
            raise ValueError(
                f"to_samples must give a sample for each of {len(prompts)} rows, found {len(samples)}"
            )
        group_size = self._group(samples, prompts, given)
        try:
            self._client.submit(
                samples, group_size=group_size, split=self._split, step=current.number
            )
            # No bars, which the trainer has; the log is told where there are none to be had.
            progress = False if is_terminal() else None
            return self._client.collect(
                self._timeout_s,
                on_failure="nan",
                split=self._split,
                progress=progress,
                max_failure_rate=self._client.max_failure_rate,
            )
        except BaseException:
            self._client.cancel(
                self._split
            )  # Ctrl-C in a notebook must not leave the step open
            raise

    def _group(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[Any],
        given: Mapping[str, Any],
    ) -> int | None:
        """Give the samples the groups they lack; returns the size of a group where ranks must know it, else None."""
        texts = [text_of(prompt) for prompt in prompts]
        size, numbers = self._layout(texts, _is_evaluating(given))
        # submit() refuses what is no Sample.
        lacking = [
            (one, i)
            for i, one in enumerate(samples)
            if isinstance(one, Sample) and one.group is None
        ]
        is_shared = self._client.world_size > 1 and any(
            r.is_groupwise for r in self._client.config.of(self._split)
        )
        if is_shared and lacking and not numbers:
            train, evaluation = self._sizes
            raise ValueError(
                f"with several ranks the rows must be whole groups of a prompt, one after another; these {len(texts)} "
                f"are not, with num_generations={train} and num_generations_eval={evaluation}: give both as the "
                "trainer has them, or let to_samples say the groups"
            )
        if numbers:
            for sample, i in lacking:
                sample.group = numbers[i]
        else:
            self._group_by_prompt(lacking, texts)
        return size if is_shared else None

    def _group_by_prompt(
        self, lacking: Sequence[tuple[Sample, int]], texts: Sequence[str]
    ) -> None:
        """Equal prompts of the trainer, with equal condition media, are a group, whatever prompt `to_samples` gave."""
        rows = [replace(sample, prompt=texts[i]) for sample, i in lacking]
        for row, (_, i) in zip(rows, lacking, strict=True):
            check(row, (), f"sample {i}", self._client.settings.max_pixels)
        for (sample, _), group in zip(
            lacking, groups_of(rows, uuid.uuid4().hex), strict=True
        ):
            sample.group = group

    def _layout(
        self, texts: Sequence[str], is_evaluating: bool | None
    ) -> tuple[int | None, list[int]]:
        """The size of a group, and for each row the number of its group, over all ranks; no numbers if it does not fit.

        The trainer lays rows out so: rank after rank, as many on each, the completions of a prompt one after another.
        """
        sizes = self._sizes if is_evaluating is None else (self._sizes[is_evaluating],)
        first, num_rows = (
            self._client.rank * len(texts),
            self._client.world_size * len(texts),
        )
        for size in filter(None, sizes):
            groups = [(first + i) // size for i in range(len(texts))]
            if num_rows % size == 0 and len(
                set(zip(groups, texts, strict=True))
            ) == len(set(groups)):
                return size, groups
        return sizes[0], []


def _is_evaluating(given: Mapping[str, Any]) -> bool | None:
    """Whether the trainer, whose method `log_metric` is, evaluates: its model's mode says so; None if it is unseen."""
    model = getattr(getattr(given.get("log_metric"), "__self__", None), "model", None)
    is_training = getattr(model, "training", None)
    return None if is_training is None else not is_training


def _function(rounds: _Rounds, name: str) -> RewardFunction:
    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], **given: Any
    ) -> list[float | None]:
        current, is_first = rounds.join(name, completions)
        if is_first:
            rounds.score(current, prompts, given)
        return _answer(current.batch.result(), name, given)

    reward.__name__ = reward.__qualname__ = name
    return reward


def _async_function(rounds: _Rounds, name: str) -> RewardFunction:
    async def reward(
        prompts: Sequence[Any], completions: Sequence[Any], **given: Any
    ) -> list[float | None]:
        current, is_first = rounds.join(name, completions)
        if is_first:
            asyncio.get_running_loop().run_in_executor(
                None, rounds.score, current, prompts, given
            )
        batch = await asyncio.shield(asyncio.wrap_future(current.batch))
        return _answer(batch, name, given)

    reward.__name__ = reward.__qualname__ = name
    return reward


def _answer(
    batch: RewardBatch, name: str, given: Mapping[str, Any]
) -> list[float | None]:
    rewards = batch.rewards[name]
    if "log_metric" in given and len(batch):
        given["log_metric"](
            f"rewards/{name}/failure_rate", float(np.mean(~batch.valid[name]))
        )
    return [None if np.isnan(reward) else float(reward) for reward in rewards]
