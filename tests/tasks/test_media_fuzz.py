"""The short form of `tests/fuzz/media.py`."""

from __future__ import annotations

import pytest

from tests.fuzz import media

FEW_S = 4.0


def test_random_media_are_taken_right_or_refused_and_end_nothing():
    counts = media.run(FEW_S, "suite")
    assert (counts.wrong, counts.ended) == (0, 0), counts.found
    assert counts.tried > counts.refused > 0


def test_a_fuzzer_sees_wrong_pixels_and_what_ends_a_client(monkeypatch):
    monkeypatch.setattr(media, "_taken", lambda made: 255 - media.np.zeros((1, 1, 3), media.np.uint8))
    assert media.run(0.5, "planted").wrong > 0

    def ends(_made):
        raise ZeroDivisionError

    monkeypatch.setattr(media, "_taken", ends)
    counts = media.run(0.5, "planted")
    assert counts.ended > 0
    assert counts.found


@pytest.mark.parametrize("seed", ["bcf1f0a1.73918", "bcf1f0a1.118293"])
def test_a_tga_or_gif_that_becomes_grey_as_it_is_read_has_its_own_levels(seed):
    """It keeps a palette, which Pillow's `convert` would apply."""
    assert media.trial(seed) == "right"
