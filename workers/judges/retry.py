"""How a judge's call is retried: how often, after which failure at another server, and which server cools down.

The SDK makes the retries at one server, with its own pauses; `inner_errors` gives an answer of 200 with an error inside
a status, so that the SDK retries such an answer too. Which errors another server may mend is in `failures`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

import openai

from workers.judges import failures
from workers.judges.client import Requests
from workers.judges.endpoints import Endpoint, says_no_such_model
from workers.judges.reply import Reply

ChooseServer = Callable[[Sequence[Endpoint]], AbstractAsyncContextManager[Endpoint]]
"""Chooses one of some servers, and holds a permit for it meanwhile."""

AskServer = Callable[[Endpoint, int], Awaitable[Reply]]
"""Asks a server, with at most so many retries by the SDK."""


async def ask_with_retries(
    endpoints: Sequence[Endpoint],
    max_retries: int,
    count: Requests,
    choose: ChooseServer,
    ask: AskServer,
) -> Reply:
    """Ask the least busy server, and after its failure the next one.

    A server is asked without retries while another server is well, and with all retries that are left otherwise:
    a well server answers sooner than one that has just failed.

    Args:
        max_retries: How many retries a question has. A request to an earlier server counts as a retry.
        count: The question's requests so far, the SDK's retries included.
        choose: Gives one of the servers that are left.
        ask: Asks a server.

    Raises:
        openai.OpenAIError: The last error, if no other server may help.
        BusyError: `choose` found no permit at any server that is left.
    """
    left = list(endpoints)
    while True:
        async with choose(left) as endpoint:
            left.remove(endpoint)
            count.endpoint = endpoint
            another_is_well = any(other.is_well for other in left)
            retries = 0 if another_is_well else max(0, max_retries - count.num)
            try:
                reply = await ask(endpoint, retries)
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                _note_failure(endpoint, error)
                if another_is_well and failures.may_help_elsewhere(error):
                    continue
                raise
            endpoint.answered()
            return reply


# --- private -------------------------------------------------------------------------------------


def _note_failure(endpoint: Endpoint, error: openai.OpenAIError) -> None:
    """Keep what an error says of the server: whether its list of models is outdated, and whether it cools down."""
    endpoint.is_doubted |= says_no_such_model(error)
    if failures.is_the_servers(error):
        endpoint.failed()
    else:
        endpoint.answered()
