"""The demo's generator: posters of words over photographs, drawn at varying quality."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 384
"""Pixels of a poster's side."""

LETTERS = "ABCDEFGHIKLMNOPRSTUVWY"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a prompt asks for."""

    photo: str
    scene: str
    words: str

    @property
    def prompt(self) -> str:
        """The text for the generator; the words to show are in quotation marks."""
        return f'{self.scene} that says "{self.words}"'


SUBJECTS = (
    Subject("coffee", "A sign over a cup of coffee", "OPEN LATE"),
    Subject("rocket", "A launch poster with a rocket", "LIFT OFF"),
    Subject("astronaut", "A recruiting poster with an astronaut", "JOIN THE CREW"),
    Subject("chelsea", "A club poster with a tabby cat", "MEOW CLUB"),
    Subject("coffee", "A menu with a cup of coffee", "FRESH ROAST"),
    Subject("rocket", "A film poster with a rocket", "NIGHT FLIGHT"),
    Subject("astronaut", "A museum poster with an astronaut", "SPACE WEEK"),
    Subject("chelsea", "A lost-and-found notice with a tabby cat", "HAVE YOU SEEN ME"),
)


@dataclass(frozen=True, slots=True)
class Flaws:
    """What is wrong with one poster; a perfect poster has zeros."""

    blur: float = 0.0
    """Radius of the Gaussian blur, pixels."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise, grey levels of 255."""
    faintness: float = 0.0
    """0 for words of full contrast, 1 for invisible ones."""
    num_wrong_letters: int = 0
    """Letters of the words that are missing or replaced."""


WORST = Flaws(blur=3.5, noise=40.0, faintness=0.85, num_wrong_letters=4)


def draw_group(subject: Subject, num_posters: int, seed: int) -> list[Image.Image]:
    """Posters of one prompt, from good to bad in random order; equal seeds give equal pixels.

    Returns:
        `num_posters` RGB images of `SIZE x SIZE`.
    """
    rng = np.random.default_rng([seed, *subject.prompt.encode()])
    posters = []
    for badness in rng.permutation(np.linspace(0.0, 1.0, num_posters)).tolist():
        flaws = draw_flaws(badness, rng)
        posters.append(draw(subject, flaws, rng))
    return posters


def draw_flaws(badness: float, rng: np.random.Generator) -> Flaws:
    """Flaws of a poster that is `badness` bad in [0, 1]: two kinds at full strength, the others at a third."""
    strengths = badness * rng.permutation([1.0, 1.0, 0.3, 0.3])
    blur, noise, faintness, spelling = strengths.tolist()
    return Flaws(
        blur=WORST.blur * blur,
        noise=WORST.noise * noise,
        faintness=WORST.faintness * faintness,
        num_wrong_letters=round(WORST.num_wrong_letters * spelling),
    )


def draw(subject: Subject, flaws: Flaws, rng: np.random.Generator) -> Image.Image:
    """One poster."""
    image = _photo(subject.photo).copy()
    words = _misspelt(subject.words, flaws.num_wrong_letters, rng)
    opacity = round(255 * (1.0 - flaws.faintness))
    _write(image, words, opacity, rng)

    if flaws.blur:
        image = image.filter(ImageFilter.GaussianBlur(flaws.blur))
    if flaws.noise:
        pixels_HWC = np.asarray(image, dtype=np.float32)
        noise_HWC = rng.normal(0.0, flaws.noise, pixels_HWC.shape).astype(np.float32)
        noisy_HWC = (pixels_HWC + noise_HWC).clip(0, 255)
        image = Image.fromarray(noisy_HWC.astype(np.uint8))
    return image


def _misspelt(words: str, num_wrong: int, rng: np.random.Generator) -> str:
    """`words` with some letters missing and some replaced."""
    letters = list(words)
    indices = [i for i, letter in enumerate(letters) if letter != " "]
    for i in rng.choice(indices, size=min(num_wrong, len(indices)), replace=False):
        others = [letter for letter in LETTERS if letter != letters[i]]
        letters[i] = "" if rng.random() < 0.5 else str(rng.choice(others))
    return "".join(letters)


def _write(
    image: Image.Image, words: str, opacity: int, rng: np.random.Generator
) -> None:
    """Draw the words into `image`, two words a line, with an outline."""
    lines = _lines(words)
    text = "\n".join(lines)
    font = ImageFont.load_default(size=_font_size(lines))

    layer = Image.new("RGBA", image.size)
    pen = ImageDraw.Draw(layer)
    x = image.width / 2 + rng.uniform(-8, 8)
    y = image.height * rng.uniform(0.35, 0.65)
    pen.multiline_text(
        (x, y),
        text,
        font=font,
        anchor="mm",
        align="center",
        fill=(255, 255, 255, opacity),
        stroke_width=3,
        stroke_fill=(10, 10, 10, opacity),
    )
    image.paste(layer, mask=layer)


def _lines(words: str) -> list[str]:
    parts = words.split()
    return [" ".join(parts[i : i + 2]) for i in range(0, len(parts), 2)] or [" "]


def _font_size(lines: list[str]) -> float:
    """The largest size up to 64 at which the longest line fits the poster."""
    longest = max(lines, key=len)
    width = ImageFont.load_default(size=64).getlength(longest)
    return min(64.0, 64.0 * 0.9 * SIZE / width)


@cache
def _photo(name: str) -> Image.Image:
    photos = resources.files("trainer_client.cli").joinpath("photos")
    with (
        photos.joinpath(f"{name}.jpg").open("rb") as file,
        Image.open(file) as photo,
    ):
        return photo.convert("RGB")
