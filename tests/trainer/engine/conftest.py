"""Engines by hand, each with the rewards that its name says."""

from __future__ import annotations

import pytest

from tests.trainer.engine.by_hand import BOTH, POINT, RANKED, SINGLE, EngineByHand


@pytest.fixture
def engine():
    """Of one pointwise reward, in chunks of two."""
    return EngineByHand((POINT,))


@pytest.fixture
def single():
    """Of one pointwise reward, each sample a chunk."""
    return EngineByHand(SINGLE)


@pytest.fixture
def ranked():
    """Of a pointwise reward and its rank."""
    return EngineByHand(BOTH)


@pytest.fixture
def shared():
    """Of a rank over several trainer ranks."""
    return EngineByHand((RANKED,), is_shared=True)
