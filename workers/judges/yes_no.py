"""A judge that is asked one yes/no question about an image; the reward is the probability of yes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from workers.base import Accelerator, RewardArguments, Unscored
from workers.judges.judge import Judge
from workers.judges.reply import COMPLETE, Candidates, Reply
from workers.judges.template import Template
from workers.judges.thought import HINT, looks_like_thought
from workers.judges.tokens import word_of

QUESTION = (
    "<image>\nThis picture was generated for the following request:\n{prompt}\n\n"
    "Look at it as a demanding picture editor would. Is the scene natural, with light, perspective and bodies as they "
    "could be? Is it free of artifacts such as smears, seams, extra limbs, broken lettering or watermarks? Is it "
    "pleasing, in composition and colour? Are details crisp and worked out? Do all its parts belong together, and to "
    "the request?\nIf on the whole it is good enough to publish, answer Yes; if not, answer No. One word only."
)
"""Version 2 of the question; `{prompt}` is the sample's prompt."""

MIN_ANSWER_MASS = 0.25
"""A token is no answer if P(Yes) + P(No) is below this, unless `min_answer_mass` says otherwise."""

MAX_DOUBT = 0.05
"""A sample has no reward if a word that is not among the candidates could move the reward by more than this."""

ROUNDING = 1e-3
"""How far above 0 a log probability may be, by rounding."""

MOST_MASS = 1.05
"""The most to which the probabilities of all candidates may sum, by rounding; more means that they are none."""

NUM_SEEN = 5
"""How many of the likeliest candidates a reason names."""


