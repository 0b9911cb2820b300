"""Random arrays, PIL images and damaged image files, as a trainer may submit them.

Each is taken as `submit()` and the encoder take it. Right is: the pixels that it has by an independent computation, or
a refusal. Run it alone by `python -m tests.fuzz.media 60`; `--trial SEED` repeats one trial, and `--files FOLDER` takes
the files of a folder, such as those that Pillow is tested with.
"""

from __future__ import annotations

import argparse
import io
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tasks.errors import InvalidSampleError
from tasks.rewards import RewardConfig
from tasks.samples import Sample
from tests.fuzz.counts import Counts
from trainer_client.engine.encoding import SampleEncoder
from trainer_client.steps.open_steps import OpenStep
from trainer_client.steps.submission import Submission

MAX_PIXELS = 10**6
MAX_FRAMES = 16
REWARDS = RewardConfig.from_dict({"rewards": [{"reward_model": "my_rewards.Mine"}]}).rewards
ENCODER = SampleEncoder("fuzz", 0)


def run(seconds: float, seed: str = "") -> Counts:
    """Try media for so many seconds.

    Args:
        seconds: How long.
        seed: Makes the trials the same each time. One that begins with `array:`, `pil:`, `cut:` or `damaged:` tries
            media of this kind only.
    """
    seed = seed or f"{random.SystemRandom().getrandbits(32):08x}"
    counts = Counts()
    ends_at = time.monotonic() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged files
        while time.monotonic() < ends_at:
            _count(counts, f"{seed}.{counts.tried}")
    return counts


def run_files(folder: Path) -> Counts:
    """Try each image of each file in a folder and those below it, as it is opened and as it is once it is loaded."""
    counts = Counts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                for frame in range(_num_frames(data)):
                    for is_loaded in (False, True):
                        again = f"{path} image {frame}{' loaded' * is_loaded}"
                        _count_verdict(counts, lambda: _verdict(_in_file(data, frame, is_loaded)), again)  # noqa: B023
    return counts


def _count(counts: Counts, seed: str) -> None:
    _count_verdict(counts, lambda: trial(seed), f"python -m tests.fuzz.media --trial {seed}")


def _count_verdict(counts: Counts, verdict_of: Callable[[], str], again: str) -> None:
    counts.tried += 1
    try:
        verdict = verdict_of()
    except Exception:
        verdict = "ended"
    if verdict == "refused":
        counts.refused += 1
        return
    if verdict == "right":
        return
    if verdict == "wrong":
        counts.wrong += 1
    else:
        counts.ended += 1
    counts.say(again)


@dataclass
class Trial:
    """One image, and what it must become if it is taken."""

    image: Any
    is_right: Callable[[np.ndarray], bool]
    change: Callable[[], object] | None = None
    """Done after `submit()`: the image must be refused then."""


def trial(seed: str) -> str:
    """`right`, `refused` or `wrong`; raises what would end the client. The seed `array:1` makes an array."""
    rng = random.Random(seed)
    makers = {"array": _array, "pil": _pil_image, "cut": _cut_file, "damaged": _damaged_file}
    make = makers.get(seed.partition(":")[0]) or rng.choice(list(makers.values()))
    return _verdict(make(rng))


def _verdict(made: Trial | None) -> str:
    if made is None:
        return "refused"  # by whoever made it: Pillow does not open the file, numpy not have the view
    try:
        pixels = _taken(made)
    except InvalidSampleError:
        return "refused"
    if pixels is None:
        return "refused"
    if made.change is not None:
        return "wrong"
    return "right" if made.is_right(pixels) else "wrong"


def _taken(made: Trial) -> np.ndarray | None:
    """What is sent of an image; None if it ends as its sample's failure."""
    sample = Sample(prompt="p", image=made.image)
    submission = Submission("train", REWARDS, [sample], None, 1, 0.0)
    submission.check(0, 0, 1, MAX_PIXELS)
    (slot,) = submission.add_to(OpenStep(0)).slots
    if made.change is not None:
        made.change()
    assert slot.sample is not None
    encoded = ENCODER.encode(slot, slot.sample)
    if encoded.problem is not None:
        return None
    (content,) = encoded.contents["image", "raw"]
    return np.frombuffer(content.data, np.uint8).reshape(content.shape)


