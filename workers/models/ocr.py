"""How well an image shows the text that its prompt asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]  # noqa: F401  (RapidOCR looks for it only when it reads)

from workers.base import (
    Accelerator,
    Inputs,
    PointwiseRewardModel,
    RewardArguments,
    RewardModelOutput,
    Unscored,
)
from workers.models.ocr_reader import Reader
from workers.models.ocr_texts import (
    is_right_to_left,
    scripts_of,
    similarity,
    target_text,
    target_texts,
    unreadable,
)

LANGUAGE_OF_SCRIPT = {
    "CYRILLIC": "eslav",
    "HANGUL": "korean",
    "THAI": "th",
    "GREEK": "el",
    "DEVANAGARI": "devanagari",
    "TAMIL": "ta",
    "TELUGU": "te",
    "LATIN": "latin",
}
"""By script, the value of the option `lang` whose model reads it."""

MOST_SHOWN = 8
"""How many characters a reason lists."""


class OCR(PointwiseRewardModel):
    """Text rendering as in Flow-GRPO: `1 - min(d, n) / n`, in [0, 1].

    `d` is the Levenshtein distance between the text asked for and the text that RapidOCR reads (its lines in reading
    order), and `n` the length of the text asked for. Both texts are NFKC-normalised, case-folded and stripped of all
    white space, and typographic signs count as the plain ones. The reward is 1 if the text read contains the text asked
    for. The text asked for is `metadata["text"]` (text, a number, or a list of one of these), else what the prompt
    quotes first (`workers.models.quotations`).

    A sample is `invalid` if no text is asked for, or if the text has a character that the loaded recognition model
    cannot write. Several texts are `invalid` too, unless `several_texts: mean` asks for the mean over them. A video's
    reward is the mean over its frames. Version 2.
    """

    required_fields = ("prompt",)
    optional_fields = ("image", "video", "metadata")

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        options = config.extra_kwargs
        self._takes_several = options.get("several_texts") == "mean"
        self._reader = Reader(
            lang=options.get("lang", ""),
            rec_model_path=options.get("rec_model_path", ""),
            rec_keys_path=options.get("rec_keys_path", ""),
        )

    def score_inputs(self, inputs: Inputs) -> RewardModelOutput:
        """Rewards `(N,)` in [0, 1]; `extra_info` has the target (a list if there are several) and the texts read."""
        num_samples = len(inputs.prompt)
        metadata = inputs.others.get("metadata") or [{}] * num_samples
        rewards: list[float | Unscored] = []
        info: dict[str, list[Any]] = {"target": [], "read": []}

        for prompt, about, frames in zip(
            inputs.prompt, metadata, inputs.frames(), strict=True
        ):
            try:
                targets = self._targets(prompt, about)
            except Unscored as reason:
                rewards.append(reason)
                info["target"].append(None)
                info["read"].append([])
                continue

            read = [self._reader.read(frame) for frame in frames]
            rewards.append(_mean_similarity(targets, read))
            info["target"].append(targets[0] if len(targets) == 1 else targets)
            info["read"].append(read)
        return RewardModelOutput(rewards, info)

    def _targets(self, prompt: str, metadata: Mapping[str, Any]) -> list[str]:
        """The texts to look for, at least one. Raises `Unscored`."""
        if self._takes_several:
            targets = target_texts(prompt, metadata)
        else:
            target = target_text(prompt, metadata)
            targets = [] if target is None else [target]
        if not targets:
            raise Unscored(
                "invalid",
                'no text to look for: quote it in the prompt, or set metadata["text"]',
            )
        for target in targets:
            self._check_readable(target)
        return targets

    def _check_readable(self, target: str) -> None:
        """Raise `Unscored` for a text that can never be read, however well it is drawn."""
        if is_right_to_left(target):
            raise Unscored(
                "invalid",
                f"{target!r} is written from right to left, which OCR here cannot compare",
            )
        missing = unreadable(target, self._reader.alphabet)
        if missing:
            raise Unscored("invalid", _what_is_missing(target, missing))


def _mean_similarity(targets: Sequence[str], read: Sequence[str]) -> float:
    """The mean over each text that was read from a frame and each text to look for."""
    similarities = []
    for text in read:
        for target in targets:
            similarities.append(similarity(target, text))
    return float(np.mean(similarities))


def _what_is_missing(target: str, missing: Sequence[str]) -> str:
    """Why a text with these characters cannot be read, and which options name a model that reads them."""
    shown = " ".join(missing[:MOST_SHOWN])
    if len(missing) > MOST_SHOWN:
        shown += " ..."

    scripts = scripts_of(missing)
    titles = ", ".join(script.title() for script in scripts)
    of_scripts = f" ({titles})" if scripts else ""

    options = []
    for script in scripts:
        if script in LANGUAGE_OF_SCRIPT:
            options.append(f"lang: {LANGUAGE_OF_SCRIPT[script]}")
    options.append("rec_model_path: (a file on the worker)")
    return (
        f"{target!r} cannot be read, however well it is drawn: the recognition model has no {shown}{of_scripts}; "
        f"name a model that has, by {' or '.join(options)}, or ask for another text"
    )
