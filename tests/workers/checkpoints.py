"""Small checkpoints of true architecture with random weights and the real CLIP tokenizer, made without a download."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

NUM_TOKENS = 49_408
START_OF_TEXT, END_OF_TEXT = 49_406, 49_407

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": NUM_TOKENS, "width": 64, "heads": 2, "layers": 2},
}
"""An open_clip architecture."""

SEEN_AS = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
"""What published models of open_clip say of their images in `preprocess_cfg`."""


def save_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer, from the byte-pair vocabulary that open_clip ships, as files for any transformers version."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as lines:
        merges = lines.read().split("\n")[1 : NUM_TOKENS - 512 - 2 + 1]
    symbols = list(bytes_to_unicode().values())
    symbols += [s + "</w>" for s in symbols]
    symbols += [m.replace(" ", "") for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(symbols) == NUM_TOKENS
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    names = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_clip(folder: Path, seed: int, eos_token_id: int = END_OF_TEXT, **sizes: Any) -> Path:
    """A transformers CLIP of two layers, with its tokenizer and image processor. `sizes` are `CLIPConfig`'s."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": NUM_TOKENS, "eos_token_id": eos_token_id, **sizes.pop("text", {})},
        vision_config={**tower, "image_size": 224, "patch_size": 32, **sizes.pop("vision", {})},
        **{"projection_dim": 32, **sizes},
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5)  # wide enough that inputs matter
        model.logit_scale.fill_(4.6)
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_open_clip(folder: Path, seed: int) -> Path:
    """An open_clip model as `local-dir:` takes it; its weights are `open_clip_pytorch_model.bin`."""
    import open_clip

    torch.manual_seed(seed)
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURE, "preprocess_cfg": SEEN_AS}))
    model = open_clip.CLIP(**ARCHITECTURE)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def save_head(file: Path, seed: int) -> Path:
    """The LAION aesthetic head with random weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for at, wide, narrow in ((0, 768, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        weights[f"layers.{at}.weight"] = torch.randn(narrow, wide, generator=generator) * (1.4 / wide**0.5)
        weights[f"layers.{at}.bias"] = torch.randn(narrow, generator=generator)
    torch.save(weights, file)
    return file


def pictures(num: int, seed: int = 0) -> list[Image.Image]:
    """Smooth colourful images of many sizes, odd margins among them."""
    rng = np.random.default_rng(seed)
    sizes = [(224, 224), (450, 346), (333, 501), (64, 96), (300, 300), (225, 224), (320, 183), (224, 301)]
    images = []
    for i in range(num):
        height, width = sizes[i % len(sizes)]
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8)).resize((width, height), 2)
        noise = rng.integers(-20, 21, (height, width, 3))
        images.append(Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)))
    return images


class Reference:
    """transformers, one pair at a time, with its PIL image processor: the model's own logits."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model = transformers.CLIPModel.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        self.processor = kind.from_pretrained(folder)

    @torch.no_grad()
    def logit(self, prompt: str, image: Image.Image) -> float:
        tokens = self.tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        pixels = self.processor(images=[image], return_tensors="pt").pixel_values
        return self.model(**tokens, pixel_values=pixels).logits_per_image.item()

    def cosine(self, prompt: str, image: Image.Image) -> float:
        return self.logit(prompt, image) / self.model.logit_scale.exp().item()