# --- arrays --------------------------------------------------------------------------------------

DTYPES = (
    *["u1"] * 8, *["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "g"] * 2, "i1", "<i2", ">u2", "i8", "?", "c8", "O",
    "M8[s]", "S1", "U1", [("r", "u1"), ("g", "u1"), ("b", "u1")],
)  # fmt: skip


def _array(rng: random.Random) -> Trial | None:
    array = _values(rng, np.dtype(rng.choice(DTYPES)))
    for _ in range(rng.randrange(4)):
        array = rng.choice(VIEWS)(rng, array)
    expected = _expected_of(array)
    change = None
    is_whole = array.flags.writeable and 0 not in array.strides and array.size
    if is_whole and rng.random() < 0.1:
        other = _other_values(array)
        change = None if other is None else lambda: array.__setitem__(..., other)
    return Trial(array, expected, change)


def _values(rng: random.Random, dtype: np.dtype[Any]) -> np.ndarray:
    height, width = rng.choice([0, 1, 2, 3, 5, 17]), rng.choice([1, 2, 3, 8, 31])
    floats = rng.choice([True, dtype.kind == "f", dtype.kind == "f"])
    shape = (3, height, width) if floats else (height, width, 3)
    if rng.random() < 0.15:
        shape = tuple(rng.choice([1, 2, 3, 4]) for _ in range(rng.randrange(5)))
    noise = np.random.default_rng(rng.getrandbits(32)).random(shape)
    if dtype.kind == "f":
        low, high = rng.choice([(0, 1)] * 6 + [(0, 255), (-1, 1), (-1e-5, 1 + 1e-5)])
        values = (low + noise * (high - low)).astype(dtype)
        if values.size and rng.random() < 0.1:
            values.reshape(-1)[0] = rng.choice([np.nan, np.inf, -np.inf])
        return values
    if dtype.kind in "OMV":
        return np.zeros(shape, dtype)
    return (noise * 255).astype(dtype)


def _other_values(array: np.ndarray) -> np.ndarray | None:
    """Values that differ at every place."""
    if array.dtype == np.uint8:
        return array ^ 0xFF
    if array.dtype.kind == "f":
        return np.where(array < 0.5, array + 0.25, array - 0.25)
    return None


def _masked(rng: random.Random, array: np.ndarray) -> np.ndarray:
    mask = np.zeros(array.shape, bool)
    if array.size and rng.random() < 0.5:
        mask.reshape(-1)[rng.randrange(array.size)] = True
    return np.ma.masked_array(array, mask=mask)


def _read_only(_rng: random.Random, array: np.ndarray) -> np.ndarray:
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def _one_value(_rng: random.Random, array: np.ndarray) -> np.ndarray:
    return np.broadcast_to(array[:1], array.shape) if array.ndim else array


def _flipped(rng: random.Random, array: np.ndarray) -> np.ndarray:
    return np.flip(array, rng.randrange(array.ndim)) if array.ndim else array


def _turned(rng: random.Random, array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, rng.randrange(array.ndim), rng.randrange(array.ndim)) if array.ndim else array


def _in_steps(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """Every second value of a larger array: the same values, with gaps between them."""
    if not array.ndim:
        return array
    axis = rng.randrange(array.ndim)
    return np.repeat(array, 2, axis=axis)[(slice(None),) * axis + (slice(None, None, 2),)]


VIEWS: tuple[Callable[[random.Random, np.ndarray], np.ndarray], ...] = (
    _flipped,
    _turned,
    _in_steps,
    _masked,
    _read_only,
    _one_value,
    lambda _rng, array: np.asfortranarray(array),
    lambda _rng, array: array.view(type("Own", (np.ndarray,), {})),
)


def _expected_of(array: np.ndarray) -> Callable[[np.ndarray], bool]:
    """Whether pixels are those of an array: each value within half a level, channels last."""
    is_structured = array.dtype.names is not None
    if is_structured or (np.ma.isMaskedArray(array) and np.ma.getmaskarray(array).any()):
        return lambda _pixels: False
    plain = np.array(np.ma.getdata(array))

    def is_right(pixels: np.ndarray) -> bool:
        if plain.dtype == np.uint8:
            return pixels.shape == plain.shape and pixels.tolist() == plain.tolist()
        if plain.dtype.kind != "f" or plain.ndim != 3:
            return False
        values = np.moveaxis(plain.astype(np.float64), 0, -1).clip(0.0, 1.0)
        return pixels.shape == values.shape and bool((np.abs(pixels / 255.0 - values) <= 0.5 / 255 + 1e-7).all())

    return is_right


# --- PIL images ----------------------------------------------------------------------------------

MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "RGBa")
FORMATS = ("PNG", "GIF", "WEBP", "TIFF", "JPEG", "BMP", "PCX", "PPM", "TGA", "JPEG2000")


def _picture(rng: random.Random) -> Image.Image:
    height, width = rng.choice([1, 2, 9, 40]), rng.choice([1, 3, 16, 33])
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height, width, 4), np.uint8)
    if rng.random() < 0.7:
        noise[..., 3] = 255
    if rng.random() < 0.3:
        noise[...] = noise[:1, :1]
    return Image.fromarray(noise)


