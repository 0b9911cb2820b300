"""How a CLIP sees an image: resized, cut or padded to a square, normalised; by Pillow, or by torch on CPU or device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image

Backend = Literal["pil", "uint8", "tensor"]
"""Who resizes. `pil`: Pillow on the CPU, the reference of CLIP. `uint8`: torch on the CPU, by Pillow's method with
coarser weights: one level of 256 more or less in a few of a thousand values (two in noise), in an eighth of the time.
`tensor`: torch on the model's device, antialiased, in float32 and rounded once, as torchvision does on CUDA; it differs
from Pillow by 0.15 of 256 levels a pixel, and by a few levels where colours saturate."""

COARSE_DTYPES = (torch.bfloat16, torch.float16)
"""What these add to a score is more than what `uint8` adds: the table in docs/moving.md."""

MOST_PROPORTION = 256
"""An image more than so many times as long as wide gets no score: a CLIP sees a sliver of it, or nothing."""

MOST_RESIZED_PIXELS = 2**24
"""An image that would have more pixels than this between resize and cut (64 MiB in PIL) gets no score either."""

_PIL_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """One way from an RGB image to the `(3, H, W)` that a tower was trained on.

    Attributes:
        fit: `shortest` makes the shorter edge as long as `edge` and `longest` the longer edge; both keep the
            proportions. `squash` makes both edges as long as `edge`. None does not resize.
        edge: `(height, width)` to resize to; equal unless `fit` is `squash`.
        size: `(height, width)` to which the middle is cut, or padded with black.
        halves: Half of an odd margin is rounded `down` (transformers), or to the `nearest`, ties to even (torchvision).
        to_levels: Whether the tensor backend rounds to 256 levels as an image file would.
    """

    fit: Literal["shortest", "longest", "squash"] | None
    edge: tuple[int, int]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    halves: Literal["down", "nearest"] = "down"
    backend: Backend = "pil"
    to_levels: bool = True

    def pixels(self, images: Sequence[Image.Image], device: Any) -> torch.Tensor:
        """Levels 0 to 255 of `N` images, `(N, 3, H, W)`: float32 on `device` (`tensor`), or uint8 on the CPU."""
        if self.backend == "tensor":
            return torch.stack(
                [self._resized_tensor(image, device) for image in images]
            )
        if self.backend == "uint8":
            return torch.stack([self._resized_levels(image) for image in images])
        levels_HWC = [np.asarray(self._resized_image(image)) for image in images]
        levels_NHWC = np.stack(levels_HWC)
        return torch.from_numpy(levels_NHWC).permute(0, 3, 1, 2)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """What a tower takes: `(pixels / 255 - mean) / std`, float32."""
        mean = pixels.new_tensor(self.mean, dtype=torch.float32).view(3, 1, 1)
        std = pixels.new_tensor(self.std, dtype=torch.float32).view(3, 1, 1)
        return (pixels.float() / 255.0 - mean) / std

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """`(height, width)` of an image of this size after the resize."""
        if self.fit is None:
            return height, width
        if self.fit == "squash":
            return self.edge
        if self.fit == "longest":
            scale = self.edge[0] / max(height, width)
            return round(height * scale), round(width * scale)

        short, long = sorted((height, width))
        scaled = int(self.edge[0] * long / short)
        return (self.edge[0], scaled) if height <= width else (scaled, self.edge[0])

    def most_proportion(self) -> int:
        """How many times as long as wide an image may be. This bounds the memory that a resized image takes."""
        if self.fit != "shortest":
            return MOST_PROPORTION
        return min(MOST_PROPORTION, MOST_RESIZED_PIXELS // self.edge[0] ** 2)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, bottom, right of the middle in a resized image; outside of the image where padding is needed."""
        top, left = self._half(height - self.size[0]), self._half(width - self.size[1])
        return top, left, top + self.size[0], left + self.size[1]

    def _half(self, margin: int) -> int:
        if margin < 0:
            return -(-margin // 2)
        return margin // 2 if self.halves == "down" else round(margin / 2)

    def _resized_image(self, image: Image.Image) -> Image.Image:
        image = _rgb(image)
        height, width = self.resized_size(image.height, image.width)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), _PIL_FILTERS[self.interpolation])
        top, left, bottom, right = self.box(height, width)
        return image.crop((left, top, right, bottom))

    def _resized_levels(self, image: Image.Image) -> torch.Tensor:
        return self._cut(self._resized(_levels(image)))

    def _resized_tensor(self, image: Image.Image, device: Any) -> torch.Tensor:
        levels = _levels(image).to(device).float()
        cut = self._cut(self._resized(levels))
        return cut.clamp(0.0, 255.0).round() if self.to_levels else cut

    def _resized(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels `(3, H, W)` in the size that the tower wants, in their dtype."""
        height, width = levels.shape[-2:]
        wanted = self.resized_size(height, width)
        if wanted == (height, width):
            return levels
        resized: torch.Tensor = torch.nn.functional.interpolate(
            levels[None],
            wanted,
            mode=self.interpolation,
            antialias=True,
            align_corners=False,
        )[0]
        return resized

    def _cut(self, levels: torch.Tensor) -> torch.Tensor:
        """The middle of a resized image `(3, H, W)`, padded with black where the image is smaller."""
        height, width = levels.shape[-2:]
        top, left, bottom, right = self.box(height, width)
        return torch.nn.functional.pad(
            levels, (-left, right - width, -top, bottom - height)
        )


def backend_for(option: str, dtype: torch.dtype) -> Backend:
    """Who resizes where the option `preprocessing` says so, or says `auto`: Pillow, unless the dtype errs by more."""
    if option == "auto":
        return "uint8" if dtype in COARSE_DTYPES else "pil"
    return cast(Backend, option)


def of_transformers(processor: Any, backend: Backend) -> Preprocessing:
    """The preprocessing that a transformers CLIP image processor describes.

    Raises:
        ValueError: The processor preprocesses in a way that is unknown here.
    """
    size, cut = _sizes(processor.size), _sizes(processor.crop_size)
    fit, edge = _fit_of(processor.do_resize, size)
    if not processor.do_center_crop and fit != "squash":
        raise ValueError(
            f"the image processor neither crops nor resizes to one size: {size}"
        )
    if not (processor.do_rescale and processor.do_normalize):
        raise ValueError("the image processor does not rescale and normalise")

    filters = {int(pil): name for name, pil in _PIL_FILTERS.items()}
    if int(processor.resample) not in filters:
        raise ValueError(
            f"the image processor resizes by filter {processor.resample}; known are {filters}"
        )
    return Preprocessing(
        fit=fit,
        edge=edge,
        size=(cut["height"], cut["width"]) if processor.do_center_crop else edge,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        interpolation=filters[int(processor.resample)],
        backend=backend,
    )


def _fit_of(
    is_resized: bool, size: Mapping[str, int]
) -> tuple[Literal["shortest", "squash"] | None, tuple[int, int]]:
    """How an image is resized, and to which `(height, width)`."""
    if not is_resized:
        return None, (0, 0)
    if "shortest_edge" in size:
        return "shortest", (size["shortest_edge"], size["shortest_edge"])
    return "squash", (size["height"], size["width"])


def of_open_clip(config: Mapping[str, Any], backend: Backend) -> Preprocessing:
    """The preprocessing that an open_clip model's `preprocess_cfg` describes.

    Raises:
        ValueError: It preprocesses in a way that is unknown here.
    """
    size = config["size"]
    edge = (size, size) if isinstance(size, int) else (size[0], size[1])
    if config["interpolation"] not in _PIL_FILTERS or config.get("fill_color"):
        raise ValueError(
            f"its images are preprocessed in a way unknown here: {dict(config)}"
        )
    if edge[0] != edge[1] and config["resize_mode"] != "squash":
        raise ValueError(
            f"its images are not square and not squashed, which is unknown here: {dict(config)}"
        )
    return Preprocessing(
        fit=config["resize_mode"],
        edge=edge,
        size=edge,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        halves="nearest",
        backend=backend,
    )


def as_hps(preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing of the package `hpsv2`: the whole image on black, resized as a float tensor, never rounded."""
    return replace(preprocessing, fit="longest", backend="tensor", to_levels=False)


def _levels(image: Image.Image) -> torch.Tensor:
    """The levels of an image, uint8 `(3, H, W)`, channels last in memory."""
    return torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _sizes(size: Any) -> dict[str, int]:
    """`{"shortest_edge": n}` or `{"height": h, "width": w}`, of a dict (transformers 4) or an object (5)."""
    items = size if isinstance(size, Mapping) else vars(size)
    return {name: int(value) for name, value in items.items() if value}
