"""The catalog's entries of the rewards that a server of the user's computes: their options and defaults. Data only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tasks.catalog.entry import IMAGE_OR_VIDEO, VLM, How, ModelEntry, Option
from tasks.servers.http_urls import ServerUrls
from tasks.settings import Seconds

_Field = Literal[
    "prompt",
    "image",
    "video",
    "condition_images",
    "condition_videos",
    "metadata",
    "fps",
]


def _remote(name: str, how: How, doc: str) -> ModelEntry:
    return ModelEntry(
        path=f"workers.remote.models:{name}",
        queue=VLM,
        required=(("prompt",), IMAGE_OR_VIDEO),
        version="1",
        extra="remote",
        how=how,
        timeout_s=300.0,
        is_yours=True,
        options={
            "server_url": Option(
                ServerUrls,
                "",
                "URL of the reward server, or a list of servers that give the same rewards: the least busy is asked",
                is_needed=True,
            ),
            "timeout": Option(
                Seconds,
                60.0,
                "seconds for one request; timeout_s is for all that a chunk takes",
                is_answer=False,
            ),
            "retry_attempts": Option(
                Annotated[int, Field(ge=1)],
                3,
                "requests in all if no answer comes, one more for each further server",
                is_answer=False,
            ),
            "required_fields": Option(
                Annotated[list[_Field], Field(min_length=1)] | None,
                None,
                "fields of a sample that the server is sent; the prompt with the image or video unless given",
            ),
        },
        doc=doc,
    )


REMOTE_POINTWISE = _remote(
    "RemotePointwiseRewardModel",
    "each",
    "what a reward server of yours says of each sample",
)

REMOTE_GROUPWISE = _remote(
    "RemoteGroupwiseRewardModel",
    "model",
    "what a reward server of yours says of the members of a group",
)
