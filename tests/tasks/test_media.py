from __future__ import annotations

import io
import math
import os
import signal
import struct
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tasks import media
from tasks.errors import InvalidSampleError

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (13, 7, 3), np.uint8)


def encode(image) -> np.ndarray:
    media.check_image(image, "image", 10**8)
    return media.encode_image(media.hold(image), "image")


def encode_video(video) -> np.ndarray:
    media.check_video(video, "video", 10**8)
    return media.encode_video(media.hold(video), "video")


def problem_of(image) -> str:
    with pytest.raises(InvalidSampleError) as caught:
        encode(image)
    return str(caught.value)


def file_of(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def nearest_level(value: float) -> int:
    """The level of 0..255 that lies nearest, by comparing all of them."""
    return min(range(256), key=lambda level: abs(level / 255 - value))


@pytest.mark.parametrize(
    "image",
    [
        PIXELS,
        np.asfortranarray(PIXELS),
        np.repeat(PIXELS, 2, axis=0)[::2],
        PIXELS[::-1][::-1],
        Image.fromarray(PIXELS),
        Image.open(io.BytesIO(file_of(Image.fromarray(PIXELS), "PNG"))),
        Image.fromarray(PIXELS).convert("RGBA"),
        PIXELS.transpose(2, 0, 1) / 255,
        (PIXELS.transpose(2, 0, 1) / 255).astype(np.float32),
        (PIXELS.transpose(2, 0, 1) / 255).astype(">f8"),
        np.asfortranarray((PIXELS / 255).transpose(2, 0, 1)),
    ],
)
def test_all_forms_of_one_image_are_the_same_pixels(image):
    pixels = encode(image)
    assert np.array_equal(pixels, PIXELS)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_a_contiguous_array_is_not_copied():
    assert np.shares_memory(encode(PIXELS), PIXELS)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_rounded_to_the_nearest_level(dtype):
    values = RNG.random((3, 11, 5)).astype(dtype)
    expected = [[[nearest_level(float(v)) for v in row] for row in plane] for plane in values]
    assert np.array_equal(encode(values), np.transpose(expected, (1, 2, 0)))


def test_half_floats_on_the_edge_between_two_levels_are_rounded_as_exactly_as_others():
    values = np.arange(0, 1, 2.0**-11).astype(np.float16)  # many lie between two levels
    values = values[values != 0.5]  # as near to 127 as to 128
    image = np.broadcast_to(values, (3, 1, len(values)))
    assert encode(image)[0, :, 0].tolist() == [nearest_level(float(v)) for v in values]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_torch_floats_are_rounded_to_the_nearest_level(name):
    import torch

    values = torch.rand((3, 9, 4), generator=torch.Generator().manual_seed(3)).to(getattr(torch, name))
    expected = [[[nearest_level(v) for v in row] for row in plane] for plane in values.tolist()]
    assert np.array_equal(encode(values), np.transpose(expected, (1, 2, 0)))


def test_torch_tensors_of_every_kind_are_taken():
    import torch

    pixels = torch.from_numpy(PIXELS.copy())
    floats = pixels.permute(2, 0, 1).double() / 255
    for tensor in (pixels, pixels.flip(0).flip(0), floats, floats.clone().requires_grad_(), floats[:, :, :]):
        assert np.array_equal(encode(tensor), PIXELS)


@pytest.mark.parametrize("kind", ["sparse", "meta", "wrapped"])
def test_tensors_whose_values_are_not_here_are_refused(kind):
    torch = pytest.importorskip("torch")

    class Wrapped(torch.Tensor):
        """A shape whose values are elsewhere, as distributed tensors are made."""

        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (3, 8, 8))

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return args[0]

    plain = torch.zeros(3, 8, 8)
    tensor = {"sparse": plain.to_sparse, "meta": lambda: plain.to("meta"), "wrapped": Wrapped}[kind]()
    with pytest.raises(InvalidSampleError, match=r"image: a .+ cannot be read as a plain tensor"):
        encode(tensor)


def test_tensors_made_in_inference_mode_are_taken():
    import torch

    with torch.inference_mode():
        made = torch.from_numpy(PIXELS.transpose(2, 0, 1) / 255).clone()
    assert np.array_equal(encode(made), PIXELS)


