from __future__ import annotations

import base64
import io
import math
import sys

import numpy as np
import openai
import pytest
from PIL import Image, ImageFilter

from trainer_client.cli.commands import free_port
from trainer_client.cli.fleet import Fleet
from trainer_client.cli.standin_judge import NAME, sharpness


@pytest.fixture
def judge(tmp_path):
    """An SDK's client of a stand-in judge in a process of its own."""
    port = free_port()
    with Fleet(tmp_path, say=print) as fleet:
        command = (sys.executable, "-m", "trainer_client.cli.standin_judge", "--port", str(port))
        process = fleet.start("judge", command, is_server=True)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="EMPTY", max_retries=0) as client:

            def answers() -> bool:
                try:
                    return bool(client.models.list().data)
                except openai.APIConnectionError:
                    return False

            fleet.wait_for(process, answers)
            yield client


def checkerboard() -> Image.Image:
    squares = np.indices((64, 64)).sum(axis=0) // 8 % 2
    return Image.fromarray((255 * squares).astype(np.uint8)).convert("RGB")


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def p_yes(client: openai.OpenAI, image: Image.Image) -> float:
    content = [
        {"type": "text", "text": "Is it good? Yes or No."},
        {"type": "image_url", "image_url": {"url": data_url(image)}},
    ]
    reply = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": content}], max_tokens=1, logprobs=True, top_logprobs=20
    )
    by_token = {c.token: math.exp(c.logprob) for c in reply.choices[0].logprobs.content[0].top_logprobs}
    assert reply.choices[0].message.content == max(by_token, key=by_token.get)
    assert sum(by_token.values()) == pytest.approx(1.0)
    return by_token[" Yes"]


def test_a_sharp_image_is_more_surely_a_yes_than_a_blurred_one(judge):
    sharp = checkerboard()
    rewards = [p_yes(judge, image) for image in (sharp, *(sharp.filter(ImageFilter.GaussianBlur(r)) for r in (2, 6)))]
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[0] > 0.5 > rewards[-1]


def test_it_lists_itself_as_a_stand_in(judge):
    assert [model.id for model in judge.models.list().data] == ["sharpness-standin"]


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "https://example.org/a.png", "data:image/png;base64,!"])
def test_what_is_no_image_is_the_callers_error(judge, url):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError, match="needs an image"):
        judge.chat.completions.create(model=NAME, messages=[{"role": "user", "content": content}])


def test_sharpness_is_the_variance_of_the_laplacian():
    dot = np.zeros((5, 5), dtype=np.uint8)
    dot[2, 2] = 100
    # Inside the border the Laplacian is -400 at the dot, 100 at its four neighbours, 0 at the four corners.
    laplacian = np.array([-400, 100, 100, 100, 100, 0, 0, 0, 0])
    assert sharpness(Image.fromarray(dot)) == pytest.approx(laplacian.var())
