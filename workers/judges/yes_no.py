"""A judge that is asked one yes/no question about an image; its reward is how likely it says yes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import openai
from PIL import Image

from tasks.media import JPEG_QUALITY
from workers.base import (
    Accelerator,
    PointwiseRewardModel,
    RewardArguments,
    RewardModelOutput,
    Unscored,
    frames_of,
)
from workers.judges.client import api_key, judge_loop, unscored

QUESTION = (
    "You see one image that was generated for this request:\n{prompt}\n\n"
    "Does it look natural, free of visible artifacts, pleasing to the eye, rich in detail, and coherent as a whole, "
    "while showing what was asked for? Answer with one word, Yes or No."
)
"""Version 1 of the question; `{prompt}` is the sample's prompt."""

MAX_TOP_LOGPROBS = 20


class YesNoJudge(PointwiseRewardModel):
    """`P(Yes) / (P(Yes) + P(No))` over the candidates of the answer's first token, in [0, 1].

    The probabilities are those of the chat API's `top_logprobs`; candidates that are the same word after white space is
    cut and case is folded are summed. With neither word among them the sample is `unparsable`. A video is judged by
    its first frame, as in Flow-Factory's VLMEvaluate.
    """

    required_fields = ("prompt",)
    optional_fields = ("image", "video")
    thread_safe = True

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        options = config.extra_kwargs
        self._model: str = options["vlm_model"]
        self._question: str = options["question"] or QUESTION
        self._temperature: float = options["temperature"]
        self._top_logprobs = min(MAX_TOP_LOGPROBS, options["top_logprobs"])
        self._loop = judge_loop()
        base_url = options["api_base_url"]
        client = self._loop.client(base_url, api_key(base_url, options["api_key_env"]))
        self._client = client.with_options(timeout=options["timeout"], max_retries=options["max_retries"])

    def __call__(
        self,
        prompt: Sequence[str],
        image: Sequence[Any] | None = None,
        video: Sequence[Any] | None = None,
        condition_images: Sequence[Any] | None = None,
        condition_videos: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> RewardModelOutput:
        """Rewards `(N,)` in [0, 1], one request after another; `extra_info` has both probabilities and the answer."""
        answers = [self._judge(p, f[0]) for p, f in zip(prompt, frames_of(len(prompt), image, video), strict=True)]
        return RewardModelOutput(
            rewards=[reward for reward, _ in answers],
            extra_info={"judge": [info for _, info in answers]},
        )

    def _judge(self, prompt: str, image: Image.Image) -> tuple[float | Unscored, dict[str, Any]]:
        messages = [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(image, self.config.image_format)}},
                    {"type": "text", "text": self._question.replace("{prompt}", prompt)},
                ],
            }
        ]
        try:
            reply = self._loop.run(self._ask(messages), self.config.timeout_s)
            return yes_probability(reply)
        except Unscored as reason:
            return reason, reason.info
        except openai.OpenAIError as error:
            return unscored(error), {}

    async def _ask(self, messages: list[Any]) -> Any:
        return await self._client.chat.completions.create(
            model=self._model,
            messages=messages,
            max_tokens=1,
            temperature=self._temperature,
            logprobs=True,
            top_logprobs=self._top_logprobs,
        )


def yes_probability(reply: Any) -> tuple[float, dict[str, Any]]:
    """The reward in a chat completion, and what it was made of.

    Raises:
        Unscored: `unparsable`; there are no log probabilities, or neither Yes nor No is among the candidates.
    """
    choice = reply.choices[0] if reply.choices else None
    tokens = choice.logprobs.content if choice is not None and choice.logprobs is not None else None
    if choice is None or not tokens:
        raise Unscored("unparsable", "the judge's answer has no logprobs; does the server give them?")
    text = choice.message.content or ""
    candidates = [(c.token, c.logprob) for c in tokens[0].top_logprobs] or [(tokens[0].token, tokens[0].logprob)]
    yes, no = _mass("yes", candidates), _mass("no", candidates)
    info = {"answer": text, "p_yes": yes, "p_no": no}
    total = yes + no
    if not total > 0.0 or not math.isfinite(total):
        seen = ", ".join(repr(token) for token, _ in candidates[:5])
        raise Unscored("unparsable", f"neither Yes nor No among the judge's candidates; the first are {seen}", info)
    return yes / total, info


def data_url(image: Image.Image, image_format: str) -> str:
    """The image as a `data:` URL; JPEG and WebP at quality 95, PNG at its fastest."""
    options: dict[str, Any] = {"compress_level": 1} if image_format == "png" else {"quality": JPEG_QUALITY}
    buffer = io.BytesIO()
    image.save(buffer, image_format.upper(), **options)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _mass(word: str, candidates: Iterable[tuple[str, float]]) -> float:
    return math.fsum(math.exp(logprob) for token, logprob in candidates if token.strip().lower() == word)
