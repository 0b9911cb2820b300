"""What all judges share: options, images as URLs, a question for each sample, reasons for failures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

from tasks import catalog
from tasks.errors import BusyError, ConfigError, ModelLoadError
from tasks.rewards.options import options_of_subclass
from workers import deadline
from workers.base import (
    Accelerator,
    Inputs,
    PointwiseRewardModel,
    RewardArguments,
    RewardModelOutput,
    Unscored,
)
from workers.judges.chat import Chat
from workers.judges.images import DATA_URLS, evenly_spaced
from workers.judges.reply import Reply

Answer = tuple[float | Unscored | BusyError, dict[str, Any]]
"""The reward of a sample or the reason why there is none, and the info to keep beside it."""


class Judge(PointwiseRewardModel):
    """Asks a judge one question about each sample. A subclass writes the question and reads the reply.

    `info["judge"]` keeps what was read. The options are those of the built-in `catalog_name`. A subclass of the user's
    inherits them with their defaults and checks, and may have further options.
    """

    catalog_name: ClassVar[str]
    own_options: ClassVar[tuple[str, ...]] = ()
    """Options of the built-in whose values the class checks itself."""
    required_fields: ClassVar[tuple[str, ...]] = ("prompt",)
    optional_fields: ClassVar[tuple[str, ...]] = ("image", "video")
    thread_safe = True
    asks_servers = True

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        entry = catalog.CATALOG[self.catalog_name]
        try:  # the trainer checks the options of a built-in only: it does not know that a subclass has the same
            self.options = options_of_subclass(
                entry, config.extra_kwargs, type(self).__name__, self.own_options
            )
        except ConfigError as error:
            raise ModelLoadError(str(error)) from None
        is_named = config.image_format in ("png", "jpeg", "webp")
        self._image_format = config.image_format if is_named else entry.image_format
        self.chat = Chat(self.options, config.timeout_s)

    def admit(self) -> None:
        """Raise `BusyError` if the fleet's budget has no permit left."""
        self.chat.admit()

    def warm_up(self) -> None:
        """Raise `ModelLoadError` if a server is away, or refuses the key or the model; no image is sent."""
        self.chat.warm_up()

    def messages(
        self, prompt: str, frames: Sequence[Any], condition_images: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """The question about one sample. `frames` are its image, or the frames of its video to show."""
        raise NotImplementedError

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the request besides temperature."""
        raise NotImplementedError

    def read(self, reply: Reply) -> tuple[float, dict[str, Any]]:
        """The reward in a reply, and what to keep. Raises `Unscored`."""
        raise NotImplementedError

    def score_inputs(self, inputs: Inputs) -> RewardModelOutput:
        """Rewards `(N,)` in [0, 1], one request after another unless `max_concurrent` is given."""
        num_samples = len(inputs.prompt)
        samples = zip(
            inputs.prompt,
            inputs.frames(),
            inputs.condition_images or [()] * num_samples,
            strict=True,
        )
        answers: list[Answer] = []
        with deadline.paused():  # requests keep timeout_s by themselves
            while some := list(itertools.islice(samples, self.chat.at_once)):
                chats = []
                for prompt, frames, condition_images in some:
                    shown = evenly_spaced(frames, self.options["frames"])
                    chats.append(self.messages(prompt, shown, condition_images or ()))

                for reply in self.chat.ask(chats, **self.params):
                    answers.append(self._answer(reply))
        return RewardModelOutput(
            rewards=[reward for reward, _ in answers],
            extra_info={"judge": [info for _, info in answers]},
        )

    def urls(self, images: Sequence[Any]) -> list[str]:
        """The images as `data:` URLs."""
        return [DATA_URLS.of(image, self._image_format) for image in images]

    def _answer(self, reply: Reply | Unscored | BusyError) -> Answer:
        if not isinstance(reply, Reply):
            return reply, {}
        try:
            reward, info = self.read(reply)
        except Unscored as reason:
            return reason, {}
        return reward, {
            **info,
            "model": reply.model,
            "num_requests": reply.num_requests,
        }
