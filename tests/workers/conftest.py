"""Small checkpoints, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for checkpoints."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def clip_folder(checkpoints: Path) -> Path:
    """A transformers CLIP with its tokenizer and image processor."""
    from tests.workers.checkpoints import save_clip

    return save_clip(checkpoints / "clip", seed=1)


@pytest.fixture(scope="session")
def legacy_clip_folder(checkpoints: Path) -> Path:
    """One whose config has the `eos_token_id: 2` of CLIPs published before 2023."""
    from tests.workers.checkpoints import save_clip

    return save_clip(checkpoints / "legacy", seed=2, eos_token_id=2)


@pytest.fixture(scope="session")
def large_clip_folder(checkpoints: Path) -> Path:
    """One with the embedding of a ViT-L/14, 768 wide."""
    from tests.workers.checkpoints import save_clip

    return save_clip(checkpoints / "large", seed=3, projection_dim=768)


@pytest.fixture(scope="session")
def open_clip_folder(checkpoints: Path) -> Path:
    """An open_clip model as `local-dir:` takes it."""
    from tests.workers.checkpoints import save_open_clip

    return save_open_clip(checkpoints / "open_clip", seed=4)


@pytest.fixture(scope="session")
def head_file(checkpoints: Path) -> Path:
    """An aesthetic head."""
    from tests.workers.checkpoints import save_head

    return save_head(checkpoints / "aesthetic-model.pth", seed=5)