OPERATIONS: tuple[Callable[[random.Random, Image.Image], Image.Image], ...] = (
    lambda rng, image: image.convert(rng.choice(MODES)),
    lambda rng, image: image.convert(rng.choice(MODES)),
    lambda rng, image: image.quantize(rng.choice([2, 4, 16, 256])),
    lambda rng, image: image.point(list(range(256)) * len(image.getbands()), rng.choice([None, "L", "1"])),
    lambda _rng, image: image.crop((0, 0, 2, 2)),
    lambda rng, image: image.rotate(rng.choice([90, 45])),
    lambda rng, image: image.getchannel(rng.randrange(len(image.getbands()))),
    lambda _rng, image: image.copy(),
    lambda _rng, image: ImageOps.mirror(image),
    lambda rng, image: _with_transparency(image, rng.choice([None, 0, 3, b"\x80\xff", (1, 2, 3), "x", -1, 10**30])),
    lambda rng, image: _through_a_file(rng, image, transparency=rng.choice([0, b"\x80\xff", (1, 2, 3)])),
    lambda rng, image: _through_a_file(rng, image),
    lambda rng, image: _with_palette(image, rng.randrange(257)),
)


def _with_transparency(image: Image.Image, value: Any) -> Image.Image:
    image.info["transparency"] = value
    return image


def _with_palette(image: Image.Image, num_colours: int) -> Image.Image:
    image.putpalette(bytes(range(256)) * 3 if num_colours == 256 else bytes(3 * num_colours))
    return image


def _through_a_file(rng: random.Random, image: Image.Image, **options: Any) -> Image.Image:
    file = io.BytesIO()
    image.save(file, rng.choice(FORMATS), **options)
    return Image.open(file)


def _pil_image(rng: random.Random) -> Trial | None:
    image = _picture(rng)
    for _ in range(rng.randrange(1, 5)):
        try:
            image = rng.choice(OPERATIONS)(rng, image)
        except Exception:  # of Pillow, for what it does not do with this mode
            continue
    change = None
    # What is drawn on an image that was still in its file at `submit()` is not noticed, as docs/samples.md says.
    is_read = type(image) is Image.Image
    if is_read and image.mode == "RGB" and rng.random() < 0.1:
        change = lambda: image.paste(ImageOps.invert(image))  # noqa: E731
    return Trial(image, _expected_of_pil(image), change)


def _expected_of_pil(image: Image.Image) -> Callable[[np.ndarray], bool]:
    def is_right(pixels: np.ndarray) -> bool:
        expected = _rgb_of(image)
        return expected is not None and np.array_equal(pixels, expected)

    return is_right


