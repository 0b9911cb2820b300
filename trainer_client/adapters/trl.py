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
"""Prompts, completions and the data set's columns, `N` of each, to `N` samples. A sample may have no `group`: then
`reward_functions` gives it one."""

_NO_COLUMNS = (
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)
"""What the trainer passes besides the columns of the data set."""


def reward_functions(  # noqa: PLR0913  (public API)
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

    The function that the trainer calls first for its completions submits them for all rewards, and the others take
    their reward from the same batch. Nothing else may use the client's steps of this split: the functions submit and
    collect them.

    Args:
        to_samples: Makes samples of the trainer's rows; `samples_of` unless given.
        num_generations: The trainer's, for rewards that compare the completions of a prompt: a group is that many rows,
            one after another over all ranks. On one rank, if the rows are not laid out so, a group is the rows with the
            same prompt and condition media.
        num_generations_eval: The trainer's for its evaluation; `num_generations` unless given.
        timeout_s: Of `collect()`. A reward that is missing then is None.
        split: `eval` for the rewards of evaluation.
        is_async: Return coroutine functions; the trainer awaits these together.

    Returns:
        Functions that return None where there is no reward. They raise `ScoringError` for a reward whose `on_failure`
        is `raise`, and if a larger share of a step failed than the client's `max_failure_rate`. Where the trainer has
        `log_metric`, each logs `rewards/<name>/failure_rate`. With several ranks and rewards that compare, they raise
        `ValueError` for rows that are not in groups of these sizes.
    """
    sizes = (num_generations, num_generations_eval or num_generations)
    submissions = _Submissions(client, to_samples, sizes, timeout_s, split)
    make = _async_function if is_async else _function
    return [make(submissions, spec.name) for spec in client.config.of(split)]


def reward_weights(client: RewardClient, split: Split = "train") -> list[float]:
    """The weights of the same rewards in the same order, for `GRPOConfig(reward_weights=...)`."""
    return [spec.weight for spec in client.config.of(split)]


def samples_of(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[Sample]:
    """A sample for each row.

    The image is the completion if that is an image, else the value of the column `image`. The text of a completion is
    `metadata["completion"]`, for a reward model of your own that declares `metadata`. Columns `fps` and `sample_rate`
    are the sample's.
    """
    nothing = [None] * len(prompts)
    rows = zip(
        prompts,
        completions,
        columns.get("image", nothing),
        columns.get("fps", nothing),
        columns.get("sample_rate", nothing),
        strict=True,
    )
    samples = []
    for prompt, completion, image, fps, sample_rate in rows:
        is_array = isinstance(completion, Image.Image | np.ndarray)
        is_image = is_array or is_tensor(completion)
        samples.append(
            Sample(
                prompt=text_of(prompt),
                image=completion if is_image else image,
                metadata={} if is_image else {"completion": text_of(completion)},
                fps=fps,
                sample_rate=sample_rate,
            )
        )
    return samples


def text_of(messages: Any) -> str:
    """The text of a prompt or completion; of a conversation, of its messages but the system's, a line for each part."""
    if isinstance(messages, str):
        return messages
    lines: list[str] = []
    for message in messages:
        if message.get("role") != "system":
            lines += filter(None, _parts_of(message.get("content") or ""))
    return "\n".join(lines)


def _parts_of(content: Any) -> list[str]:
    """The texts in a message's content, which is a text or a list of typed parts; empty for an image."""
    if isinstance(content, str):
        return [content]
    return [part.get("text") or "" for part in content]


@dataclass(slots=True, eq=False)
class _Submission:
    """The completions of one step, which the trainer passes to each of its reward functions."""

    completions: Any
    """Kept alive, so that no other list gets its identity meanwhile."""
    number: int
    batch: Future[RewardBatch] = field(default_factory=Future)
    asked: set[str] = field(default_factory=set)
    """Names of the functions that were called with these completions."""

    def is_open_to(self, name: str, completions: Any) -> bool:
        """Whether a function that is called with `completions` takes its reward from this submission."""
        return completions is self.completions and name not in self.asked


class _Submissions:
    """What the reward functions of one client share: the current submission."""

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
        self._current: _Submission | None = None

    def join(self, name: str, completions: Any) -> tuple[_Submission, bool]:
        """The submission of these completions, and whether the caller is the first, who has to score it.

        A function that asks again for the same list begins a new submission.
        """
        with self._lock:
            current = self._current
            if current is not None and current.is_open_to(name, completions):
                current.asked.add(name)
                return current, False
            number = current.number + 1 if current is not None else 0
            self._current = _Submission(completions, number, asked={name})
            return self._current, True

    def score(
        self, current: _Submission, prompts: Sequence[Any], given: Mapping[str, Any]
    ) -> None:
        """Submit and collect, and give the batch or the error to all functions that wait."""
        try:
            with self._scoring:
                current.batch.set_result(self._scored(current, prompts, given))
        except BaseException as error:  # whatever it is, the functions that wait for this submission must hear of it
            current.batch.set_exception(error)

    def _scored(
        self, current: _Submission, prompts: Sequence[Any], given: Mapping[str, Any]
    ) -> RewardBatch:
        columns = dict(given)
        for name in _NO_COLUMNS:
            columns.pop(name, None)
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
            # On a terminal the trainer has bars of its own. Elsewhere `collect()` tells the log how it goes.
            progress = False if is_terminal() else None
            return self._client.collect(
                self._timeout_s,
                on_failure="nan",
                split=self._split,
                progress=progress,
                max_failure_rate=self._client.max_failure_rate,
            )
        except BaseException:
            # Also after Ctrl-C: in a notebook the next call must not find this step open.
            self._client.cancel(self._split)
            raise

    def _group(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[Any],
        given: Mapping[str, Any],
    ) -> int | None:
        """Give a group to each sample that has none.

        Returns:
            The size of a group where ranks must know it, else None.
        """
        texts = list(map(text_of, prompts))
        size, numbers = self._layout(texts, _is_evaluating(given))
        lacking = []
        for i, sample in enumerate(samples):
            # Anything that is not a Sample is left to submit(), which refuses it.
            if isinstance(sample, Sample) and sample.group is None:
                lacking.append((sample, i))

        is_shared = self._are_groups_shared()
        if numbers:
            for sample, i in lacking:
                sample.group = numbers[i]
        elif lacking and is_shared:
            train, evaluation = self._sizes
            raise ValueError(
                f"with several ranks the rows must be whole groups of a prompt, one after another; these {len(texts)} "
                f"are not, with num_generations={train} and num_generations_eval={evaluation}: give both as the "
                "trainer has them, or let to_samples say the groups"
            )
        else:
            self._group_by_prompt(lacking, texts)
        return size if is_shared else None

    def _are_groups_shared(self) -> bool:
        """Whether a reward compares the samples of a group over several ranks."""
        if self._client.world_size == 1:
            return False
        rewards = self._client.config.of(self._split)
        return any(reward.is_groupwise for reward in rewards)

    def _group_by_prompt(
        self, lacking: Sequence[tuple[Sample, int]], texts: Sequence[str]
    ) -> None:
        """Rows with equal prompts and equal condition media are a group. The prompt is the trainer's, not a sample's:
        `to_samples` may have given equal rows different prompts."""
        rows = []
        for sample, i in lacking:
            row = replace(sample, prompt=texts[i])
            check(row, (), f"sample {i}", self._client.settings.max_pixels)
            rows.append(row)
        groups = groups_of(rows, uuid.uuid4().hex)
        for (sample, _), group in zip(lacking, groups, strict=True):
            sample.group = group

    def _layout(
        self, texts: Sequence[str], is_evaluating: bool | None
    ) -> tuple[int | None, list[int]]:
        """The size of a group, and for each row the number of its group over all ranks; no numbers if no size fits.

        The trainer lays rows out rank after rank, equally many on each, the completions of a prompt one after another.
        """
        first_row = self._client.rank * len(texts)
        num_rows = self._client.world_size * len(texts)
        sizes = self._sizes if is_evaluating is None else (self._sizes[is_evaluating],)
        for size in filter(None, sizes):
            groups = [(first_row + i) // size for i in range(len(texts))]
            prompts_of_groups = set(zip(groups, texts, strict=True))
            has_one_prompt_a_group = len(prompts_of_groups) == len(set(groups))
            if num_rows % size == 0 and has_one_prompt_a_group:
                return size, groups
        return sizes[0], []


def _is_evaluating(given: Mapping[str, Any]) -> bool | None:
    """Whether the trainer evaluates, which its model's mode says; None if the model cannot be reached.

    `log_metric` is a method of the trainer, and the only way from a reward function to it.
    """
    model = getattr(getattr(given.get("log_metric"), "__self__", None), "model", None)
    is_training = getattr(model, "training", None)
    return None if is_training is None else not is_training


def _function(submissions: _Submissions, name: str) -> RewardFunction:
    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], **given: Any
    ) -> list[float | None]:
        current, is_first = submissions.join(name, completions)
        if is_first:
            submissions.score(current, prompts, given)
        return _answer(current.batch.result(), name, given)

    reward.__name__ = reward.__qualname__ = name
    return reward


def _async_function(submissions: _Submissions, name: str) -> RewardFunction:
    async def reward(
        prompts: Sequence[Any], completions: Sequence[Any], **given: Any
    ) -> list[float | None]:
        current, is_first = submissions.join(name, completions)
        if is_first:
            asyncio.get_running_loop().run_in_executor(
                None, submissions.score, current, prompts, given
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
