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
"""Finish reasons of a reply that ended by itself; some servers give no reason."""

NO_COMPLETION = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,  # a whole number of hundreds of digits
    RecursionError,
)
"""What reading a body raises that is JSON of another kind, or none."""

MAX_TEXT_CHARS = 2**19
"""A longer reply is no answer to any of our questions: four times what 32,000 tokens of thought are."""

UNKNOWN = -9999.0
"""The log probability that OpenAI gives for a chosen token that is not among the likeliest; it means unknown."""

_THOUGHT_FIELDS = (
    "reasoning",
    "reasoning_content",
    "reasoning_text",
    "thinking",
    "thought",
)
"""Fields of a message that hold a thought: of vLLM and OpenRouter, SGLang and DeepSeek, Ollama."""

_THOUGHT_LISTS = ("reasoning_details", "thinking_blocks")
"""Fields that hold a thought as a list of parts: of OpenRouter, LiteLLM."""

_THOUGHT_PARTS = ("thinking", "redacted_thinking", "reasoning", "thought")
"""Types of the parts of a content that are a thought: of Mistral, and of Anthropic through proxies."""

Candidates = tuple[tuple[str, float], ...]
"""Text and log probability of tokens, as the server lists them."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A chat completion."""

    text: str
    """The judge's words as the server sent them; a thought may be part of them."""
    finish_reason: str | None
    candidates: Candidates
    """For the first token of the answer, or of the reply if it is all thought; empty if the server gave none."""
    model: str
    num_requests: int
    thought: str = ""
    """The thought that the server sent apart from the text."""
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
            needed: What the reply has to contain, for the reason if it is all thought.

        Raises:
            Unscored: `unparsable`; the reply was cut, is empty or all thought. Its info keeps the text that arrived.
        """
        why_not = self._why_incomplete(needed)
        if why_not:
            info = {
                "text": self.text,
                "finish_reason": self.finish_reason,
                **self.thought_info(),
            }
            raise Unscored("unparsable", why_not, {"judge": info})
        return self.answer

    def _why_incomplete(self, needed: str) -> str:
        """Why the answer is not whole; empty if it is."""
        if self.finish_reason == "length" and self.is_all_thought:
            return f"the judge's reply was cut at max_tokens within its thought; raise max_tokens; {HINT}"
        if self.finish_reason == "length":
            return "the judge's reply was cut at max_tokens; it is not scored on a part"
        if self.finish_reason not in COMPLETE:
            return f"the judge's reply ended by {self.finish_reason!r}, not by itself"
        if self.is_all_thought:
            return f"the judge's reply is all thought, with no {needed}; {HINT}"
        return "" if self.answer else "the judge's reply is empty"

    def thought_info(self) -> dict[str, str]:
        """The beginning of a thought that is not in the text, to keep beside the reward."""
        return {"thought": cut(self.thought)} if self.thought else {}


def read_reply(content: bytes, model: str, num_requests: int) -> Reply:
    """The reply in the body of an answer.

    Raises:
        Unscored: `failed`; the body is no chat completion, or has no choice. `unparsable`; the judge refused, or said
            more than is read.
    """
    try:
        choice = json.loads(content)["choices"][0]
        message = choice["message"]
        text, thought = _text_and_thought(message)
        logprobs = (choice.get("logprobs") or {}).get("content") or ()
        tokens = [_token(one) for one in logprobs]
        finish_reason, refusal = choice.get("finish_reason"), message.get("refusal")
    except NO_COMPLETION:
        words = cut(content.decode("utf-8", "replace"))
        raise Unscored(
            "failed", f"the judge's server sent no chat completion but {words!r}"
        ) from None

    if len(text) + len(thought) > MAX_TEXT_CHARS:
        words = f"the judge's reply has {len(text) + len(thought)} characters; at most {MAX_TEXT_CHARS} are read"
        raise Unscored("unparsable", words, {"judge": {"text": cut(text)}})
    if refusal and not text.strip():
        words = cut(str(refusal))
        info = {"judge": {"text": text}}
        raise Unscored("unparsable", f"the judge refuses: {words!r}", info)
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
"""The text of a chosen token, and the tokens from which it was chosen."""


def _token(found: Mapping[str, Any]) -> Token:
    """The chosen token with its candidates, each once.

    The chosen token comes first if the server does not list it although its probability is known.
    """
    chosen = str(found["token"]), _logprob(found.get("logprob"))
    listed = []
    for one in found.get("top_logprobs") or ():
        listed.append((str(one["token"]), _logprob(one["logprob"])))

    if not listed or _is_apart(chosen, listed):
        listed.insert(0, chosen)
    return chosen[0], tuple(dict.fromkeys(listed))


def _is_apart(chosen: tuple[str, float], listed: list[tuple[str, float]]) -> bool:
    """Whether the chosen token is less likely than all that are listed, and is not among them."""
    token, logprob = chosen
    least_listed = min(logprob for _, logprob in listed)
    if not UNKNOWN < logprob < least_listed:
        return False
    return all(token != other for other, _ in listed)


def _logprob(value: Any) -> float:
    """A log probability. Servers write null for a token that cannot come, since JSON has no infinity."""
    return -math.inf if value is None else float(value)


def _candidates(tokens: list[Token], text: str, thought: str) -> Candidates:
    """The candidates of the answer's first token; without an answer those of the first token, for the reason."""
    if not tokens:
        return ()
    answer = without_thought(text)
    if not answer:
        return tokens[0][1]

    chosen = [token for token, _ in tokens]
    # The tokens may be those of the thought alone, whose last word may be the word of the answer.
    if thought and end_with(chosen, thought):
        return ()
    is_thinking = bool(thought) or has_thought(text)
    first = answer_begins(chosen, answer, is_thinking)
    return () if first is None else tokens[first][1]


def _text_and_thought(message: Mapping[str, Any]) -> tuple[str, str]:
    """The text of a message, and the thought that the server sent apart from the text."""
    thoughts = []
    for name in (*_THOUGHT_FIELDS, *_THOUGHT_LISTS):
        thoughts.append(_words(message.get(name)))

    texts: list[str] = []
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        if _is_thought(part):
            thoughts.append(_words(part))
        else:
            texts.append(_words(part))

    for thought in thoughts:
        if thought.strip():
            return "".join(texts), thought
    return "".join(texts), ""


def _is_thought(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    return part.get("type") in _THOUGHT_PARTS or part.get("thought") is True


def _words(value: Any) -> str:
    """The text in a part of a message: a text, a mapping that has a text, or a list of parts."""
    if isinstance(value, list):
        return "".join(map(_words, value))
    if isinstance(value, Mapping):
        for name in ("text", "thinking", "reasoning", "content", "summary"):
            if isinstance(value.get(name), str | list):
                return _words(value[name])
        return ""
    return value if isinstance(value, str) else ""
