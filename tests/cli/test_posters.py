from __future__ import annotations

import numpy as np

from trainer_client.cli.posters import SIZE, SUBJECTS, Flaws, draw, draw_group


def test_equal_seeds_give_equal_posters_and_other_seeds_give_others():
    first, again, other = (draw_group(SUBJECTS[0], 3, seed) for seed in (7, 7, 8))
    assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))


def test_posters_of_a_group_differ_and_have_one_size():
    posters = draw_group(SUBJECTS[1], 8, seed=0)
    assert {p.size for p in posters} == {(SIZE, SIZE)}
    assert len({p.tobytes() for p in posters}) == 8


def test_every_subject_asks_for_its_words_in_quotation_marks():
    assert all(f'"{subject.words}"' in subject.prompt for subject in SUBJECTS)


def test_faint_words_leave_the_photograph_almost_as_it_is():
    photo, clear, faint = (
        np.asarray(draw(SUBJECTS[2], Flaws(faintness=faintness), np.random.default_rng(0)), dtype=float)
        for faintness in (1.0, 0.0, 0.8)
    )
    assert 0 < np.abs(faint - photo).mean() < 0.3 * np.abs(clear - photo).mean()
