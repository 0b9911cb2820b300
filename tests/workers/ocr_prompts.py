"""1,017 prompts in the manner of OCR prompt sets (flow_grpo's, X-Omni's, OneIG's), each made around a known target.

The rule of the test is the maker's: it knows the text that it put between the marks, and never looks for one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NUM_ROWS = 1017


@dataclass(frozen=True)
class Row:
    """A prompt, its metadata, and the text that it asks for (None where it asks for none)."""

    prompt: str
    target: str | None
    metadata: dict[str, Any] = field(default_factory=dict)


WORDS = (
    "OPEN", "Fresh Bread", "GRAND OPENING", "Mind the Gap", "Don't Walk", "Joe's Diner", "E=mc²", "Floor 13½",
    "Route 66", "50% OFF", "No. 7", "Be Kind, Always", "WANTED: Dead or Alive", "#1 Dad", "C++ & Coffee", "Est. 1987",
    "24/7", "7", "Rock 'n' Roll", "The Dogs' House", "Café Noir", "Straße 12", "Are we there yet?",
    "Keep calm (and carry on)",
)  # fmt: skip
"""Texts without double marks."""

CHINESE = ("营业中", "欢迎光临", "小心地滑", "新年快乐2024", "春眠不觉晓，处处闻啼鸟。", "第3号咖啡馆")

SCENES = (
    "A storefront at dusk", "The baker's window", "A dog's bowl beside the cat's bed", "A 1950s diner",
    "The '90s arcade", "An artists' collective's loft", "A tree that's older than the hills",
    "Two farmers' trucks in the rain", "A close-up of a vintage typewriter", "Rock 'n' roll memorabilia",
    "A man in the '60s, 5'10\" tall,", "A wall with a 24\" monitor", "A 12\"x18\" poster", "A café’s chalkboard",
    "The boys’ clubhouse", "A ‘so-called’ masterpiece", "A 'retro' neon sign",
)  # fmt: skip
"""Beginnings with apostrophes, inches and words in single marks, none of which is the text asked for."""

VERBS = ("with a sign that says", "displaying the words", "labelled", "reading", "on which someone wrote,", "titled:")

TAILS = (
    "", ".", ", in neon letters.", " in the style of the '80s", ", under soft light; it's raining.",
    " on the teachers' lounge's door, 8k", " (photorealistic, 35mm)", ",\nhighly detailed",
)  # fmt: skip

PLAIN_SCENES = ("A storefront at dusk", "The baker's window", "A dog's bowl", "A 1950s diner", "A café’s chalkboard")
PLAIN_TAILS = ("", ".", ", in neon letters.", " on a wall, 8k", ";\nhighly detailed")

UNQUOTED = (
    "The dog's bowl and the cat's", "Two dogs' bowls and the cats' bed", "It's the baker's, isn't it?",
    "Rock 'n' roll in the '70s", "A man 6'2\" tall with a 27\" monitor", "The '90s and the Beatles' first record",
    "A fox", "Ma’am, it’s the farmers’ market", "Get 'em while they're hot", "'Twas the artists' last night",
    "A 12\" x 18\" print of a cat", "l'heure bleue, aujourd'hui",
)  # fmt: skip


def rows(seed: int = 12) -> list[Row]:
    """All rows; the same for the same seed."""
    make = random.Random(seed)
    makers: tuple[tuple[int, Callable[[random.Random], Row]], ...] = (
        (400, flow_grpo),
        (120, x_omni),
        (80, x_omni_chinese),
        (100, oneig),
        (60, oneig_with_gaps),
        (100, of_other_languages),
        (70, single_marks),
        (37, several_quotations),
        (50, unquoted),
    )
    made = [maker(make) for count, maker in makers for _ in range(count)]
    assert len(made) == NUM_ROWS
    return made


def flow_grpo(make: random.Random) -> Row:
    """One line, typewriter marks."""
    text = make.choice(WORDS)
    return Row(f'{make.choice(SCENES)} {make.choice(VERBS)} "{text}"{make.choice(TAILS)}', text)


def x_omni(make: random.Random) -> Row:
    """A long text over sentences and lines, in typographic marks."""
    separator = make.choice((" ", ", ", "\n", ". "))
    text = separator.join(make.sample(WORDS, make.randint(3, 6)))
    prompt = f"{make.choice(SCENES)}. On its front stands: “{text}”{make.choice(TAILS)}"
    return Row(prompt, text, make.choice(({}, {"text": [text]}, {"text": []}, {"category": "signboard"})))


def x_omni_chinese(make: random.Random) -> Row:
    """Chinese, without spaces around its marks."""
    text = make.choice(("，", "\n", "")).join(make.sample(CHINESE, make.randint(1, 3)))
    opening, closing = make.choice(("“”", "「」", "『』", '""', "＂＂", "''", "‘’"))
    return Row(f"一家小店的招牌上写着{opening}{text}{closing}，夜晚，霓虹灯，{make.randint(1, 9)}只猫", text)


def oneig(make: random.Random) -> Row:
    """The text in a column of its own; the prompt quotes a part of it or nothing."""
    text = make.choice(WORDS)
    given = make.choice((text, [text], [text, None], [None, text, float("nan")], ["", text]))
    prompt = make.choice((f'A poster "{text[:3]}"', f"{make.choice(PLAIN_SCENES)}, with lettering"))
    if make.random() < 0.2:
        number = make.randint(0, 10**6)
        return Row(prompt, str(number), {"text": make.choice((number, float(number), [number]))})
    return Row(prompt, text, {"text": given})


def oneig_with_gaps(make: random.Random) -> Row:
    """Rows of a table whose column has no value: the prompt's quotation counts."""
    row = flow_grpo(make)
    gap = make.choice((None, float("nan"), "", "  ", [], [None], [""], [float("nan"), ""]))
    return Row(row.prompt, row.target, {"text": gap})


def of_other_languages(make: random.Random) -> Row:
    """The marks of other languages, in a prompt with apostrophes."""
    opening, closing = make.choice(
        [("„", "“"), ("„", "”"), ("«", "»"), ("« ", " »"), ("«\u202f", "\u202f»"), ("»", "«"), ("”", "”"), ("»", "»"),
         ("‹", "›"), ("›", "‹"), ("‚", "‘"), ("「", "」"), ("『", "』"), ("〝", "〟"), ("``", "''"), ("''", "''"),
         ('\\"', '\\"'), ('""', '""'), ("`", "`")]
    )  # fmt: skip
    text = make.choice([word for word in WORDS if "'" not in word])
    scene, tail = make.choice(PLAIN_SCENES), make.choice(PLAIN_TAILS)
    return Row(f"{scene} {make.choice(VERBS)} {opening}{text}{closing}{tail}", text)


def single_marks(make: random.Random) -> Row:
    """A text in single marks, whose apostrophes are not its ends."""
    opening, closing = make.choice(("''", "‘’"))
    text = make.choice([*WORDS, "It's the dogs' home", "Ma'am's", "DON'T FEED THE BEARS"])
    text = text.replace("'", closing)
    return Row(
        f"{make.choice(PLAIN_SCENES)} {make.choice(VERBS)} {opening}{text}{closing}{make.choice(PLAIN_TAILS)}", text
    )


def several_quotations(make: random.Random) -> Row:
    """Of several the first counts; one within another is part of it."""
    one, other = make.sample(WORDS, 2)
    prompt, text = make.choice(
        [
            (f'A sign "{one}" above a door “{other}”', one),
            (f'A sign “{one}” above a door "{other}"', one),
            (f"A '{other.replace(chr(39), '')}' shirt and a sign \"{one}\"", one),
            (f'A book “{one} ‘again’ today” by "{other}"', f"{one} ‘again’ today"),
            (f'A wall: "{one} “again” today"', f"{one} “again” today"),
            (f"Un livre « {one} «encore» » et «{other}»", f"{one} «encore»"),
        ]
    )
    return Row(prompt, text)


def unquoted(make: random.Random) -> Row:
    """Apostrophes, years, feet and inches: nothing is quoted."""
    return Row(f"{make.choice(UNQUOTED)}{make.choice(('', ', 8k', ' at night'))}", None)