@given(arrays(np.float32, (3, 2, 2), elements=st.floats(0, 1, width=32)))
def test_every_float_in_range_is_within_half_a_level(values):
    error = np.abs(encode(values).transpose(2, 0, 1) / 255 - values)
    assert error.max() <= 0.5 / 255 + 1e-7


CLAMP, HALVE, SCALE = "x.clamp(0, 1)", "(x + 1) / 2", "x / 255"


@pytest.mark.parametrize(
    ("low", "high", "advice"),
    [
        (-1.0, 1.0, HALVE), (-0.2, 0.7, HALVE), (-1.02, 1.01, HALVE), (-0.9, -0.5, HALVE),
        (0.0, 1.01, CLAMP), (-0.01, 1.0, CLAMP), (-0.05, 1.05, CLAMP), (0.0, 1.003, CLAMP), (-0.002, 0.4, CLAMP),
        (0.0, 255.0, SCALE), (3.0, 200.0, SCALE), (-0.01, 256.0, SCALE),
        (-3.0, 2.0, None), (0.0, 1.5, None), (0.0, 65535.0, None), (-255.0, 255.0, None),
    ],
)  # fmt: skip
def test_floats_out_of_range_are_refused_and_what_their_range_tells_is_advised(low, high, advice):
    image = np.full((3, 4, 5), (low + high) / 2, np.float32)
    image[0, 0, 0], image[1, 2, 3] = low, high
    message = problem_of(image)
    assert f"values in [{low:.4g}, {high:.4g}]" in message
    assert [one for one in (CLAMP, HALVE, SCALE) if one in message] == ([advice] if advice else [])


JUST_OUTSIDE = [
    (-2e-5, 0), (-1e-8, 0), (-0.0019, 0), (-1 / 511, 0),
    (1 + 1e-9, 255), (1.0019, 255), (1 + 1 / 511, 255), (1.0000001, 255),
]  # fmt: skip


@pytest.mark.parametrize(("value", "level"), JUST_OUTSIDE)
@pytest.mark.parametrize("name", ["numpy float32", "numpy float64", "torch float32", "torch float64"])
def test_what_a_rounding_puts_outside_is_the_level_at_that_end(value, level, name):
    import torch

    library, _, dtype = name.partition(" ")
    image = np.full((3, 4, 5), 0.2, dtype)
    image[1, 2, 3] = value
    pixels = encode(image if library == "numpy" else torch.from_numpy(image))
    assert pixels[2, 3, 1] == level
    assert (np.delete(pixels.reshape(-1), (2 * 5 + 3) * 3 + 1) == 51).all()


def test_an_image_that_is_all_a_rounding_outside_is_white_or_black():
    assert (encode(np.full((3, 8, 8), 1 + 1e-9)) == 255).all()
    assert (encode(np.full((3, 8, 8), -1e-8, np.float32)) == 0).all()


def test_half_floats_that_one_rounding_puts_outside_are_taken():
    above = np.nextafter(np.float16(1), np.float16(2))  # 1.00098
    assert (encode(np.full((3, 2, 2), above)) == 255).all()
    below = -np.float16(0.0019)
    assert (encode(np.full((3, 2, 2), below)) == 0).all()


@pytest.mark.parametrize("value", [-1 / 509, 1 + 1 / 509, np.nextafter(-1 / 510, -1), np.nextafter(1 + 1 / 510, 2)])
def test_more_than_half_a_level_outside_is_refused_with_numbers_that_show_it(value):
    image = np.full((3, 2, 2), 0.5)
    image[0, 0, 0] = value
    shown = problem_of(image).partition("values in [")[2].partition("]")[0]
    low, high = (float(text) for text in shown.split(", "))
    assert low < 0 or high > 1


def test_a_bfloat16_step_above_one_is_a_whole_level_and_is_to_be_clamped():
    import torch

    image = torch.ones((3, 2, 2), dtype=torch.bfloat16)
    image[0, 0, 0] = 1.0078125
    assert CLAMP in problem_of(image)
    assert (encode(image.clamp(0, 1)) == 255).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_that_are_not_finite_are_refused(dtype, value):
    image = np.zeros((3, 4, 5), dtype)
    image[2, 3, 4] = value
    message = problem_of(image)
    assert ("1 values are NaN" in message) == math.isnan(value)


