from __future__ import annotations

import math

import pytest

from tests.workers import ocr_prompts
from tests.workers.ocr_prompts import Row

ROWS = ocr_prompts.rows()


def given(row: Row) -> object:
    """What the reward takes as the text asked for."""
    from workers.models.ocr_texts import target_text

    return target_text(row.prompt, row.metadata)


def test_the_targets_of_1017_prompts_are_those_that_were_put_into_them():
    assert len(ROWS) == 1017
    assert [(row.prompt, given(row)) for row in ROWS] == [(row.prompt, row.target) for row in ROWS]


def test_flow_grpos_way_finds_the_same_in_its_own_prompts():
    of_flow_grpo = [row for row in ROWS if row.prompt.count('"') == 2 and not row.metadata and row.target]
    their = [row.prompt.split('"')[1] for row in of_flow_grpo if row.target in row.prompt.split('"')]
    assert len(their) > 200
    assert [given(row) for row in of_flow_grpo if row.target in row.prompt.split('"')] == their


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        # an apostrophe is none
        ("the dog's bowl and the cat's", None),
        ("the dogs' bowl and the cats' bed", None),
        ("the '90s diner and the dogs' bowl", None),
        ("back in the '60s and '70s, the Beatles' sign", None),
        ("rock 'n' roll", None),
        ("ROCK 'N' ROLL", None),
        ("get 'em while the 'OPEN' sign glows", "OPEN"),
        ("the '90s diner sign 'OPEN'", "OPEN"),
        ("'Tis the season", None),
        ("a car from '98 parked", None),
        ("‘90s dogs’ bowl", None),
        # but one may be the end, or within
        ("a sign 'THE DOGS' HOUSE' here", "THE DOGS' HOUSE"),
        ("a sign 'DOGS' in the park", "DOGS"),
        ("the letter 'N' carved", "N"),
        ("'Til Death' on a ring", "Til Death"),
        ("a jersey with '23' on it", "23"),
        ("a sign reading 'JOE'S'", "JOE'S"),
        ("signs 'JOE'S BAR' and 'EXIT'", "JOE'S BAR"),
        # inches are no quotation
        ('a 24" monitor and a 27" one', None),
        ('12 " pipe and 3 " bolt', None),
        ('5\'10" tall with "REX"', "REX"),
        ('a 12"x18" poster, "HI 5"', "HI 5"),
        # double marks go first, the first of them counts
        ("the 'old' sign says \"OPEN\"", "OPEN"),
        ("'a' «b» \"c\"", "b"),
        ("\"He said 'HI' to me\"", "He said 'HI' to me"),
        # scripts without spaces
        ('写着"营业中"的招牌', "营业中"),
        ("写着'营业中'的招牌和'门'", "营业中"),
        ('标语2024"新年快乐"', "新年快乐"),
        ("看板「猫カフェ『タマ』へ」と", "猫カフェ『タマ』へ"),
        # other hands
        ('ein Schild „OFFEN"', "OFFEN"),
        ('"OPEN” and more', "OPEN"),
        ('an open " mark, “OPEN”', "OPEN"),
        ("“OPEN“ or “CLOSED“", "OPEN"),
        ('he said "a \\"b\\" c" to me', 'a "b" c'),
        ("a sign \\'OPEN\\'", "OPEN"),
        ("sign:'OPEN'.", "OPEN"),
        ('says"OPEN"', "OPEN"),
        ("an open \" mark and 'X'", "X"),
        # words that begin or end with an apostrophe, within
        ("a sign 'Class of '99' here", "Class of '99"),
        ("a sign ‘Back to the ’80s’ in neon", "Back to the ’80s"),
        ("a diner's 'Finger Lickin' Good' sign", "Finger Lickin' Good"),
        ("a 'Cup o' Joe' mug", "Cup o' Joe"),
        ("a sign 'Cabin' in the dogs' woods", "Cabin"),
        ("cats rockin' 'n' rollin'", None),
        ("jerseys '10' and '20'", "10"),
        ("signs 'Kids' and '99'", "Kids"),
        ("the '60s and '70s rockin' cats", None),
        # marks typed as several characters, or as their likes
        ("tabliczka ,,Otwarte'' i \"B\"", "Otwarte"),
        ('ein Schild ,,Offen"', "Offen"),
        ("un panneau <<Ouvert>>", "Ouvert"),
        ("a sign ‘‘OPEN’’", "OPEN"),
        ("a sign ``OPEN``", "OPEN"),
        ("a sign '''OPEN'''", "OPEN"),
        ('a sign """OPEN"""', "OPEN"),
        ("it´s a sign ´OPEN´", "OPEN"),
        ("a 12″×18″ print with ″HI″", "HI"),
        ("5′ 10″ tall, 6′ 2″ tall", None),
        ("a screen with `print('HI')`", "print('HI')"),
        # prompts that are still what their file had
        ("a sign &quot;Fish &amp; Chips&quot;", "Fish & Chips"),
        ("a dog&#39;s bowl", None),
        ('"A sign ""OPEN"" here"', "OPEN"),
        ('"A sign \\"OPEN\\" here"', "OPEN"),
        ('a sign \\\\"OPEN\\\\"', "OPEN"),
    ],
)
def test_what_is_quoted_is_what_a_person_would_say_is_quoted(prompt, target):
    assert given(Row(prompt, target)) == target


@pytest.mark.timeout(20)
@pytest.mark.parametrize("mark", ["'", '"', "“", "‘", "«", "‹", "`", "'''", ",,", "<<", "″", "the dogs' '90s "])
def test_a_long_prompt_of_marks_that_do_not_close_is_read_all_the_same(mark):
    given(Row(f"{mark}a " * 4001, None))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("BOX", "BOX"), ("NaN", "NaN"), (7, "7"), (0, "0"), (-3, "-3"), (7.0, "7"), (24.5, "24.5"), (0.1, "0.1"),
        (["BOX"], "BOX"), (["BOX", None, "", math.nan], "BOX"), ([42], "42"),
        (None, "OPEN"), (math.nan, "OPEN"), ("", "OPEN"), (" \n", "OPEN"), ("\u200b", "OPEN"), ([], "OPEN"),
        ([None], "OPEN"), ([""], "OPEN"), ([math.nan], "OPEN"),
    ],
)  # fmt: skip
def test_the_metadatas_text_goes_before_the_prompts_and_a_gap_is_no_text(text, target):
    assert given(Row('a sign "OPEN"', target, {"text": text})) == target


@pytest.mark.parametrize("metadata", [{}, {"texts": "BOX"}, {"Text": "BOX"}])
def test_without_that_key_the_prompt_counts(metadata):
    assert given(Row('a sign "OPEN"', "OPEN", metadata)) == "OPEN"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (False, "False"), (True, "True"), ({"en": "BOX"}, "{'en': 'BOX'}"), ({}, "{}"), ([False], "False"),
        ([["BOX"]], "['BOX']"), (["BOX", {}], "{}"), (math.inf, "inf"), (1e300, "1e+300"), (1e-7, "1e-07"),
        (["BOX", "FOX"], "2 texts"), (["BOX", 7], "2 texts"),
    ],
)  # fmt: skip
def test_what_is_no_text_or_several_is_invalid_and_never_looked_for(text, found):
    from workers import Unscored

    with pytest.raises(Unscored) as caught:
        given(Row('a sign "OPEN"', None, {"text": text}))
    assert caught.value.kind == "invalid"
    assert found in caught.value.message
