"""The LAION aesthetic predictor: how people rate an image, whatever its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tasks.errors import ModelLoadError
from workers.base import Accelerator, RewardArguments
from workers.models import transformers_checks
from workers.models.checkpoints import find_file, loading
from workers.models.clip_pixels import backend_for
from workers.models.clip_rewards import FrameReward
from workers.models.clip_towers import (
    load_preprocessing,
    load_transformers,
    pooled,
)

HEAD_WIDTHS = (768, 1024, 128, 64, 16, 1)
HEAD_LAYERS = (0, 2, 4, 6, 7)
"""Indices of the head's five affine layers in its checkpoint; between them is dropout, which inference leaves out."""


class Aesthetic(FrameReward):
    """A head of five affine layers (768-1024-128-64-16-1) on the L2-normalised image embedding of CLIP ViT-L/14.

    Schuhmann, "improved-aesthetic-predictor" (2022), the head `sac+logos+ava1-l14-linearMSE` of LAION aesthetics v2:
    ratings from 1 to 10, most images between 4 and 7. The head computes in float32. A video's reward is the mean over
    its frames. Version 2.
    """

    required_fields = ()

    def __init__(self, config: RewardArguments, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        options = config.extra_kwargs
        self.tower = _ImageTower(options, self.device, self.dtype)
        path = find_file(
            "checkpoint_path", options["checkpoint_path"], options["checkpoint_file"]
        )
        with loading("checkpoint_path", path):
            self._head = load_head(path).to(self.device)

    def scores(
        self, embedded: torch.Tensor, tokens: Any, counts: Sequence[int]
    ) -> torch.Tensor:
        """`(F,)`."""
        ratings: torch.Tensor = self._head(embedded)
        return ratings.squeeze(-1)


class _ImageTower:
    def __init__(
        self, options: dict[str, Any], device: torch.device, dtype: torch.dtype
    ) -> None:
        name, revision = options["model_name_or_path"], options["revision"]
        backend = backend_for(options["preprocessing"], dtype)
        self.preprocessing = load_preprocessing(
            "model_name_or_path", name, revision, backend
        )
        model = load_transformers(name, revision)
        transformers_checks.check_sizes(
            "model_name_or_path", name, self.preprocessing, model.config.vision_config
        )
        _check_width(name, model.config.projection_dim)
        del model.text_model, model.text_projection
        self._model = model.to(device, dtype)

    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        return pooled(self._model.get_image_features(pixel_values=inputs))


def _check_width(name: str, width: int) -> None:
    if width != HEAD_WIDTHS[0]:
        raise ModelLoadError(
            f"model_name_or_path: {name!r} makes embeddings of {width} numbers, the aesthetic head takes "
            f"{HEAD_WIDTHS[0]}; name a CLIP ViT-L/14, openai/clip-vit-large-patch14 for the published scores"
        )


def load_head(path: str) -> torch.nn.Module:
    """The head in a checkpoint of keys `layers.0.weight` to `layers.7.bias`.

    Raises:
        ModelLoadError: The checkpoint has other layers, or layers of other sizes.
    """
    weights = torch.load(path, map_location="cpu", weights_only=True)
    _check_no_other_weights(path, weights)
    layers = []
    for i, wide, narrow in zip(HEAD_LAYERS, HEAD_WIDTHS, HEAD_WIDTHS[1:], strict=False):
        layers.append(_affine_layer(path, weights, i, wide, narrow))
    return torch.nn.Sequential(*layers).eval()


def _check_no_other_weights(path: str, weights: Mapping[str, Any]) -> None:
    known = set()
    for i in HEAD_LAYERS:
        known |= {f"layers.{i}.weight", f"layers.{i}.bias"}
    others = sorted(set(weights) - known)
    if others:
        raise ModelLoadError(
            f"{path} is no LAION aesthetic head: it has {len(others)} weights that the head does not have, "
            f"{others[0]} first"
        )


def _affine_layer(
    path: str, weights: Mapping[str, Any], i: int, wide: int, narrow: int
) -> torch.nn.Linear:
    """Layer `i` of the checkpoint, from `wide` numbers to `narrow` numbers."""
    weight = weights.get(f"layers.{i}.weight")
    bias = weights.get(f"layers.{i}.bias")
    shape = tuple(weight.shape) if weight is not None else None
    if bias is None or shape != (narrow, wide):
        raise ModelLoadError(
            f"{path} is no LAION aesthetic head: layers.{i} needs a weight ({narrow}, {wide}) and a bias, "
            f"found {'none' if shape is None else shape}"
        )
    layer = torch.nn.Linear(wide, narrow)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer
