"""The catalog's entry of OCR. Data only."""

from __future__ import annotations

from typing import Literal

from tasks.catalog.entry import GPU, IMAGE_OR_VIDEO, ModelEntry, Option

_Language = Literal[
    "", "latin", "eslav", "cyrillic", "korean", "el", "th", "devanagari", "ta", "te"
]

OCR = ModelEntry(
    path="workers.models.ocr:OCR",
    queue=GPU,
    required=(("prompt",), IMAGE_OR_VIDEO),
    optional=("metadata",),
    version="2",
    extra="ocr",
    options={
        "lang": Option(
            _Language,
            "",
            "which PP-OCRv5 recognition model RapidOCR fetches; empty for the one in its wheel (Chinese, Japanese, "
            "English and most Latin letters)",
        ),
        "rec_model_path": Option(
            str,
            "",
            "a recognition model in ONNX on the worker, used instead of those",
        ),
        "rec_keys_path": Option(
            str,
            "",
            "that model's characters, one a line, where the model does not have them",
        ),
        "several_texts": Option(
            Literal["invalid", "mean"],
            "invalid",
            "what becomes of several texts in metadata: invalid, or their mean",
        ),
    },
    doc="1 - edit distance / length between the quoted text of the prompt and the text read, in [0, 1]",
)
