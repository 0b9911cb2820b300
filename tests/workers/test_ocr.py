from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from tasks.errors import ModelLoadError
from tests.workers.requests import Requests, make, plain, run


def drawn(*lines: str, size: int = 40) -> np.ndarray:
    """Real pixels with these lines of text."""
    image = Image.new("RGB", (480, 40 + 60 * len(lines)), (250, 248, 240))
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((30, 20 + 60 * i), line, fill=(20, 20, 40), font=ImageFont.load_default(size))
    return np.asarray(image)


def sign(word: str) -> np.ndarray:
    """The same on an image nearly as tall as wide, which is read in a third of the time."""
    return np.pad(drawn(word), ((130, 170), (0, 0), (0, 0)), mode="edge")


def edits(one: str, other: str) -> int:
    """Levenshtein's distance, by the textbook's table."""
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


def without_typography(text: str) -> str:
    """Apostrophes, quotation marks and dashes as a typewriter has them."""
    for signs, plain_one in (("‘’ʼ´`′", "'"), ("“”″", '"'), ("–—‐‑‒―−", "-"), ("⁄", "/")):
        for one in signs:
            text = text.replace(one, plain_one)
    return text


def expected(target: str, read: str) -> float:
    """The documented formula."""
    target, read = (without_typography(text) for text in (target, read))
    target, read = (unicodedata.normalize("NFKC", text).casefold().replace(" ", "") for text in (target, read))
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
    ("ＯＰＥＮ", "open"),
    ("ｶﾌｪ", "カフェ"),
    ("E=mc²", "E=mc2"),
    ("ﬁsh", "FISH"),
    ("cafe\u0301", "CAFÉ"),
    ("ΟΔΟΣ", "οδος"),
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


@pytest.mark.parametrize(("one", "other"), [("Straße", "STRASSE"), ("cafe\u0301", "CAFÉ"), ("Ⅻ", "xii"), ("ﬁ", "FI")])
def test_texts_that_differ_in_how_they_are_written_only_are_equal(one, other):
    from workers.models.ocr_texts import similarity

    assert similarity(one, other) == similarity(other, one) == 1.0


@pytest.mark.parametrize("mark", ["\u200b", "\u00ad", "\ufe0f", "\u200e", "\ufeff"])
def test_what_is_never_drawn_is_not_looked_for(mark):
    from workers.models.ocr_texts import similarity

    assert similarity(f"CO{mark}OP{mark}", "COOP") == 1.0


GAP = float("nan")


def test_texts_of_the_metadata_are_told_from_what_is_none(ocr, requests):
    rows = [
        (["BOX"], "SILVER BOX"), (["SILVER", "FOX"], "SILVER BOX"), (GAP, "BANANA"), ("", "OPEN"),
        (False, "FALSE"), ({"en": "OPEN"}, "OPEN"),
    ]  # fmt: skip
    samples = [
        requests.sample(prompt='a sign "OPEN"', metadata={"text": text}, image=sign(shown)) for text, shown in rows
    ]
    outcomes = run(ocr, samples, requests.payloads)
    banana = expected("OPEN", "BANANA")
    assert plain(outcomes) == [1.0, "invalid", pytest.approx(banana), 1.0, "invalid", "invalid"]
    assert "2 texts" in outcomes[1].failure.message
    assert "several_texts: mean" in outcomes[1].failure.message
    assert "found False" in outcomes[4].failure.message


def test_several_texts_are_each_scored_where_the_config_says_so(requests):
    from workers.models.ocr import OCR

    samples = [
        requests.sample(metadata={"text": ["SILVER", "FOX"]}, image=sign("SILVER BOX")),
        requests.sample(metadata={"text": "BOX"}, image=sign("SILVER BOX")),
        requests.sample(metadata={"text": ["SILVER", "ЛИСА"]}, image=sign("SILVER BOX")),
    ]
    outcomes = run(make(OCR, several_texts="mean"), samples, requests.payloads)
    assert plain(outcomes) == [pytest.approx((1 + expected("FOX", "SILVER BOX")) / 2), 1.0, "invalid"]
    assert outcomes[0].info["target"] == ["SILVER", "FOX"]
    assert outcomes[1].info["target"] == "BOX"


UNREADABLE = [
    ("ОТКРЫТО", "о т к р ы", "lang: eslav"),
    ("영업 중", "영 업 중", "lang: korean"),
    ("CAFE МИР", "м и р", "lang: eslav"),
    ("ร้าน", "ร", "lang: th"),
    ("¡HOLA!", "¡", "rec_model_path"),
    ("שלום", "", "right to left"),
    ("مرحبا", "", "right to left"),
]


def test_a_target_that_the_reader_cannot_read_is_invalid_and_names_the_option(ocr, requests):
    prompts = [f'a sign "{target}"' for target in (*(row[0] for row in UNREADABLE), "OPEN")]
    outcomes = run(ocr, [requests.sample(prompt=p, image=sign("OPEN")) for p in prompts], requests.payloads)
    assert plain(outcomes) == ["invalid"] * len(UNREADABLE) + [1.0]
    for outcome, (target, missing, option) in zip(outcomes, UNREADABLE, strict=False):
        for words in (repr(target), missing, option):
            assert words in outcome.failure.message


