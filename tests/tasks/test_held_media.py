"""Media that are changed after `submit()` has taken them: what is noticed, and what a look at them must not do."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tasks import media
from tasks.errors import InvalidSampleError

RNG = np.random.default_rng(11)


def pixels(height: int = 64, width: int = 48) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def hold(value) -> media.Held:
    return media.hold(value, num_spots=media.NUM_SPOTS)


def encode(held: media.Held) -> np.ndarray:
    return media.encode_image(held, "sample 3: image")


def in_file(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer


def read_only() -> np.ndarray:
    array = pixels()
    array.flags.writeable = False
    return array


def loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image


def mapped(tmp_path) -> np.ndarray:
    pixels().tofile(tmp_path / "pixels")
    return np.memmap(tmp_path / "pixels", np.uint8, "r+", shape=(64, 48, 3))


FORMS = {
    "array": pixels,
    "read only": read_only,
    "not contiguous": lambda: pixels(200, 200)[::3, ::-2],
    "column-major": lambda: np.asfortranarray(pixels()),
    "float": lambda: pixels().transpose(2, 0, 1) / 255,
    "big-endian half": lambda: (pixels().transpose(2, 0, 1) / 255).astype(">f2"),
    "one value everywhere": lambda: np.broadcast_to(np.uint8(3), (64, 48, 3)),
    "one pixel": lambda: pixels(1, 1),
    "masked": lambda: np.ma.masked_array(pixels(), mask=False),
    "recarray": lambda: pixels().view(np.recarray),
    "tensor": lambda: torch.from_numpy(pixels()),
    "bfloat16": lambda: torch.rand(3, 64, 48).bfloat16(),
    "inference": lambda: made_in_inference_mode(),
    "needs grad": lambda: torch.rand(3, 64, 48, requires_grad=True),
    "RGB": lambda: Image.fromarray(pixels()),
    "L": lambda: Image.fromarray(pixels()).convert("L"),
    "1": lambda: Image.fromarray(pixels()).convert("1"),
    "P": lambda: Image.fromarray(pixels()).quantize(16),
    "RGBA": lambda: Image.fromarray(pixels()).convert("RGBA"),
    "tiny": lambda: Image.new("RGB", (1, 1)),
    "unread PNG": lambda: Image.open(in_file(Image.fromarray(pixels()))),
    "unread WEBP": lambda: Image.open(in_file(Image.fromarray(pixels()), "WEBP")),
    "read GIF": lambda: loaded(Image.open(in_file(Image.fromarray(pixels()), "GIF"))),
}


def made_in_inference_mode():
    with torch.inference_mode():
        return torch.rand(3, 64, 48).clone()


@pytest.mark.parametrize("form", FORMS)
def test_media_of_every_form_that_nobody_changes_are_taken(form):
    image = FORMS[form]()
    held = hold(image)
    again = media.encode_image(media.hold(image), "image")
    assert np.array_equal(encode(held), again)
    assert np.array_equal(encode(held), again)  # as where it is sent a second time


def test_a_mapped_file_is_taken_and_a_change_of_it_noticed(tmp_path):
    array = mapped(tmp_path)
    held = hold(array)
    encode(held)
    array[:] = pixels()
    with pytest.raises(InvalidSampleError, match="was changed after submit"):
        encode(held)


def refill_tensor_of_array():
    array = pixels()
    tensor = torch.from_numpy(array)
    return tensor, lambda: array.__setitem__(slice(None), pixels())


def refill(image):
    def change():
        image[:] = pixels(*image.shape[:2]) if image.dtype == np.uint8 else RNG.random(image.shape)

    return image, change


def paste_into(image):
    return image, lambda: image.paste(Image.fromarray(pixels(image.height, image.width)).convert(image.mode))


def other_palette():
    image = Image.fromarray(pixels()).quantize(16)
    return image, lambda: image.putpalette(bytes(range(48)))


def another_frame(is_read: bool):
    frames = [Image.fromarray(pixels()) for _ in range(3)]
    image = Image.open(in_file(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    if is_read:
        image.load()
    return image, lambda: image.seek(1)


def another_frame_of_webp():
    frames = [Image.fromarray(pixels()) for _ in range(3)]
    image = Image.open(in_file(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    image.load()
    return image, lambda: image.seek(1)


def same_buffer_again():
    buffer = in_file(Image.fromarray(pixels()), "BMP")
    image = Image.open(buffer)

    def change():
        buffer.seek(0)
        Image.fromarray(pixels()).save(buffer, "BMP")

    return image, change


CHANGES = {
    "array": lambda: refill(pixels()),
    "view": lambda: refill(pixels(200, 200)[::3, ::-2]),
    "float": lambda: refill(pixels().transpose(2, 0, 1) / 255),
    "big": lambda: refill(pixels(1024, 1024)),
    "tensor that shares an array's memory": refill_tensor_of_array,
    "tensor of inference mode": lambda: changed_in_inference_mode(),
    "PIL": lambda: paste_into(Image.fromarray(pixels())),
    "PIL of one bit": lambda: paste_into(Image.fromarray(pixels()).convert("1")),
    "palette": other_palette,
    "frame of a file": lambda: another_frame(is_read=False),
    "frame of a read file": lambda: another_frame(is_read=True),
    "frame of a WEBP": another_frame_of_webp,
    "buffer of a file": same_buffer_again,
}


def changed_in_inference_mode():
    tensor = made_in_inference_mode()

    def change():
        with torch.inference_mode():
            tensor.copy_(torch.rand(3, 64, 48))

    return tensor, change


@pytest.mark.parametrize("how", CHANGES)
def test_media_that_are_filled_anew_are_refused_with_what_to_do(how):
    image, change = CHANGES[how]()
    held, in_video = hold(image), hold([image, image])
    change()
    with pytest.raises(InvalidSampleError, match=r"sample 3: image: the \w+ was changed .*flush\(\) before you reuse"):
        encode(held)
    with pytest.raises(InvalidSampleError, match=r"sample 3: video\[0\]: the \w+ was changed after submit\(\)"):
        media.encode_video(in_video, "sample 3: video")


def test_a_file_that_is_written_anew_before_it_is_read_is_refused(tmp_path):
    path = tmp_path / "image.bmp"
    Image.fromarray(pixels()).save(path)
    with Image.open(path) as image:
        held = hold(image)
        Image.fromarray(pixels()).resize((96, 96)).save(path)
        with pytest.raises(InvalidSampleError, match="the image was changed after submit"):
            encode(held)


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "ppm"])
def test_a_file_in_whose_place_another_is_put_has_its_own_pixels_or_is_refused(tmp_path, kind):
    path, first = tmp_path / f"image.{kind}", pixels()
    Image.fromarray(first).save(path)
    with Image.open(path) as image:
        held = hold(image)
        Image.fromarray(pixels()).save(tmp_path / f"new.{kind}")
        (tmp_path / f"new.{kind}").rename(path)
        found = first
        with contextlib.suppress(InvalidSampleError):
            found = encode(held)
        assert np.array_equal(found, first)


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_an_image_file_that_is_read_by_nobody_else_is_taken(tmp_path, kind):
    Image.fromarray(first := pixels()).save(tmp_path / f"image.{kind}")
    with Image.open(tmp_path / f"image.{kind}") as image:
        assert np.array_equal(encode(hold(image)), first)


def test_one_object_of_a_list_may_be_read_for_another_sample_first():
    image = Image.open(in_file(Image.fromarray(pixels())))
    first, second = hold(image), hold(image)
    assert np.array_equal(encode(first), encode(second))


def test_a_look_at_an_unread_image_does_not_read_it():
    image = Image.open(in_file(Image.fromarray(pixels())))
    hold(image)
    assert image.tile
    webp = Image.open(in_file(Image.fromarray(pixels()), "WEBP"))
    hold(webp)
    assert webp._im is None


def test_a_probe_of_what_cannot_be_looked_at_is_no_error():
    class Hostile(np.ndarray):
        def __array_finalize__(self, obj):
            pass

        def __getitem__(self, at):
            raise ZeroDivisionError("hostile")

    assert hold(pixels().view(Hostile)).value is not None
    closed = Image.open(in_file(Image.fromarray(pixels())))
    closed.close()
    assert hold(closed).value is closed


@pytest.mark.parametrize("num_pixels", [1000, 10_000, 1024 * 1024])
def test_a_change_of_a_tenth_is_nearly_always_noticed(num_pixels):
    """The chance that none of 256 places is in a tenth of the image is 0.9^256, 2e-12."""
    array = np.zeros((num_pixels // 50, 50, 3), np.uint8)
    held = hold(array)
    height = array.shape[0] // 10
    array[height : 2 * height] = 1
    with pytest.raises(InvalidSampleError, match="the array was changed"):
        encode(held)
    image = Image.new("RGB", (500, 500))
    held = hold(image)
    ImageDraw.Draw(image).rectangle((100, 100, 258, 258), fill=(1, 1, 1))
    with pytest.raises(InvalidSampleError, match="the image was changed"):
        encode(held)


def test_a_change_after_the_pixels_were_taken_and_before_their_digest_is_noticed():
    array = pixels()
    held = hold(array)
    taken = encode(held)  # shares the memory
    assert np.shares_memory(taken, array)
    array[:] = pixels()
    with pytest.raises(InvalidSampleError, match="was changed"):
        media.check_unchanged(held, "sample 3: image")


def test_without_probes_only_versions_tell():
    array = pixels()
    held = media.hold(array)
    array[:] = 0
    assert (encode(held) == 0).all()
