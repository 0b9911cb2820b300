from __future__ import annotations

import base64
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tasks.errors import ModelLoadError
from workers.judges import images
from workers.judges.images import DataUrls, data_url, evenly_spaced
from workers.judges.template import Template


@pytest.fixture
def encoded(monkeypatch):
    """The threads that encoded an image, in order."""
    threads: list[str] = []

    def slowly(image, image_format):
        threads.append(threading.current_thread().name)
        time.sleep(0.05)
        return data_url(image, image_format)

    monkeypatch.setattr(images, "data_url", slowly)
    monkeypatch.setattr("workers.judges.judge.DATA_URLS", DataUrls())
    return threads


@pytest.mark.parametrize(("image_format", "mime"), [("png", "png"), ("jpeg", "jpeg"), ("webp", "webp")])
def test_an_image_becomes_a_data_url_of_its_format(picture, image_format, mime):
    head, _, data = data_url(picture(), image_format).partition(",")
    assert head == f"data:image/{mime};base64"
    read = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (read.size, read.format) == ((32, 32), image_format.upper())
    if image_format == "png":
        assert read.tobytes() == picture().tobytes()


def test_the_formats_are_each_judges_own(judge_server, make_judge, picture):
    server = judge_server()
    make_judge("vllm_evaluate", server)(["x"], image=[picture()])
    make_judge("rational_rewards_t2i", server)(["x"], image=[picture()])
    make_judge("vllm_evaluate", server, image_format="webp")(["x"], image=[picture()])
    assert [q.images[0][0] for q in server.questions] == ["image/jpeg", "image/png", "image/webp"]


def test_an_image_is_encoded_once_however_many_rewards_ask(judge_server, make_judge, picture, encoded):
    server = judge_server()
    judges = [make_judge("vllm_evaluate", server, question=f"{i}?") for i in range(4)]
    with ThreadPoolExecutor(16, thread_name_prefix="task") as pool:
        list(pool.map(lambda i: judges[i % 4](["x"], image=[picture(i // 4)]), range(32)))
    assert len(encoded) == 8
    assert all(name.startswith("task") for name in encoded), "not on the event loop"


def test_another_format_size_or_content_is_another_image(picture, encoded):
    urls = DataUrls()
    tall, wide = (Image.fromarray(np.zeros(shape, np.uint8)) for shape in ((4, 2, 3), (2, 4, 3)))
    found = {urls.of(image, "png") for image in (picture(1), picture(2), tall, wide)} | {urls.of(picture(1), "jpeg")}
    assert len(found) == len(encoded) == 5


def test_the_least_recently_used_are_dropped(picture, encoded):
    urls = DataUrls(max_bytes=4 * len(data_url(picture(), "png")))
    for number in (1, 2, 3, 4, 1, 5):
        urls.of(picture(number), "png")
    assert len(encoded) == 5
    urls.of(picture(1), "png")
    assert len(encoded) == 5
    urls.of(picture(2), "png")
    assert len(encoded) == 6


def test_an_image_that_cannot_be_encoded_is_not_kept(picture, monkeypatch):
    urls = DataUrls()
    with pytest.raises(KeyError):
        urls.of(picture(), "no such format")
    with pytest.raises(KeyError):
        urls.of(picture(), "no such format")
    assert urls.of(picture(), "png")


@pytest.mark.parametrize(
    ("num_frames", "asked", "places"),
    [
        (9, 1, [0]), (9, 2, [0, 8]), (9, 3, [0, 4, 8]), (10, 4, [0, 3, 6, 9]), (81, 5, [0, 20, 40, 60, 80]),
        (1, 1, [0]), (1, 4, [0]), (3, 3, [0, 1, 2]), (3, 7, [0, 1, 2]), (2, 3, [0, 1]),
    ],
)  # fmt: skip
def test_frames_are_evenly_spaced_from_the_first_to_the_last(num_frames, asked, places):
    assert evenly_spaced(list(range(num_frames)), asked) == places


def test_a_template_puts_images_in_their_places():
    template = Template.parse("A {prompt}: <image>\nand\n<image>!", 2, needs_prompt=True)
    (message,) = template.messages("cat", [["u1"], ["u2", "u3"]])
    urls = [p["image_url"]["url"] if p["type"] == "image_url" else p["text"] for p in message["content"]]
    assert urls == ["A cat: ", "u1", "and", "u2", "u3", "!"]


def test_a_template_without_places_gets_its_images_first():
    (message,) = Template.parse("Good?", 2, needs_prompt=False).messages("cat", [["u1"], ["u2"]])
    assert [p["type"] for p in message["content"]] == ["image_url", "image_url", "text"]


def test_a_templates_system_message_ends_at_a_line_of_its_own():
    template = Template.parse(
        "Be strict with {prompt}. A === B\n===\n{prompt} <image>\n===\nrest", 1, needs_prompt=True
    )
    system, user = template.messages("a {cat}", [["u"]])
    assert system == {"role": "system", "content": "Be strict with a {cat}. A === B"}
    assert [p.get("text") for p in user["content"]] == ["a {cat} ", None, "===\nrest"]


@pytest.mark.parametrize(("text", "num_images"), [("{prompt} <image>", 2), ("{prompt} <image> <image> <image>", 2)])
def test_a_template_with_another_number_of_images_is_refused(text, num_images):
    with pytest.raises(ModelLoadError, match=f"needs {num_images}"):
        Template.parse(text, num_images, needs_prompt=True)
