"""The rewards of a run: those of training and of evaluation, read from a YAML file or a dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from tasks.catalog import CATALOG
from tasks.errors import ConfigError, UnknownRewardError, nearest
from tasks.rewards import yaml_file
from tasks.rewards.parser import parse_block, parse_train
from tasks.rewards.spec import RewardSpec
from tasks.rewards.yaml_file import NO_LINES, Lines
from tasks.rewards.yaml_keys import (
    check_block_name,
    check_has_rewards,
    check_train_keys,
)

Split = Literal["train", "eval"]


class RewardConfig(BaseModel):
    """The rewards of a run: for training, and for evaluation (the training rewards unless given)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    rewards: tuple[RewardSpec, ...]
    eval_rewards: tuple[RewardSpec, ...] = ()
    advantage_aggregation: Literal["gdpo", "sum"] = "gdpo"
    """From `train:`; how `client.advantages()` makes one advantage of several rewards."""
    global_std: bool = True
    """From `train:`; `sum` divides by the deviation of the whole batch, or else by that of each group."""

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> RewardConfig:
        """Read the `rewards:` and `eval_rewards:` blocks of a YAML file.

        Its other blocks are the trainer's, but for `advantage_aggregation` and `global_std` in `train:`.

        Raises:
            ConfigError: The file cannot be read, is no YAML, a key is given twice, or a block is wrong; names the file,
                and the line where something is wrong.
        """
        config, lines = yaml_file.read(path)
        try:
            return cls._checked(config, Path(path).parent, lines)
        except ConfigError as error:
            raise type(error)(
                yaml_file.in_short(f"{os.fspath(path)}: {error}")
            ) from None

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], folder: Path = Path()
    ) -> RewardConfig:
        """Check the `rewards` and `eval_rewards` of a parsed file (each a list, or one reward as a mapping).

        Relative file names in it start from `folder`.

        Raises:
            ConfigError: Says which reward and key is wrong, what was found and what is needed.
        """
        return cls._checked(config, folder, NO_LINES)

    @classmethod
    def _checked(
        cls, config: Mapping[str, Any], folder: Path, lines: Lines
    ) -> RewardConfig:
        check_has_rewards(config)
        for key, block in config.items():
            with lines.told(key):
                check_block_name(key, block)
        rewards = parse_block(config["rewards"], "rewards", folder, lines)
        eval_rewards: tuple[RewardSpec, ...] = ()
        for_evaluation = config.get("eval_rewards")
        if for_evaluation not in (None, [], {}, ()):
            eval_rewards = parse_block(
                for_evaluation, "eval_rewards", folder, lines, for_evaluation=True
            )
        with lines.told("train"):
            check_train_keys(config.get("train"))
            train = parse_train(config.get("train"))
        return cls(rewards=rewards, eval_rewards=eval_rewards, **train)

    def of(self, split: Split) -> tuple[RewardSpec, ...]:
        """The rewards of a split, for use.

        Raises:
            UnknownRewardError: A reward has a name that loads but is not built here, or is a class that its module does
                not have.
            ConfigError: There is no such split.
        """
        if split not in get_args(Split):
            raise ConfigError(f"split must be 'train' or 'eval', found {split!r}")
        specs = (self.eval_rewards or self.rewards) if split == "eval" else self.rewards
        for spec in specs:
            _check_usable(spec)
        return specs

    def for_launch(self, launch: str) -> RewardConfig:
        """This config as it stands in `launch`."""
        return self.model_copy(
            update={
                "rewards": tuple(r.for_launch(launch) for r in self.rewards),
                "eval_rewards": tuple(r.for_launch(launch) for r in self.eval_rewards),
            }
        )

    @property
    def queues(self) -> tuple[str, ...]:
        """Every queue that serves this config, in order of first use."""
        specs = (*self.rewards, *self.eval_rewards)
        return tuple(dict.fromkeys(spec.queue for spec in specs if spec.is_built))


def _check_usable(spec: RewardSpec) -> None:
    """Raise `UnknownRewardError` for a reward that a config may have and nobody can compute."""
    if spec.absent:
        raise UnknownRewardError(spec.absent)
    if not spec.is_built:
        raise UnknownRewardError(
            f"reward {spec.name!r}: {spec.reward_model} is not built here"
            f"{nearest(spec.reward_model, CATALOG)}; bring a class of your own and name it by its "
            "dotted path, reward_model: my_rewards.MyReward"
        )