class YesNoJudge(Judge):
    """`P(Yes) / (P(Yes) + P(No))` over the candidates of the answer's first token, in [0, 1].

    The probabilities are those of the chat API's `top_logprobs`. With `canonicalize` (the default) the probabilities of
    all candidates are summed that are the same word but for case and the marks around it. Without `canonicalize` only
    the tokens `Yes` and `No` count, as in Flow-Factory's VLMEvaluate. The answer begins behind the judge's thought, if
    there is one.

    The sample is `unparsable` if the reply is all thought, if P(Yes) + P(No) is below `min_answer_mass`, or if one of
    both words is not among the candidates and could move the reward by more than 0.05. The probability of such a word
    counts as 0; it is at most that of the least likely candidate, and at most what all candidates leave of 1. The judge
    sees the first frame of a video unless `frames` says otherwise. Version 3.
    """

    catalog_name = "vllm_evaluate"

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self._template = Template.parse(
            self.options["question"] or QUESTION, 1, needs_prompt=False
        )

    @property
    def params(self) -> dict[str, Any]:
        """One token, with its candidates."""
        return {
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": self.options["top_logprobs"],
        }

    def messages(
        self, prompt: str, frames: Sequence[Any], condition_images: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """The question, with the image or frames where the template has them."""
        return self._template.messages(prompt, [self.urls(frames)])

    def read(self, reply: Reply) -> tuple[float, dict[str, Any]]:
        """The reward, with both probabilities, their sum and the answer's text."""
        return yes_probability(
            reply,
            canonicalize=self.options["canonicalize"],
            min_answer_mass=self.options["min_answer_mass"],
        )


def yes_probability(
    reply: Reply, *, canonicalize: bool, min_answer_mass: float = MIN_ANSWER_MASS
) -> tuple[float, dict[str, Any]]:
    """The reward in a reply, and what it was made of.

    Raises:
        Unscored: `unparsable`; there is no answer, or it says too little of Yes and No.
    """
    if not reply.candidates:
        info = {"text": reply.text, **reply.thought_info()}
        raise Unscored("unparsable", _why_no_candidates(reply), {"judge": info})

    yes = _mass("Yes", reply.candidates, canonicalize)
    no = _mass("No", reply.candidates, canonicalize)
    p_yes, p_no = yes or 0.0, no or 0.0
    mass = p_yes + p_no
    found: dict[str, Any] = {
        "text": reply.text,
        "p_yes": p_yes,
        "p_no": p_no,
        "mass": mass,
        **reply.thought_info(),
    }
    why_not = (
        _what_is_no_probability(reply.candidates)
        or _why_no_answer(reply, mass, min_answer_mass)
        or _why_in_doubt(reply.candidates, yes, no)
    )
    if why_not:
        raise Unscored("unparsable", why_not, {"judge": found})
    return p_yes / mass, found


# --- private -------------------------------------------------------------------------------------


def _mass(word: str, candidates: Candidates, canonicalize: bool) -> float | None:
    """The probability of a word, summed over its tokens; None if none of them is among the candidates."""
    probabilities = []
    for token, logprob in candidates:
        is_word = word_of(token) == word.casefold() if canonicalize else token == word
        if is_word:
            probabilities.append(_probability(logprob))
    return math.fsum(probabilities) if probabilities else None


def _probability(logprob: float) -> float:
    return math.exp(logprob) if logprob <= ROUNDING else math.nan


def _what_is_no_probability(candidates: Candidates) -> str:
    """Why the candidates' numbers cannot be log probabilities; empty if they can."""
    for token, logprob in candidates:
        is_logprob = logprob <= ROUNDING  # False for NaN
        if not is_logprob:
            return (
                f"neither P(Yes) nor P(No) is known: {logprob:g} is no log probability, which the judge gave "
                f"{token!r}"
            )

    total = math.fsum(_probability(logprob) for _, logprob in candidates)
    if total > MOST_MASS:
        return f"neither P(Yes) nor P(No) is known: the probabilities of the judge's candidates sum to {total:.3g}"
    return ""


def _why_no_candidates(reply: Reply) -> str:
    if reply.is_all_thought:
        return (
            f"the judge's reply is all thought, and the server gave no logprobs; {HINT}"
        )
    if reply.num_tokens:
        return (
            "the judge thought before it answered, and the server gives logprobs of the thought but not of the answer; "
            f"{HINT}"
        )
    if reply.finish_reason not in (*COMPLETE, "length"):
        return (
            f"the judge's answer ended by {reply.finish_reason!r} and has no logprobs"
        )
    return "the judge's answer has no logprobs; does the server give them?"


def _why_no_answer(reply: Reply, mass: float, min_answer_mass: float) -> str:
    """Why the token is no answer to the question; empty if it is one."""
    is_first_of_flow_factory = min_answer_mass == 0.0 and reply.num_tokens == 1
    if reply.is_all_thought and not is_first_of_flow_factory:
        of_first = f"P(Yes) + P(No) of its first token is {mass:.2g}; {_seen(reply)}"
        return f"the judge's reply is all thought; {of_first}; {HINT}"
    if not mass > 0.0:
        return f"neither Yes nor No is among the judge's candidates; {_seen(reply)}; {_what_to_do(reply)}"
    if mass < min_answer_mass - ROUNDING**2:
        return (
            f"the judge does not answer Yes or No: P(Yes) + P(No) is {mass:.2g}, below "
            f"min_answer_mass={min_answer_mass:g}; {_seen(reply)}; {_what_to_do(reply)}"
        )
    return ""


def _why_in_doubt(candidates: Candidates, yes: float | None, no: float | None) -> str:
    """Why a word that is not among the candidates could move the reward by more than `MAX_DOUBT`; empty if not."""
    if yes is not None and no is not None:
        return ""
    seen, known, missing = (yes, "Yes", "No") if yes is not None else (no, "No", "Yes")
    assert seen, "_why_no_answer() has refused a token without an answer"

    unseen = _most_unseen(candidates)
    doubt = unseen / (seen + unseen)
    if doubt <= MAX_DOUBT + ROUNDING**2:
        return ""

    least, most = (1 - doubt, 1.0) if known == "Yes" else (0.0, doubt)
    return (
        f"{missing} is not among the judge's {len(candidates)} candidates and may have a probability of {unseen:.2g} "
        f"beside the {seen:.2g} of {known}, so the reward is anything from {least:.2f} to {most:.2f}; raise "
        "top_logprobs (20 is the most), or ask a question that is answered by Yes or No in one word"
    )


def _most_unseen(candidates: Candidates) -> float:
    """The highest probability that a token which is not among the candidates can have.

    It has at most what the candidates leave of 1. It is also less likely than each of the likeliest tokens, which
    servers list. A server lists the chosen token first even if it is not among the likeliest: then it bounds nothing.
    """
    probabilities = [_probability(logprob) for _, logprob in candidates]
    left = max(0.0, 1.0 - math.fsum(probabilities))
    chosen, *others = probabilities
    are_sorted = others == sorted(others, reverse=True)
    is_apart = len(others) > 1 and chosen < others[-1] and are_sorted
    likeliest = others if is_apart else probabilities

    possible = [probability for probability in likeliest if probability > 0.0]
    return min([left, *possible])


def _seen(reply: Reply) -> str:
    """The likeliest candidates with their probabilities, in words."""
    tokens, probabilities = [], []
    for token, logprob in _likeliest(reply, NUM_SEEN):
        tokens.append(repr(token))
        probabilities.append(f"{_probability(logprob):.2g}")
    return (
        f"the first are {', '.join(tokens)} (probabilities {', '.join(probabilities)})"
    )


def _likeliest(reply: Reply, num: int) -> list[tuple[str, float]]:
    return sorted(reply.candidates, key=lambda candidate: -candidate[1])[:num]


def _what_to_do(reply: Reply) -> str:
    likeliest = _likeliest(reply, 3)
    if reply.has_thought or any(looks_like_thought(token) for token, _ in likeliest):
        return HINT
    if likeliest[0][0].startswith("token_id:"):
        return "the server writes tokens as numbers; start it without --return-tokens-as-token-ids"
    return "ask a question that is answered by Yes or No in one word"
