"""Rewards from a server of the user's over HTTP: `workers.server`, or any that speaks Flow-Factory's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tasks import catalog
from tasks.errors import ConfigError, ModelLoadError
from tasks.rewards.options import options_of_subclass
from workers import deadline
from workers.base import (
    Accelerator,
    GroupwiseRewardModel,
    Inputs,
    PointwiseRewardModel,
    RewardArguments,
    RewardModelOutput,
)
from workers.remote.client import RemoteClient


class RemotePointwiseRewardModel(PointwiseRewardModel):
    """What a reward server says of each sample, in the range of its own. Samples it rejects together are sent apart.

    The server is sent the fields that the option `required_fields` names, or a subclass with its attribute.
    """

    required_fields: ClassVar[tuple[str, ...]] = ("prompt",)
    optional_fields: ClassVar[tuple[str, ...]] = ("image", "video")
    thread_safe = True
    asks_servers = True

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        if not config.extra_kwargs.get("server_url"):
            raise ValueError("needs server_url, the URL of a reward server")
        entry = catalog.CATALOG["RemotePointwiseRewardModel"]
        # The trainer has checked those of a built-in, and cannot know that a class of yours has the same.
        try:
            options = options_of_subclass(
                entry, config.extra_kwargs, type(self).__name__
            )
        except ConfigError as error:
            raise ModelLoadError(str(error)) from None
        if options["required_fields"]:
            vars(self).update(
                required_fields=tuple(options["required_fields"]), optional_fields=()
            )
        self._client = RemoteClient(
            options,
            config.timeout_s,
            may_split=not isinstance(self, GroupwiseRewardModel),
        )

    def warm_up(self) -> None:
        """Raise `ModelLoadError` if a server does not answer; no sample is sent."""
        self._client.check()

    def score_inputs(self, inputs: Inputs) -> RewardModelOutput:
        """Rewards `(N,)`, in one request unless the server rejects that; an `Unscored` where there is none."""
        columns: dict[str, Sequence[Any] | None] = {
            "prompt": inputs.prompt,
            "image": inputs.image,
            "video": inputs.video,
            "condition_images": inputs.condition_images,
            "condition_videos": inputs.condition_videos,
        }
        for name in ("metadata", "fps"):
            if name in inputs.others:
                columns[name] = inputs.others[name]
        with deadline.paused():  # requests keep timeout_s by themselves
            return RewardModelOutput(self._client.rewards(columns))


class RemoteGroupwiseRewardModel(RemotePointwiseRewardModel, GroupwiseRewardModel):
    """What a reward server says of the members of a group, which it is sent whole."""
