"""What a judge is told: from a text with placeholders for the prompt and the images to the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.errors import ModelLoadError

PROMPT, IMAGE = "{prompt}", "<image>"
SYSTEM_ENDS = "==="
"""A line of only this ends the system message, if there is one."""


@dataclass(frozen=True, slots=True)
class Template:
    """A text with `{prompt}` and an `<image>` for each image; the lines above a line `===` are the system message.

    Only the template's own placeholders are replaced: braces or `<image>` in a prompt stay as they are.
    """

    system: str
    parts: tuple[str, ...]
    """The parts of the user message between its images."""

    @classmethod
    def parse(cls, text: str, num_images: int, *, needs_prompt: bool) -> Template:
        """The template in `text`. If it has no `<image>`, the images come before the text.

        Raises:
            ModelLoadError: There is no placeholder for the prompt, or there are placeholders for another number of
                images.
        """
        system, user = _system_and_user(text)
        if needs_prompt and PROMPT not in user:
            raise ModelLoadError(
                f"the rubric has no {PROMPT}, the placeholder of the request that is judged"
            )

        parts = tuple(user.split(IMAGE))
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
            images: For each placeholder, the `data:` URLs of one image or of the frames of a video.
        """
        content: list[dict[str, Any]] = []
        for part, urls in zip(self.parts, (*images, ()), strict=True):
            if part.strip():
                text = part.strip("\n").replace(PROMPT, prompt)
                content.append({"type": "text", "text": text})
            for url in urls:
                content.append({"type": "image_url", "image_url": {"url": url}})

        user = {"role": "user", "content": content}
        if not self.system:
            return [user]
        system = {"role": "system", "content": self.system.replace(PROMPT, prompt)}
        return [system, user]


def _system_and_user(text: str) -> tuple[str, str]:
    """The system message, which may be empty, and the user message."""
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if line.strip() == SYSTEM_ENDS:
            return "".join(lines[:i]).strip(), "".join(lines[i + 1 :])
    return "", text
