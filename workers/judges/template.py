"""What a judge is told: a text with places for the prompt and the images, to the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.errors import ModelLoadError

PROMPT, IMAGE = "{prompt}", "<image>"
SYSTEM_ENDS = "==="
"""A line of this alone ends the system message, if there is one."""


@dataclass(frozen=True, slots=True)
class Template:
    """A text with `{prompt}` and an `<image>` for each image; what is above a line `===` is the system message.

    Only these places are replaced: a prompt that has braces or `<image>` in it stays as it is.
    """

    system: str
    parts: tuple[str, ...]
    """The user message, cut at the images."""

    @classmethod
    def parse(cls, text: str, num_images: int, *, needs_prompt: bool) -> Template:
        """The template in `text`. One that has no `<image>` gets the images before the text.

        Raises:
            ModelLoadError: It has no place for the prompt, or places for another number of images.
        """
        lines = text.splitlines(keepends=True)
        ends = [i for i, line in enumerate(lines) if line.strip() == SYSTEM_ENDS]
        system = "".join(lines[: ends[0]]).strip() if ends else ""
        user = "".join(lines[ends[0] + 1 :]) if ends else text
        parts = tuple(user.split(IMAGE))
        if needs_prompt and PROMPT not in user:
            raise ModelLoadError(
                f"the rubric has no {PROMPT}, the place of the request that is judged"
            )
        if len(parts) == 1:
            parts = ("",) * num_images + parts
        if len(parts) != num_images + 1:
            raise ModelLoadError(
                f"the rubric has {len(parts) - 1} {IMAGE}; it needs {num_images}, one for each image, or none"
            )
        return cls(system, parts)

    def messages(
        self, prompt: str, images: Sequence[Sequence[str]]
    ) -> list[dict[str, Any]]:
        """The chat.

        Args:
            images: For each place, the `data:` URLs of one image or of the frames of a video.
        """
        content: list[dict[str, Any]] = []
        for part, urls in zip(self.parts, (*images, ()), strict=True):
            if part.strip():
                content.append(
                    {"type": "text", "text": part.strip("\n").replace(PROMPT, prompt)}
                )
            content += [
                {"type": "image_url", "image_url": {"url": url}} for url in urls
            ]
        chat = (
            [{"role": "system", "content": self.system.replace(PROMPT, prompt)}]
            if self.system
            else []
        )
        return [*chat, {"role": "user", "content": content}]
