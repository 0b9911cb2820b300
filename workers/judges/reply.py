"""A judge's reply: its text, the thought before the answer, and the candidates for the answer's first token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.base import Unscored
from workers.judges.inner_errors import cut
from workers.judges.thought import HINT, has_thought, without_thought
from workers.judges.tokens import answer_begins, end_with

COMPLETE = ("stop", "eos", "eos_token", "stop_sequence", "end_turn", None)
"""Finish reasons of a reply that ended by itself; some servers give none."""

UNKNOWN = -9999.0
"""What OpenAI gives as the log probability of a chosen token that is not among the likeliest: it says nothing."""

_THOUGHT_FIELDS = (
    "reasoning",
    "reasoning_content",
    "reasoning_text",
    "thinking",
    "thought",
)
"""Fields of a message in which servers hand a thought over: vLLM and OpenRouter, SGLang and DeepSeek, Ollama."""

_THOUGHT_LISTS = ("reasoning_details", "thinking_blocks")
"""The same as lists of parts: OpenRouter, LiteLLM."""

_THOUGHT_PARTS = ("thinking", "redacted_thinking", "reasoning", "thought")
"""Types of a content's parts that are thought: Mistral, Anthropic's through proxies."""

Candidates = tuple[tuple[str, float], ...]
"""Text and log probability of tokens, as the server lists them."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A chat completion."""

    text: str
    """What the judge wrote, as the server sent it; a thought may be part of it."""
    finish_reason: str | None
    candidates: Candidates
    """For the first token of the answer, or of the reply if that is all thought; empty if the server gave none."""
    model: str
    num_requests: int
    thought: str = ""
    """What the server handed over apart from the text."""
    num_tokens: int = 0
    """How many tokens have log probabilities."""

    @property
    def answer(self) -> str:
        """The text without the thought."""
        return without_thought(self.text)

    @property
    def has_thought(self) -> bool:
        """Whether the judge thought before it answered."""
        return bool(self.thought) or has_thought(self.text)

    @property
    def is_all_thought(self) -> bool:
        """Whether there is a thought and no answer."""
        return self.has_thought and not self.answer

    def complete_text(self, needed: str = "answer") -> str:
        """The answer, if it is whole.

        Args:
            needed: What the reply has to have, for the reason if it is all thought.

        Raises:
            Unscored: `unparsable`; it was cut, is empty or all thought. What arrived is kept in its info.
        """
        info = {
            "judge": {
                "text": self.text,
                "finish_reason": self.finish_reason,
                **self.thought_info(),
            }
        }
        if self.finish_reason == "length" and self.is_all_thought:
            words = f"the judge's reply was cut at max_tokens within its thought; raise max_tokens; {HINT}"
            raise Unscored("unparsable", words, info)
        if self.finish_reason == "length":
            raise Unscored(
                "unparsable",
                "the judge's reply was cut at max_tokens; it is not scored on a part",
                info,
            )
        if self.finish_reason not in COMPLETE:
            raise Unscored(
                "unparsable",
                f"the judge's reply ended by {self.finish_reason!r}, not by itself",
                info,
            )
        if self.is_all_thought:
            raise Unscored(
                "unparsable",
                f"the judge's reply is all thought, with no {needed}; {HINT}",
                info,
            )
        if not self.answer:
            raise Unscored("unparsable", "the judge's reply is empty", info)
        return self.answer

    def thought_info(self) -> dict[str, str]:
        """The beginning of a thought that is not in the text, for what is kept beside a reward."""
        return {"thought": cut(self.thought)} if self.thought else {}


def read_reply(content: bytes, model: str, num_requests: int) -> Reply:
    """The reply in the body of an answer.

    Raises:
        Unscored: `failed`; it is no chat completion, or one without a choice. `unparsable`; the judge refused.
    """
    try:
        choice = json.loads(content)["choices"][0]
        message = choice["message"]
        text, thought = _text_and_thought(message)
        tokens = [
            _token(t) for t in (choice.get("logprobs") or {}).get("content") or ()
        ]
        finish_reason, refusal = choice.get("finish_reason"), message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError):
        words = cut(content.decode("utf-8", "replace"))
        raise Unscored(
            "failed", f"the judge's server sent no chat completion but {words!r}"
        ) from None
    if refusal and not text.strip():
        raise Unscored(
            "unparsable",
            f"the judge refuses: {cut(str(refusal))!r}",
            {"judge": {"text": text}},
        )
    return Reply(
        text=text,
        finish_reason=finish_reason,
        candidates=_candidates(tokens, text, thought),
        model=model,
        num_requests=num_requests,
        thought=thought,
        num_tokens=len(tokens),
    )


# --- private -------------------------------------------------------------------------------------

Token = tuple[str, Candidates]
"""The text of a token that was chosen, and what was to choose from."""


def _token(found: Mapping[str, Any]) -> Token:
    """The chosen token stands first where it is less likely than all that are listed; one listed twice is one."""
    chosen = str(found["token"]), _logprob(found.get("logprob"))
    listed = [
        (str(one["token"]), _logprob(one["logprob"]))
        for one in found.get("top_logprobs") or ()
    ]
    is_apart = (
        UNKNOWN < chosen[1] < min((logprob for _, logprob in listed), default=math.inf)
    )
    if not listed or (is_apart and chosen[0] not in (token for token, _ in listed)):
        listed.insert(0, chosen)
    return chosen[0], tuple(dict.fromkeys(listed))


def _logprob(value: Any) -> float:
    """A log probability; null is how servers write that of a token which cannot come, since JSON has no infinity."""
    return -math.inf if value is None else float(value)


def _candidates(tokens: list[Token], text: str, thought: str) -> Candidates:
    """Those of the answer's first token; without an answer those of the first token, which a reason tells."""
    answer = without_thought(text)
    place: int | None = 0
    if answer:
        chosen = [token for token, _ in tokens]
        is_thinking = bool(thought) or has_thought(text)
        is_of_thought = bool(thought) and end_with(
            chosen, thought
        )  # whose last word may be that of the answer
        place = None if is_of_thought else answer_begins(chosen, answer, is_thinking)
    return tokens[place][1] if tokens and place is not None else ()


def _text_and_thought(message: Mapping[str, Any]) -> tuple[str, str]:
    """The text of a message, and the thought that is handed over apart from the text."""
    thoughts = [
        _words(message.get(name)) for name in (*_THOUGHT_FIELDS, *_THOUGHT_LISTS)
    ]
    content = message.get("content")
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        is_thought = isinstance(part, Mapping) and (
            part.get("type") in _THOUGHT_PARTS or part.get("thought") is True
        )
        (thoughts if is_thought else texts).append(_words(part))
    return "".join(texts), next(
        (thought for thought in thoughts if thought.strip()), ""
    )


def _words(value: Any) -> str:
    """The text in a part of a message: a text, a mapping with one, or a list of those."""
    if isinstance(value, list):
        return "".join(_words(one) for one in value)
    if isinstance(value, Mapping):
        names = ("text", "thinking", "reasoning", "content", "summary")
        return next(
            (
                _words(value[name])
                for name in names
                if isinstance(value.get(name), str | list)
            ),
            "",
        )
    return value if isinstance(value, str) else ""
