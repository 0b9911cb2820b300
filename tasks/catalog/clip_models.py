"""The catalog's entries of the rewards made of a CLIP's embeddings: their options and defaults. Data only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tasks.catalog.entry import GPU, IMAGE_OR_VIDEO, ModelEntry, Option

_Name = Annotated[str, Field(min_length=1)]

_REVISION = Option(
    str, "", "branch, tag or commit of the model on the hub; empty for its main branch"
)

_PREPROCESSING = Option(
    Literal["auto", "pil", "uint8", "tensor"],
    "auto",
    "who resizes images: Pillow; torch on the CPU in 8 bits (nearly Pillow's pixels, much faster); or torch on the "
    "model's device (a few 1e-4 of a cosine apart). auto: uint8 with bfloat16 and float16, which err by more; else pil",
)


def _model(default: str, doc: str) -> Option:
    """An option that names a model, and is not empty."""
    return Option(_Name, default, doc)


def _clip(path: str, version: str, options: dict[str, Option], doc: str) -> ModelEntry:
    """A reward that compares an image or video with its prompt."""
    return ModelEntry(
        path=path,
        queue=GPU,
        required=(("prompt",), IMAGE_OR_VIDEO),
        version=version,
        extra="gpu",
        uses_dtype=True,
        options=options,
        doc=doc,
    )


PICKSCORE = _clip(
    path="workers.models.pickscore:PickScore",
    version="2",
    options={
        "model_name_or_path": _model(
            "yuvalkirstain/PickScore_v1",
            "directory on the worker, or id on the hub",
        ),
        "processor_name_or_path": _model(
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "the same of its tokenizer and image processor",
        ),
        "revision": _REVISION,
        "preprocessing": _PREPROCESSING,
    },
    doc="exp(logit_scale) * cos(text, image) / 26, about 0.6 to 1; the mean over a video's frames",
)

CLIP = _clip(
    path="workers.models.clip:CLIP",
    version="2",
    options={
        "model_name_or_path": _model(
            "openai/clip-vit-large-patch14",
            "directory on the worker or id on the hub; for open_clip an architecture, local-dir: or hf-hub:",
        ),
        "backend": Option(
            Literal["transformers", "open_clip"],
            "transformers",
            "the library that has the model",
        ),
        "pretrained": Option(
            str,
            "",
            "for an architecture of open_clip: the tag or file of its weights",
        ),
        "processor_name_or_path": Option(
            str,
            "",
            "tokenizer and image processor, unless they are the model's own",
        ),
        "revision": _REVISION,
        "frames": Option(
            Literal["first", "mean"],
            "first",
            "of a video: its first frame, or the mean over all",
        ),
        "preprocessing": _PREPROCESSING,
    },
    doc="cos(text, image), in [-1, 1]; a video's first frame, or the mean over its frames",
)

HPSV2 = _clip(
    path="workers.models.hps:HPSv2",
    version="1",
    options={
        "hps_version": Option(
            Literal["v2.0", "v2.1"], "v2.1", "which of the two published scores"
        ),
        "checkpoint_path": _model(
            "xswu/HPSv2", "file or directory on the worker, or id on the hub"
        ),
        "revision": _REVISION,
    },
    doc="cos(text, image) of the preference model HPS v2, 0.2 to 0.35; the mean over a video's frames",
)

AESTHETIC = ModelEntry(
    path="workers.models.aesthetic:Aesthetic",
    queue=GPU,
    required=(IMAGE_OR_VIDEO,),
    version="2",
    extra="gpu",
    uses_dtype=True,
    options={
        "model_name_or_path": _model(
            "openai/clip-vit-large-patch14",
            "the CLIP ViT-L/14: directory on the worker, or id on the hub",
        ),
        "revision": _REVISION,
        "checkpoint_path": _model(
            "trl-lib/ddpo-aesthetic-predictor",
            "the head: file or directory on the worker, or id on the hub",
        ),
        "checkpoint_file": _model(
            "aesthetic-model.pth", "the head's file in that directory or repository"
        ),
        "preprocessing": _PREPROCESSING,
    },
    doc="LAION's aesthetic predictor v2, ratings from 1 to 10; the mean over a video's frames",
)
