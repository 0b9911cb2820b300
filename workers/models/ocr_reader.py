"""RapidOCR as the reward OCR uses it: which models read, which characters they write, which shapes they get."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rapidocr import LangRec, ModelType, OCRVersion, RapidOCR

from tasks.errors import ModelLoadError

LONGEST_EDGE = 2000
"""RapidOCR shrinks larger images to this edge, in pixels, before it reads them."""

TALL = 8
"""An image more than so many times as tall as wide is padded, as RapidOCR pads wide ones: its text detector scales the
shorter edge to 736 pixels, and the longer edge would become as large as the proportions make it."""

WIDE = 100
"""An image more than so many times as wide as tall is padded too: RapidOCR scales its height to 30 pixels first, and
the width would become as large as the proportions make it."""

PADDED = 4
"""A padded image is so many times as long as wide, as after RapidOCR's own padding."""

LEAST_EDGE = 60
"""No padded edge is shorter, in pixels, as after RapidOCR's own padding."""

LONG_LINE = 80
"""A line of text more than so many times as long as high is recognised alone: RapidOCR pads a batch to its longest
line, so each of the other lines would become as long."""


class Reader:
    """Reads the text on images.

    Args:
        lang: Language of one of RapidOCR's recognition models of PP-OCRv5; "" for the model in its wheel.
        rec_model_path: ONNX file of a recognition model on this worker, instead.
        rec_keys_path: File with that model's characters, one a line, if the model does not contain them.

    Attributes:
        alphabet: Every character that the recognition model can write.

    Raises:
        ModelLoadError: A file does not exist, is no recognition model, or lists the characters of another model.
    """

    def __init__(
        self, lang: str = "", rec_model_path: str = "", rec_keys_path: str = ""
    ) -> None:
        params = {
            "Global.log_level": "error",
            **_recognition(lang, rec_model_path, rec_keys_path),
        }
        self._engine = RapidOCR(params=params)
        try:
            # RapidOCR loads its recognition model at the first image with text.
            self.read(_sign())
        except Exception as error:
            # RapidOCR, onnxruntime and requests each raise errors of their own.
            raise ModelLoadError(_what_to_do(lang, rec_model_path, error)) from error
        self.alphabet = _alphabet(self._engine.text_rec, rec_model_path)
        self._engine.text_rec = _OneLongLineAtATime(self._engine.text_rec)

    def read(self, image: Image.Image) -> str:
        """The lines read, in reading order, with a space between them."""
        image = bounded(image)
        levels = np.frombuffer(image.tobytes("raw", "BGR"), np.uint8)
        pixels_HWC = levels.reshape(image.height, image.width, 3)
        lines: Sequence[str] | None = self._engine(pixels_HWC).txts
        return " ".join(lines or ())


def bounded(image: Image.Image) -> Image.Image:
    """The image as it is; an image of extreme proportions is put on black, so that RapidOCR's memory is bounded."""
    width, height = image.size
    if height <= TALL * width and width <= WIDE * height:
        return image

    scale = min(1.0, LONGEST_EDGE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)

    least = max(LEAST_EDGE, max(size) // PADDED)
    padded = Image.new("RGB", (max(size[0], least), max(size[1], least)))
    padded.paste(image, ((padded.width - size[0]) // 2, (padded.height - size[1]) // 2))
    return padded


class _OneLongLineAtATime:
    """RapidOCR's recogniser, which is given long lines one at a time to bound the memory of a batch."""

    def __init__(self, recognise: Any) -> None:
        self._recognise = recognise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recognise, name)

    def __call__(self, asked: Any) -> Any:
        lines: list[Any] = (
            [asked.img] if isinstance(asked.img, np.ndarray) else list(asked.img)
        )
        batches = _batches(lines)
        if len(batches) <= 1:
            return self._recognise(asked)

        texts: list[Any] = [None] * len(lines)
        scores: list[Any] = [None] * len(lines)
        words: list[Any] = [None] * len(lines)
        for batch in batches:
            some = dataclasses.replace(asked, img=[lines[i] for i in batch])
            output = self._recognise(some)
            for position, i in enumerate(batch):
                texts[i] = output.txts[position]
                scores[i] = output.scores[position]
                words[i] = output.word_results[position]
        return dataclasses.replace(
            output,
            imgs=lines,
            txts=tuple(texts),
            scores=tuple(scores),
            word_results=tuple(words),
        )


def _batches(lines: Sequence[Any]) -> list[list[int]]:
    """The indices of lines that are recognised together: each long line alone, then all others."""
    batches: list[list[int]] = []
    others: list[int] = []
    for i, line in enumerate(lines):
        height, width = line.shape[:2]
        if width > LONG_LINE * height:
            batches.append([i])
        else:
            others.append(i)
    if others:
        batches.append(others)
    return batches


# --- private -------------------------------------------------------------------------------------


def _recognition(
    lang: str, rec_model_path: str, rec_keys_path: str
) -> Mapping[str, Any]:
    """RapidOCR's parameters for a recognition model other than the one in its wheel."""
    if lang and rec_model_path:
        raise ModelLoadError(
            "both lang and rec_model_path name the recognition model; give one of them"
        )
    if rec_keys_path and not rec_model_path:
        raise ModelLoadError(
            "rec_keys_path has the characters of a rec_model_path; give that too"
        )
    if lang:
        return {
            "Rec.lang_type": LangRec(lang),
            "Rec.ocr_version": OCRVersion.PPOCRV5,
            "Rec.model_type": ModelType.MOBILE,
        }

    params, missing = {}, []
    for option, key, path in (
        ("rec_model_path", "Rec.model_path", rec_model_path),
        ("rec_keys_path", "Rec.rec_keys_path", rec_keys_path),
    ):
        if path:
            params[key] = str(_on_disk(path))
            if not _on_disk(path).is_file():
                missing.append(f"{option}: {path!r}")
    if missing:
        raise ModelLoadError(
            f"{' and '.join(missing)}: there is no such file on this worker"
        )
    return params


def _on_disk(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _alphabet(recognise: Any, rec_model_path: str) -> frozenset[str]:
    """The characters that the loaded model can write, from its own list without the first, which is CTC's blank."""
    if recognise is None:
        raise ModelLoadError(
            "RapidOCR found no text on a sign that reads READY: its models are not what they should be"
        )
    characters = recognise.postprocess_op.character
    outputs = recognise.session.session.get_outputs()[0].shape
    if isinstance(outputs[-1], int) and outputs[-1] != len(characters):
        raise ModelLoadError(
            f"rec_model_path: {rec_model_path!r} tells {outputs[-1]} characters apart, and its list has "
            f"{len(characters)}: the characters are another model's"
        )
    return frozenset(characters[1:])


def _what_to_do(lang: str, rec_model_path: str, error: Exception) -> str:
    said = _last_line(str(error))
    failed = f"OCR's models cannot be loaded ({type(error).__name__}: {said})"
    if rec_model_path:
        return f"{failed}; is rec_model_path {rec_model_path!r} an ONNX recognition model of RapidOCR's?"
    if lang:
        return (
            f"{failed}; RapidOCR fetches the model of lang: {lang} when it is first used: does this worker reach "
            "www.modelscope.cn? Without it, put the model's file on the worker and give it as rec_model_path"
        )
    return failed


def _last_line(text: str) -> str:
    """The last line that is not blank, without white space around it."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _sign() -> Image.Image:
    image = Image.new("RGB", (200, 80), "white")
    ImageDraw.Draw(image).text(
        (20, 20), "READY", fill="black", font=ImageFont.load_default(36)
    )
    return image