def test_what_a_typesetter_makes_of_a_sign_is_that_sign(ocr, requests):
    targets = ["DON’T", "DON´T", "DON'T"]
    samples = [requests.sample(metadata={"text": target}, image=sign("DON'T")) for target in targets]
    assert plain(run(ocr, samples, requests.payloads)) == [1.0] * 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("“OPEN”", '"OPEN"'),
        ("9–5", "9-5"),
        ("5′ 10″", "5'10\""),
        ("⅓ T‑shirt", "1/3 t-shirt"),
        ("½", "1/2"),
        ("…", "..."),
    ],
)
def test_typographic_signs_are_the_plain_ones_on_both_sides(one, other):
    from workers.models.ocr_texts import similarity

    assert [similarity(one, other), similarity(other, one)] == [1.0, 1.0]


def test_a_character_is_readable_as_a_whole_or_piece_by_piece():
    from workers.models.ocr_texts import unreadable

    assert unreadable("½ ﬁ É", ["½", "f", "i", "É"]) == []
    assert unreadable("½", ["1", "2"]) == ["/"]
    assert unreadable("⅓ T‑shirt ‒", list("1/3Tshir-")) == []
    assert unreadable("m", ["\N{SQUARE MM}"]) == ["m"], "it writes two of them at once only"
    assert unreadable("e\u0301 x\u0302", ["é", "x"]) == ["\u0302"]
    assert unreadable("Straße", ["s", "t", "r", "a", "e"]) == []


def test_what_the_wheels_reader_can_write_is_not_refused(ocr):
    for target in (
        "Floor 13½",
        "O₂ LOW",
        "E=mc²",
        "You’re “here”",
        "ÅÄÖ ßçñ",
        "ΟΔΟΣ",
        "営業中",
        "开门",
        "ﬁsh",
        "Ⅻ ①",
        "50 €",
    ):
        ocr.model._check_readable(target)


LIKE = dict(zip("ABCEHKMOPTXabcehkmoptx", "АВСЕНКМОРТХавсенкмортх", strict=True))
"""Cyrillic letters that look as Latin ones."""


@pytest.fixture(scope="module")
def cyrillic_model(tmp_path_factory):
    """The wheel's recognition model, which calls what it sees by Cyrillic names: a true model of another alphabet."""
    import rapidocr

    (path,) = (Path(rapidocr.__file__).parent / "models").glob("*_rec_*.onnx")
    characters = "\n".join(LIKE.get(unicodedata.normalize("NFKC", c), c) for c in characters_of(path))
    copy = tmp_path_factory.mktemp("models") / "cyrillic.onnx"
    copy.write_bytes(path.read_bytes() + metadata_entry("character", characters))
    return copy


def characters_of(path: Path) -> list[str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map["character"].split("\n")


def metadata_entry(key: str, value: str) -> bytes:
    """One more entry in a model's metadata, as protobuf writes it (field 14 of ModelProto); the last one counts."""

    def number(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + number(value // 128)

    def field(tag: int, content: bytes) -> bytes:
        return number(tag * 8 + 2) + number(len(content)) + content

    return field(14, field(1, key.encode()) + field(2, value.encode()))


def test_another_recognition_model_reads_what_the_wheels_cannot(cyrillic_model, requests):
    from workers.models.ocr import OCR

    reader = make(OCR, rec_model_path=str(cyrillic_model))
    samples = [
        requests.sample(prompt='a sign "МАТЕ"', image=sign("MATE")),
        requests.sample(prompt='a sign "MATE"', image=sign("MATE")),
        requests.sample(prompt='a sign "TOMATO" in "Latin"', metadata={"text": "ТОМАТО"}, image=sign("TOMATE")),
    ]
    outcomes = run(reader, samples, requests.payloads)
    assert plain(outcomes) == [1.0, "invalid", pytest.approx(5 / 6)]
    assert outcomes[0].info["read"] == ["МАТЕ"]


def test_a_model_with_the_characters_of_another_is_refused(cyrillic_model, tmp_path):
    from workers.models.ocr import OCR

    short = tmp_path / "short.onnx"
    short.write_bytes(cyrillic_model.read_bytes() + metadata_entry("character", "\n".join("ABC" * 200)))
    with pytest.raises(ModelLoadError, match=r"tells \d+ characters apart, and its list has 602: .* another model's"):
        make(OCR, rec_model_path=str(short))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rec_model_path": "/nowhere/rec.onnx"}, "rec_model_path: '/nowhere/rec.onnx': there is no such file"),
        ({"rec_keys_path": "/nowhere/keys.txt"}, "give that too"),
        ({"lang": "korean", "rec_model_path": "/nowhere/rec.onnx"}, "give one of them"),
    ],
)
def test_files_of_a_reader_that_are_not_there_are_said(options, words):
    from workers.models.ocr import OCR

    with pytest.raises(ModelLoadError) as caught:
        make(OCR, **options)
    assert words in str(caught.value)


def test_a_file_that_is_no_model_is_said_with_its_option(tmp_path):
    from workers.models.ocr import OCR

    (tmp_path / "rec.onnx").write_bytes(b"no model")
    with pytest.raises(ModelLoadError, match=r"is rec_model_path .* an ONNX recognition model"):
        make(OCR, rec_model_path=str(tmp_path / "rec.onnx"))


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
