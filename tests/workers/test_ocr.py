from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from tests.workers.requests import Requests, make, plain, run


def drawn(*lines: str, size: int = 40) -> np.ndarray:
    """Real pixels with these lines of text."""
    image = Image.new("RGB", (480, 40 + 60 * len(lines)), (250, 248, 240))
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((30, 20 + 60 * i), line, fill=(20, 20, 40), font=ImageFont.load_default(size))
    return np.asarray(image)


def edits(one: str, other: str) -> int:
    """Levenshtein's distance, by the textbook's table."""
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


def expected(target: str, read: str) -> float:
    """The documented formula."""
    target, read = (text.replace(" ", "").lower() for text in (target, read))
    return 1.0 if target in read else 1 - min(edits(target, read), len(target)) / len(target)


@pytest.fixture(scope="module")
def ocr():
    from workers.models.ocr import OCR

    return make(OCR)


@pytest.fixture
def requests() -> Requests:
    return Requests()


def test_the_textbook_distance_is_right():
    pairs = [("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"), ("same", "same")]
    assert [edits(*pair) for pair in pairs] == [3, 3, 2, 0]


PAIRS = [
    ("OPEN", "OPEN"),
    ("open", "OPEN"),
    ("O P E N", "OPEN"),
    ("FOX", "SILVER FOX TAVERN"),
    ("SILVER FOX", "SILVER BOX"),
    ("KITTEN", "SITTING"),
    ("HELLO WORLD", "HELLO"),
    ("HI", "SOMETHING ELSE ENTIRELY"),
    ("Straße", "STRASSE"),
    ("猫カフェ", "猫力フェ"),
    ("OPEN", ""),
]


@pytest.mark.parametrize(("target", "read"), PAIRS)
def test_the_reward_is_one_minus_the_share_of_letters_to_change(target, read):
    from workers.models.ocr import similarity

    assert similarity(target, read) == pytest.approx(expected(target, read), abs=1e-12)


letters = st.text("abcAB ", max_size=12)


@given(letters.filter(str.strip), letters)
def test_the_reward_is_that_of_the_textbook_for_any_two_texts(target, read):
    from workers.models.ocr import similarity

    assert similarity(target, read) == pytest.approx(expected(target, read), abs=1e-12)
    assert 0 <= similarity(target, read) <= 1


def test_drawn_text_is_read_from_real_pixels_and_compared(ocr, requests):
    samples = [
        requests.sample(prompt='A sign that says "SILVER FOX" at dusk', image=drawn("SILVER BOX")),
        requests.sample(prompt="a poster, “grand opening today”", image=drawn("GRAND", "OPENING", "TODAY")),
        requests.sample(prompt='a sign "OPEN"', metadata={"text": "BOX 42"}, image=drawn("SILVER BOX")),
        requests.sample(prompt="a sign", metadata={"text": 42}, image=drawn("No 42")),
    ]
    outcomes = run(ocr, samples, requests.payloads)
    assert [o.info["read"] for o in outcomes[:2]] == [["SILVER BOX"], ["GRAND OPENING TODAY"]]
    assert plain(outcomes) == pytest.approx([1 - 1 / 9, 1.0, expected("BOX 42", "SILVER BOX"), 1.0])
    assert [o.info["target"] for o in outcomes] == ["SILVER FOX", "grand opening today", "BOX 42", "42"]


def test_an_image_without_text_has_a_reward_of_zero(ocr, requests):
    blank, tiny = np.full((200, 300, 3), 255, np.uint8), np.full((8, 8, 3), 127, np.uint8)
    samples = [requests.sample(prompt='a sign "OPEN"', image=image) for image in (blank, tiny)]
    outcomes = run(ocr, samples, requests.payloads)
    assert plain(outcomes) == [0.0, 0.0]
    assert outcomes[0].info["read"] == [""]


def test_a_videos_reward_is_the_mean_over_its_frames(ocr, requests):
    frames = np.stack([drawn("OPEN"), drawn("OVEN")])
    (outcome,) = run(ocr, [requests.sample(prompt='a sign "OPEN"', video=frames)], requests.payloads)
    assert outcome.info["read"] == ["OPEN", "OVEN"]
    assert outcome.reward == pytest.approx((1.0 + 0.75) / 2)


def test_a_sample_without_a_text_to_look_for_is_invalid_and_not_zero(ocr, requests):
    samples = [requests.sample(prompt="a cat", image=drawn("OPEN")), requests.sample('"OPEN"', image=drawn("OPEN"))]
    outcomes = run(ocr, samples, requests.payloads)
    assert plain(outcomes) == ["invalid", 1.0]
    assert "no text to look for" in outcomes[0].failure.message


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign "OPEN"', "OPEN"),
        ("a sign “OPEN”", "OPEN"),
        ("a sign „OPEN“", "OPEN"),
        ("a sign „OPEN”", "OPEN"),
        ("a sign 'OPEN'", "OPEN"),
        ("a sign ‘OPEN’", "OPEN"),
        ('"first" and "second"', "first"),
        ("the baker's sign 'FRESH BREAD'", "FRESH BREAD"),
        ("the baker's sign 'DON'T WALK'", "DON'T WALK"),
        ("a sign ‘DON’T WALK’ in the rain", "DON’T WALK"),
        ("a sign “DON’T WALK”", "DON’T WALK"),
        ('a sign "DON\'T WALK"', "DON'T WALK"),
        ('the \'60s, a sign "LOVE"', "LOVE"),
        ('two dogs\' bowls and "REX"', "REX"),
        ("it's the dog's sign: \"REX\"", "REX"),
        ('a sign\n"TWO\nLINES"', "TWO\nLINES"),
        ('the word "“quoted”"', "“quoted”"),
        ('"" then "LATER"', None),
        ('" "', None),
        ('an open " mark', None),
        ("don't walk, it's late", None),
        ("rock'n'roll", None),
        ("5'10\" tall", None),
    ],
)
def test_the_text_asked_for_is_between_the_first_pair_of_quotation_marks(prompt, target):
    from workers.models.ocr import target_text

    assert target_text(prompt, {}) == target
