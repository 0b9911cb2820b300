"""RapidOCR as the reward OCR uses it: which models it reads with, what they can write, what shapes they are given."""

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
"""RapidOCR makes larger images so small before it reads them."""

TALL = 8
"""An image more than so many times as tall as wide is padded, as RapidOCR pads wide ones: its text detector brings the
shorter edge to 736 pixels, whatever the longer one becomes."""

WIDE = 100
"""Of a wider image RapidOCR would first bring the height to 30 pixels, whatever the width becomes."""

PADDED = 4
"""A padded image is so many times as long as wide; RapidOCR's own padding comes to that too."""

LEAST_EDGE = 60
"""No padded edge is shorter, in pixels; RapidOCR's own padding again."""

LONG_LINE = 80
"""A line of text more than so many times as long as high is recognised alone: in a batch, which is padded to its
longest, it would make each of the others as long."""


class Reader:
    """Reads the text on images.

    Args:
        lang: Language of one of RapidOCR's recognition models of PP-OCRv5; "" for the model in its wheel.
        rec_model_path: ONNX file of a recognition model on this worker, instead.
        rec_keys_path: File with that model's characters, one a line, where they are not in the model.

    Attributes:
        alphabet: Every character that the recognition model can write.

    Raises:
        ModelLoadError: A file is not there, is no recognition model, or its characters are another model's.
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
            self.read(_sign())  # it loads its models when it first sees text
        except (
            Exception
        ) as error:  # RapidOCR, onnxruntime and requests each raise their own
            raise ModelLoadError(_what_to_do(lang, rec_model_path, error)) from error
        self.alphabet = _alphabet(self._engine.text_rec, rec_model_path)
        self._engine.text_rec = _OneLongLineAtATime(self._engine.text_rec)

    def read(self, image: Image.Image) -> str:
        """The lines read, in reading order, with a space between them."""
        image = bounded(image)
        pixels_BGR = np.frombuffer(image.tobytes("raw", "BGR"), np.uint8).reshape(
            image.height, image.width, 3
        )
        lines: Sequence[str] | None = self._engine(pixels_BGR).txts
        return " ".join(lines or ())


def bounded(image: Image.Image) -> Image.Image:
    """The image as it is, or, of extreme proportions, in the middle of black, so that its shape makes nothing large."""
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
    """RapidOCR's recogniser, with a bound on what one batch of lines takes."""

    def __init__(self, recognise: Any) -> None:
        self._recognise = recognise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recognise, name)

    def __call__(self, asked: Any) -> Any:
        lines: list[Any] = (
            [asked.img] if isinstance(asked.img, np.ndarray) else list(asked.img)
        )
        is_long = [line.shape[1] > LONG_LINE * line.shape[0] for line in lines]
        if not any(is_long):
            return self._recognise(asked)
        usual = [at for at, long in enumerate(is_long) if not long]
        batches = [[at] for at, long in enumerate(is_long) if long] + (
            [usual] if usual else []
        )
        texts, scores, words = ([None] * len(lines) for _ in range(3))
        for batch in batches:
            output = self._recognise(
                dataclasses.replace(asked, img=[lines[at] for at in batch])
            )
            for place, at in enumerate(batch):
                texts[at], scores[at], words[at] = (
                    output.txts[place],
                    output.scores[place],
                    output.word_results[place],
                )
        return dataclasses.replace(
            output,
            imgs=lines,
            txts=tuple(texts),
            scores=tuple(scores),
            word_results=tuple(words),
        )


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
    files = {"rec_model_path": rec_model_path, "rec_keys_path": rec_keys_path}
    missing = [
        f"{option}: {path!r}"
        for option, path in files.items()
        if path and not _on_disk(path).is_file()
    ]
    if missing:
        raise ModelLoadError(
            f"{' and '.join(missing)}: there is no such file on this worker"
        )
    keys = {"rec_model_path": "Rec.model_path", "rec_keys_path": "Rec.rec_keys_path"}
    return {keys[option]: str(_on_disk(path)) for option, path in files.items() if path}


def _on_disk(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _alphabet(recognise: Any, rec_model_path: str) -> frozenset[str]:
    """What the loaded model can write, from its own list of characters: CTC's blank first, white space last."""
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
    said = next(
        (line.strip() for line in reversed(str(error).splitlines()) if line.strip()), ""
    )
    failed = f"OCR's models cannot be loaded ({type(error).__name__}: {said})"
    if rec_model_path:
        return f"{failed}; is rec_model_path {rec_model_path!r} an ONNX recognition model of RapidOCR's?"
    if lang:
        return (
            f"{failed}; RapidOCR fetches the model of lang: {lang} when it is first used: does this worker reach "
            "www.modelscope.cn? Without it, put the model's file on the worker and give it as rec_model_path"
        )
    return failed


def _sign() -> Image.Image:
    image = Image.new("RGB", (200, 80), "white")
    ImageDraw.Draw(image).text(
        (20, 20), "READY", fill="black", font=ImageFont.load_default(36)
    )
    return image
