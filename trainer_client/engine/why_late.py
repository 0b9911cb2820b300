"""Why something is late: reasons by source, each set and withdrawn by its owner."""

from __future__ import annotations

from enum import Enum


class Source(Enum):
    """Who gives a reason. In the order in which people are told."""

    QUEUE = "a queue without a worker that can serve us"
    AHEAD = "messages that come before ours in their queue"
    LOADING = "a worker that loads a model"
    SUSPECTS = "samples that ended their workers"
    NOTE = "what a worker said of a request that it could not read"
    BUDGET = "a judge whose permits are all taken"
    STORED = "whose bytes a full store holds"
    STORE_FULL = "the payload store has no room"
    SENDING = "a server that is away, for what is sent"
    POLLING = "a server that is away, for what is read"


def because(why: str | None) -> str:
    """The reason as the end of a sentence; nothing if there is none."""
    return f": {why}" if why else ""


class WhyLate:
    """The reasons at this moment. A source may have several, each about something of its own.

    Owners: the loop for servers (`SENDING`, `POLLING`), by lane; the state for `NOTE` and `BUDGET`, by the reward's
    fingerprint, and for `STORE_FULL`; whoever waits, and so asks Redis, for the rest.
    """

    def __init__(self) -> None:
        self._words: dict[tuple[Source, str], str] = {}

    def set(self, source: Source, words: str, about: str = "") -> None:
        """There is a reason, or it has other words now."""
        self._words[source, about] = words

    def withdraw(self, source: Source, about: str = "") -> None:
        """That reason is none any more. Reasons of other sources, or about something else, stay."""
        self._words.pop((source, about), None)

    def put(self, source: Source, words: str | None, about: str = "") -> None:
        """Set the reason, or withdraw it if there are no words."""
        if words:
            self.set(source, words, about)
        else:
            self.withdraw(source, about)

    def words(self, *sources: Source) -> str | None:
        """The reasons of these sources (of all unless given), each once, in the order of `Source`; None without any."""
        wanted = sources or tuple(Source)
        found: dict[str, None] = {}
        for source in Source:
            for (owner, _), words in self._words.items():
                if owner is source and source in wanted:
                    found[words] = None
        return "; ".join(found) or None