def test_a_nan_in_a_tensor_is_refused():
    import torch

    image = torch.zeros((3, 4, 5), dtype=torch.bfloat16)
    image[0, 1, 2] = math.nan
    assert "1 values are NaN" in problem_of(image)


def test_grey_black_and_white_and_palette_images_become_rgb():
    grey = RNG.integers(0, 256, (4, 5), np.uint8)
    assert np.array_equal(encode(Image.fromarray(grey)), np.stack([grey] * 3, axis=-1))
    bits = np.array([[True, False], [False, True]])
    assert encode(Image.fromarray(bits))[..., 1].tolist() == [[255, 0], [0, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([1, 0])
    assert encode(palette).tolist() == [[[40, 50, 60], [10, 20, 30]]]


def test_an_opaque_alpha_channel_is_dropped_and_a_transparent_one_refused():
    alpha = np.full((13, 7, 1), 255, np.uint8)
    assert np.array_equal(encode(Image.fromarray(np.concatenate([PIXELS, alpha], axis=-1))), PIXELS)
    alpha[3, 3] = 254
    message = problem_of(Image.fromarray(np.concatenate([PIXELS, alpha], axis=-1)))
    assert "alpha down to 254" in message


def palette_file(transparency, kind: str = "PNG") -> Image.Image:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([1, 0])
    buffer = io.BytesIO()
    palette.save(buffer, kind, transparency=transparency)
    return Image.open(buffer)


@pytest.mark.parametrize("transparency", [0, 1, b"\x80\xff"])
def test_a_palette_with_transparent_colours_in_use_is_refused(transparency):
    assert "transparent" in problem_of(palette_file(transparency))


def test_a_palette_with_a_transparent_colour_that_no_pixel_has_is_taken():
    assert encode(palette_file(b"\xff\xff")).tolist() == [[[40, 50, 60], [10, 20, 30]]]


def test_a_transparent_colour_of_an_rgb_file_is_refused_where_a_pixel_has_it():
    def image_with(transparency):
        buffer = io.BytesIO()
        Image.fromarray(PIXELS).save(buffer, "PNG", transparency=transparency)
        return Image.open(buffer)

    unused = next((r, 0, 0) for r in range(256) if (r, 0, 0) not in {tuple(p) for p in PIXELS.reshape(-1, 3).tolist()})
    assert np.array_equal(encode(image_with(unused)), PIXELS)
    assert "transparent" in problem_of(image_with(tuple(int(v) for v in PIXELS[0, 0])))


def test_a_palette_made_of_a_transparent_image_is_refused_as_that_image_is():
    alpha = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    assert encode(alpha.quantize(4)).tolist() == [[[255, 0, 0]] * 4] * 4
    alpha.putpixel((1, 1), (0, 255, 0, 0))
    quantised = alpha.quantize(4)
    assert "transparency" not in quantised.info
    assert "alpha down to 0" in problem_of(quantised)


@pytest.mark.parametrize(
    ("modes", "advice"),
    [
        (("CMYK", "LAB", "YCbCr", "HSV"), 'image.convert("RGB")'),
        (("I;16", "I", "F"), "scale its levels to 0..255"),  # convert() makes white of most of them
        (("LA", "PA", "RGBa"), "paste it on the background"),  # convert() shows what is under the transparent
    ],
)
def test_modes_with_no_one_rgb_are_refused_and_the_advice_is_for_that_mode(modes, advice):
    for mode in modes:
        message = problem_of(Image.new(mode, (4, 3)))
        assert f"mode {mode!r}" in message
        assert advice in message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_a_truncated_file_is_refused_with_its_reason(kind, tmp_path):
    whole = file_of(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), kind)
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with Image.open(path) as image:
        assert "cannot be read" in problem_of(image)


def test_a_file_that_was_closed_before_it_was_read_is_refused(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        held = media.hold(image)
    with pytest.raises(InvalidSampleError, match="cannot be read"):
        media.encode_image(held, "image")


def test_a_huge_image_is_refused_before_its_pixels_are_read():
    only_a_header = Image.open(io.BytesIO(b"P6 9000 9000 255\n"))
    with pytest.raises(InvalidSampleError, match="9000x9000 has 81000000 pixels, more than REWARDQ_MAX_PIXELS=1000"):
        media.check_image(only_a_header, "image", 1000)


def test_one_file_encoded_by_several_threads_is_whole_for_each():
    big = RNG.integers(0, 256, (300, 300, 3), np.uint8)
    data = file_of(Image.fromarray(big), "PNG")
    for _ in range(10):
        held = media.hold(Image.open(io.BytesIO(data)))
        start, seen = threading.Barrier(4), []

        def go(held=held, start=start, seen=seen):
            start.wait()
            seen.append(media.encode_image(held, "image"))

        threads = [threading.Thread(target=go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 4
        assert all(np.array_equal(pixels, big) for pixels in seen)


def test_a_tensor_changed_after_submit_is_refused_and_no_wrong_reward():
    import torch

    tensor = torch.rand(3, 4, 5)
    held = media.hold(tensor)
    video = media.hold([tensor, tensor.clone()])
    media.encode_image(held, "sample 1: image")
    tensor.mul_(0.5)
    with pytest.raises(InvalidSampleError, match=r"sample 1: image: the tensor was changed in place after submit\(\)"):
        media.encode_image(held, "sample 1: image")
    with pytest.raises(InvalidSampleError, match=r"sample 1: video\[0\]: the tensor was changed"):
        media.encode_video(video, "sample 1: video")


def test_a_tensor_changed_while_it_is_encoded_is_refused(monkeypatch):
    import torch

    tensor = torch.rand(3, 4, 5)
    held = media.hold(tensor)
    rint = np.rint

    def change_meanwhile(values):
        tensor.mul_(0.5)
        return rint(values)

    monkeypatch.setattr(np, "rint", change_meanwhile)
    with pytest.raises(InvalidSampleError, match="changed in place"):
        media.encode_image(held, "image")


def test_a_view_of_a_changed_tensor_is_refused_too():
    import torch

    batch = torch.rand(2, 3, 4, 5)
    held = [media.hold(image) for image in batch]
    batch[1].zero_()
    with pytest.raises(InvalidSampleError, match="changed in place"):
        media.encode_image(held[1], "image")


FRAMES = RNG.integers(0, 256, (3, 6, 5, 3), np.uint8)


@pytest.mark.parametrize(
    "video",
    [
        FRAMES,
        FRAMES[::-1][::-1],
        list(FRAMES),
        tuple(Image.fromarray(f) for f in FRAMES),
        [FRAMES[0], Image.fromarray(FRAMES[1]), FRAMES[2].transpose(2, 0, 1) / 255],
        FRAMES.transpose(0, 3, 1, 2) / 255,
        (FRAMES.transpose(0, 3, 1, 2) / 255).astype(np.float32),
    ],
    ids=["array", "view", "list", "pil", "mixed", "float64", "float32"],
)
def test_all_forms_of_one_video_are_the_same_pixels(video):
    pixels = encode_video(video)
    assert np.array_equal(pixels, FRAMES)
    assert pixels.flags.c_contiguous


def test_torch_videos_of_all_forms_are_the_same_pixels():
    import torch

    frames = torch.from_numpy(FRAMES.copy())
    floats = frames.permute(0, 3, 1, 2).double() / 255
    for video in (frames, floats, list(frames), list(floats)):
        assert np.array_equal(encode_video(video), FRAMES)


def test_the_frames_of_a_video_may_be_a_rounding_outside_too():
    video = np.zeros((2, 3, 4, 5))
    video[0, 0, 1, 2], video[1, 2, 3, 4] = -1e-6, 1 + 1e-6
    for form in (video, list(video)):
        pixels = encode_video(form)
        assert pixels[0, 1, 2, 0] == 0
        assert pixels[1, 3, 4, 2] == 255
        assert int(pixels.sum()) == 255


def test_a_video_out_of_range_is_refused():
    with pytest.raises(InvalidSampleError, match="video: floats must be in"):
        encode_video(np.full((2, 3, 4, 5), 1.5))
    with pytest.raises(InvalidSampleError, match=r"video\[1\]: floats must be in"):
        encode_video([np.zeros((3, 4, 5)), np.full((3, 4, 5), 1.5)])


def test_audio_becomes_float32_with_channels_first():
    mono = np.array([0.25, -0.5], np.float64)
    assert media.encode_audio(media.hold(mono), "audio").tolist() == [[0.25, -0.5]]
    stereo = np.array([[1.0, 2.0], [3.0, 4.0]], np.float16)
    encoded = media.encode_audio(media.hold(np.asfortranarray(stereo)), "audio")
    assert encoded.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert encoded.dtype == np.float32
    assert encoded.flags.c_contiguous


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_audio_that_is_not_finite_is_refused(value):
    with pytest.raises(InvalidSampleError, match="NaN or infinite"):
        media.encode_audio(media.hold(np.array([0.0, value])), "audio")


def test_a_jpeg_round_trip_is_near_and_of_the_same_shape():
    smooth = np.linspace(0, 255, 64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8)
    again = media.from_jpeg(media.to_jpeg(smooth))
    assert again.shape == smooth.shape
    assert np.abs(again.astype(int) - smooth).mean() < 2


def test_jpeg_bytes_are_those_of_pillow_at_quality_95(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.jpg", quality=95)
    assert media.to_jpeg(PIXELS) == (tmp_path / "image.jpg").read_bytes()


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_frames_put_together_come_apart_again(frames):
    assert media.split_frames(media.join_frames(frames)) == frames


@pytest.mark.parametrize("shape", [(6, 5, 3), (1, 1, 3), (2, 6, 5, 3), (1, 1, 1, 3)])
def test_a_worker_gets_tensors_with_channels_first_in_unit_range(shape):
    import torch  # noqa: F401

    pixels = RNG.integers(0, 256, shape, np.uint8)
    read_only = np.frombuffer(pixels.tobytes(), np.uint8).reshape(shape)
    tensor = media.to_tensor(read_only)
    expected = [[[v / 255 for v in pixel] for pixel in row] for row in pixels.reshape(-1, *shape[-2:]).tolist()]
    expected = np.moveaxis(np.reshape(expected, shape), -1, -3)
    assert tuple(tensor.shape) == expected.shape
    assert np.allclose(tensor.numpy(), expected, atol=1e-7)


def test_a_worker_gets_pil_images_of_the_same_pixels():
    read_only = np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape)
    assert np.array_equal(np.asarray(media.to_pil(read_only)), PIXELS)


def test_a_digest_is_that_of_the_bytes():
    data = PIXELS.tobytes()
    assert media.digest(PIXELS) == media.digest(data) == media.digest(memoryview(PIXELS))
    assert media.fits(PIXELS, media.digest(data))
    for at in (0, len(data) // 2, len(data) - 1):
        other = bytearray(data)
        other[at] ^= 1
        assert media.digest(other)[:32] != media.digest(data)[:32]
        assert not media.fits(other, media.digest(data))
    assert not media.fits(data[:-1], media.digest(data))
    assert media.fits(b"", media.digest(np.empty((0, 3), np.uint8)))


def test_a_digest_is_made_of_the_hashes_that_it_names():
    # Of nothing, as the makers of BLAKE3 and XXH3 publish it.
    assert media.digest(b"") == "af1349b9f5f9a1a6a0404dea36dcc949" + "2d06800538d394c2"


def test_a_child_forked_while_a_thread_reads_a_file_can_read_others():
    is_read, go_on = threading.Event(), threading.Event()
    slow = Image.new("RGB", (4, 4))

    def load():
        is_read.set()
        go_on.wait(30)

    slow.load = load
    reading = threading.Thread(target=encode, args=(slow,))
    reading.start()
    assert is_read.wait(30)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(20)
            encode(Image.new("RGB", (4, 4)))
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    go_on.set()
    reading.join()
    assert status == 0


def transparent_palette() -> Image.Image:
    return palette_file(b"\x80\xff")


def with_transparent_colour() -> Image.Image:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(buffer, "PNG", transparency=(1, 2, 3))
    return Image.open(buffer)


def without_transparency() -> Image.Image:
    image = Image.new("RGB", (4, 4))
    image.info["transparency"] = None
    return image


@pytest.mark.parametrize(
    "image",
    [
        lambda: transparent_palette().convert("1"),
        lambda: transparent_palette().point(list(range(256)), "L"),
        lambda: with_transparent_colour().quantize(4),
        without_transparency,
    ],
)
def test_a_transparency_that_pillow_left_behind_is_refused_with_what_to_do(image):
    message = problem_of(image())
    assert "info['transparency'] of an image of mode" in message
    assert 'image.info.pop("transparency")' in message
    cleared = image()
    cleared.info.pop("transparency")
    assert np.array_equal(encode(cleared), np.asarray(cleared.convert("RGB")))


def test_an_image_whose_own_methods_raise_is_refused_with_what_they_raised():
    class Hostile(Image.Image):
        def convert(self, *args, **options):
            raise MemoryError("hostile convert")

    image = Hostile()
    image.im, image._mode, image._size = Image.new("L", (4, 4)).im, "L", (4, 4)
    assert "cannot be made RGB: MemoryError: hostile convert" in problem_of(image)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_floats_of_either_byte_order_are_rounded_to_the_nearest_level(order, size):
    values = np.arange(0, 1, 2.0**-11).astype(np.float16)  # many lie between two levels
    values = values[values != 0.5]  # as near to 127 as to 128
    image = np.broadcast_to(values.astype(f"{order}f{size}"), (3, 1, len(values)))
    assert encode(image)[0, :, 0].tolist() == [nearest_level(float(v)) for v in values]


def test_masked_arrays_are_taken_where_nothing_is_masked_and_refused_elsewhere():
    assert np.array_equal(encode(np.ma.masked_array(PIXELS)), PIXELS)
    assert np.array_equal(encode(np.ma.masked_array(PIXELS, mask=False)), PIXELS)
    mask = np.zeros(PIXELS.shape, bool)
    mask[3, 2, 1] = True
    assert "1 values of the array are masked" in problem_of(np.ma.masked_array(PIXELS, mask=mask))
    with pytest.raises(InvalidSampleError, match="2 values of the array are masked"):
        media.encode_audio(media.hold(np.ma.masked_array([0.1, 0.2, 0.3], mask=[True, False, True])), "audio")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8), [("r", "u1"), ("g", "u1"), ("b", "u1")]),
        np.full((3, 8, 8), 0.5, object),
        np.zeros((8, 8, 3), "datetime64[s]"),
        np.zeros((3, 8, 8), complex),
        np.zeros((8, 8, 3), bool),
        np.zeros((8, 8, 3), np.int8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 8, 3), "S1"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_of_other_kinds_are_refused(array):
    assert problem_of(array)


def test_an_array_of_another_library_is_refused_with_how_to_make_one_of_numpy():
    class Labelled:
        """As xarray has them."""

        def __array__(self, dtype=None, copy=None):
            return PIXELS

    assert "found a Labelled; np.asarray(x) makes a numpy array of it" in problem_of(Labelled())


@pytest.mark.parametrize(
    "array",
    [PIXELS.view(np.recarray), PIXELS[::-1, ::-1][::-1, ::-1], np.asfortranarray(PIXELS), PIXELS.copy()[:, :, ::1]],
)
def test_arrays_of_odd_classes_and_orders_are_the_same_pixels(array):
    assert np.array_equal(encode(array), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_that_a_file_says_is_known_and_not_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, exif=exif)
    image = Image.open(buffer)
    stored = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
    assert np.array_equal(encode(image), stored)
    assert media.orientation_of(image) == orientation


def test_a_tiff_is_turned_by_pillow_itself_when_it_is_read():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "TIFF", exif=exif)
    image = Image.open(buffer)
    assert np.array_equal(encode(image), np.rot90(PIXELS, -1))
    assert media.orientation_of(image) == 1


def test_images_that_say_no_orientation_are_upright():
    assert media.orientation_of(Image.new("RGB", (4, 4))) == 1
    odd = Image.new("RGB", (4, 4))
    odd.info["exif"] = b"no exif"
    assert media.orientation_of(odd) == 1


@pytest.mark.parametrize("depth", [8, 16], ids=["L", "LA"])
def test_a_grey_file_that_brings_a_palette_has_its_own_levels(depth):
    """Pillow says that its mode is L or LA, and converts it by the palette."""
    levels = [0, 50, 100, 150, 200, 250]
    palette = bytes(range(100, 130))
    head = struct.pack("<BBBHHBHHHHBB", 0, 1, 3, 0, len(palette) // 3, 24, 0, 0, 3, 2, depth, 0x20)
    stored = bytes(levels) if depth == 8 else bytes(byte for level in levels for byte in (level, 255))
    image = Image.open(io.BytesIO(head + palette + stored))
    assert image.mode == ("L" if depth == 8 else "LA")
    pixels = media.encode_image(media.hold(image), "image")
    assert pixels.tolist() == np.stack([np.reshape(levels, (2, 3))] * 3, axis=-1).tolist()
