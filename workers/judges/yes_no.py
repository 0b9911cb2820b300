"""A judge that is asked one yes/no question about an image; its reward is how likely it says yes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from workers.base import Accelerator, RewardArguments, Unscored
from workers.judges.chat import Reply
from workers.judges.judge import Judge
from workers.judges.template import Template

QUESTION = (
    "<image>\nThis picture was generated for the following request:\n{prompt}\n\n"
    "Look at it as a demanding picture editor would. Is the scene natural, with light, perspective and bodies as they "
    "could be? Is it free of artifacts such as smears, seams, extra limbs, broken lettering or watermarks? Is it "
    "pleasing, in composition and colour? Are details crisp and worked out? Do all its parts belong together, and to "
    "the request?\nIf on the whole it is good enough to publish, answer Yes; if not, answer No. One word only."
)
"""Version 2 of the question; `{prompt}` is the sample's prompt."""

ROUNDING = 1e-3
"""A log probability above 0 by more than this is none."""


class YesNoJudge(Judge):
    """`P(Yes) / (P(Yes) + P(No))` over the candidates of the answer's first token, in [0, 1].

    The probabilities are those of the chat API's `top_logprobs`. With `canonicalize` (the default) candidates that are
    the same word once white space is cut and case is folded are summed; without it only `Yes` and `No` as they stand
    count, as in Flow-Factory's VLMEvaluate. With neither word among the candidates the sample is `unparsable`, and
    with one of them the other counts as 0. Of a video the first frame is judged unless `frames` says otherwise.
    Version 2.
    """

    catalog_name = "vllm_evaluate"

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self._template = Template.parse(self.options["question"] or QUESTION, 1, needs_prompt=False)

    @property
    def params(self) -> dict[str, Any]:
        """One token, with its candidates."""
        return {"max_tokens": 1, "logprobs": True, "top_logprobs": self.options["top_logprobs"]}

    def messages(self, prompt: str, frames: Sequence[Any], condition_images: Sequence[Any]) -> list[dict[str, Any]]:
        """The question, with the image or frames where the template has them."""
        return self._template.messages(prompt, [self.urls(frames)])

    def read(self, reply: Reply) -> tuple[float, dict[str, Any]]:
        """The reward, with both probabilities and the answer's text."""
        return yes_probability(reply, canonicalize=self.options["canonicalize"])


def yes_probability(reply: Reply, *, canonicalize: bool) -> tuple[float, dict[str, Any]]:
    """The reward in a reply, and what it was made of.

    Raises:
        Unscored: `unparsable`; there are no log probabilities, or neither Yes nor No is among the candidates.
    """
    if not reply.candidates:
        words = "no logprobs; does the server give them?"
        raise Unscored("unparsable", f"the judge's answer has {words}", {"judge": {"text": reply.text}})
    yes, no = (_mass(word, reply.candidates, canonicalize) for word in ("Yes", "No"))
    info = {"text": reply.text, "p_yes": yes, "p_no": no}
    total = yes + no
    if not total > 0.0 or not math.isfinite(total):
        seen = ", ".join(repr(token) for token, _ in reply.candidates[:5])
        reason = f"neither Yes nor No is among the judge's candidates; the first are {seen}"
        raise Unscored("unparsable", reason, {"judge": info})
    return yes / total, info


def _mass(word: str, candidates: Sequence[tuple[str, float]], canonicalize: bool) -> float:
    if canonicalize:
        same = [logprob for token, logprob in candidates if token.strip().lower() == word.lower()]
    else:
        same = [logprob for token, logprob in candidates if token == word]
    return math.fsum(math.exp(logprob) if logprob <= ROUNDING else math.nan for logprob in same)