def _rgb_of(image: Image.Image) -> np.ndarray | None:
    """The colours of an image by its own values and palette; None if it has no one RGB."""
    values = np.asarray(image)
    if image.mode == "RGB":
        return values
    if image.mode == "RGBA":
        return values[..., :3] if (values[..., 3] == 255).all() else None
    if image.mode == "1":
        return np.stack([values.astype(np.uint8) * 255] * 3, axis=-1)
    if image.mode == "L":
        return np.stack([values] * 3, axis=-1)
    if image.mode == "P":
        palette = np.zeros((256, 3), np.uint8)
        known = np.array(image.getpalette("RGB") or (), np.uint8).reshape(-1, 3)
        palette[: len(known)] = known
        return palette[values]
    return None


# --- files ---------------------------------------------------------------------------------------


def _file(rng: random.Random) -> bytes | None:
    file = io.BytesIO()
    kind = rng.choice(FORMATS)
    options: dict[str, Any] = {}
    if kind == "TIFF":
        options["compression"] = rng.choice(["raw", "packbits", "tiff_lzw", "tiff_adobe_deflate"])
    try:
        _picture(rng).convert(rng.choice(["RGB", "L", "P", "1"])).save(file, kind, **options)
    except OSError:  # the format has no such mode
        return None
    return file.getvalue()


def _opened(data: bytes) -> Image.Image | None:
    try:
        return Image.open(io.BytesIO(data))
    except Exception:  # Pillow's decoders raise anything: the trainer never has an image
        return None


def _cut_file(rng: random.Random) -> Trial | None:
    """What is left of a file has the pixels of the whole, or is refused."""
    whole = _file(rng)
    if whole is None:
        return None
    expected = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
    near_the_end = max(1, len(whole) - 1000)
    cut = rng.choice([rng.randrange(1, len(whole)), rng.randrange(near_the_end, len(whole))])
    image = _opened(whole[:cut])
    return None if image is None else Trial(image, lambda pixels: np.array_equal(pixels, expected))


def _damaged_file(rng: random.Random) -> Trial | None:
    """A damaged file has the pixels that Pillow reads in it, or is refused: most formats have no checksum."""
    whole = _file(rng)
    if whole is None:
        return None
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(min(len(data), rng.choice([64, len(data)])))
        damage = rng.randrange(4)
        if damage == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif damage == 1:
            data[at] = rng.choice([0, 0x7F, 0x80, 0xFF])
        elif damage == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 5))
        elif len(data) > 8:
            del data[at : at + rng.randrange(1, 5)]
    return _in_file(bytes(data))


def _in_file(data: bytes, frame: int = 0, is_loaded: bool = False) -> Trial | None:
    """The pixels that Pillow reads in a file, taken as it is opened or once it is loaded."""
    image, again = _opened(data), _opened(data)
    if image is None or again is None:
        return None
    try:
        if frame:
            image.seek(frame)
            again.seek(frame)
        if is_loaded:
            image.load()
    except Exception:  # the trainer never has this image
        return None

    def is_right(pixels: np.ndarray) -> bool:
        again.load()
        expected = _rgb_of(again)
        return expected is not None and np.array_equal(pixels, expected)

    return Trial(image, is_right)


def _num_frames(data: bytes) -> int:
    """How many images of a file are tried."""
    image = _opened(data)
    try:
        return min(MAX_FRAMES, getattr(image, "n_frames", 1))
    except Exception:  # Pillow counts by reading, and the file is damaged
        return 1


def main() -> None:
    """Run for as long as the command line says, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--seed", default="", help="the same trials each time")
    parser.add_argument("--trial", default="", help="repeat this trial only")
    parser.add_argument("--files", type=Path, help="the images of this folder, and no other trials")
    given = parser.parse_args()
    if given.files:
        print(run_files(given.files))
    else:
        print(trial(given.trial) if given.trial else run(given.seconds, given.seed))


if __name__ == "__main__":
    main()
