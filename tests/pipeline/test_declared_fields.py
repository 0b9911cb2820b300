"""Only the prompt and the fields that a reward declares travel: what is in Redis once a step was sent."""

from __future__ import annotations

import numpy as np
import pytest

from tasks import keys
from tasks.errors import WireError
from tasks.messages import MediaRef, ScoreRequest, unpack
from tasks.servers.connections import connect
from tests.reward_models import image_of
from trainer_client import Sample

VIDEO = np.stack([image_of(n) for n in (7, 8)])
WAVE = np.linspace(-1, 1, 400, dtype=np.float32)


def sample_of_everything(number: int) -> Sample:
    return Sample(
        prompt=f"number {number}",
        image=image_of(number),
        video=VIDEO,
        audio=WAVE,
        condition_images=[image_of(90), image_of(91)],
        condition_videos=[VIDEO],
        metadata={"secret": "metadata"},
    )


@pytest.fixture
def stored(settings):
    """What a flushed client has put into the payload store: its requests by reward, and the media beside them."""

    def read() -> tuple[dict[str, ScoreRequest], dict[str, bytes]]:
        requests, media = {}, {}
        with connect(settings.payloads) as store:
            for key in store.keys(keys.payload("*")):
                data = store.get(key)
                try:
                    request = unpack(ScoreRequest, data)
                    requests[request.reward.name] = request
                except WireError:
                    media[key.decode()] = data
        return requests, media

    return read


def test_a_reward_of_the_prompt_alone_sends_no_media_and_no_metadata(clients, stored):
    client = clients("TextLength")
    client.submit([sample_of_everything(1), sample_of_everything(2)])
    client.flush()
    requests, media = stored()
    assert media == {}
    (request,) = requests.values()
    # in either order: two threads prepare them
    assert sorted((s.prompt, s.media, s.metadata) for s in request.samples) == [
        ("number 1", {}, {}),
        ("number 2", {}, {}),
    ]


def test_each_of_two_rewards_is_sent_its_own_fields_and_what_neither_declares_is_not_stored(clients, stored):
    client = clients(
        "TextLength",
        {"reward_model": "TensorMean"},
        {"reward_model": "jpeg_compressibility", "name": "jpeg"},
        {"reward_model": "RaisesOn", "required_fields": ["video", "condition_images", "metadata"]},
    )
    client.submit([sample_of_everything(1)])
    client.flush()
    requests, media = stored()
    (text,), (mean,), (jpeg,), (edit,) = (
        requests[name].samples for name in ("TextLength", "TensorMean", "jpeg", "RaisesOn")
    )
    assert (text.media, text.metadata) == ({}, {})
    assert (set(mean.media), mean.metadata) == ({"image"}, {})
    assert (set(jpeg.media), jpeg.metadata) == ({"image", "video"}, {})
    assert (set(edit.media), edit.metadata) == ({"video", "condition_images"}, {"secret": "metadata"})
    bytes_stored = sorted(media.values())
    arrays = [image_of(1), VIDEO, image_of(90), image_of(91)]
    assert bytes_stored == sorted(a.tobytes() for a in arrays), "each once, and neither audio nor condition videos"
    named = {ref.name for s in (mean, jpeg, edit) for ref in refs(s.media)}
    assert {keys.payload(name) for name in named} == set(media)


def refs(media: dict[str, MediaRef | tuple[MediaRef, ...]]) -> list[MediaRef]:
    return [ref for value in media.values() for ref in (value if isinstance(value, tuple) else (value,))]
