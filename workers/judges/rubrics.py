"""The rubrics of our judges, in our own words; each is version 1, and counted in its catalog entry's `version`."""

from __future__ import annotations

_TEXT_FAITHFULNESS = """\
Text Faithfulness: does the picture show what the request says?
  4  Everything that was asked for is there as asked: things, their number, colours, places, actions, style. Nothing
     that matters was added.
  3  The main things are right; a detail is missing, wrong, or not quite as described.
  2  Something that the request turns on is missing, swapped, or misunderstood.
  1  The picture shows something else, or contradicts the request."""

_PHYSICAL_QUALITY = """\
Physical and Visual Quality: could this be, and is it well made?
  4  Light, shadow, perspective, materials and bodies are right; no artifact catches the eye; the composition holds.
  3  A small flaw can be found by looking for it and does not disturb.
  2  A flaw is plain to see: something floats, bends or melts where it cannot, a seam, a patch of blur or noise.
  1  The picture is broken: impossible geometry, mangled anatomy, objects that run into one another."""

_TEXT_RENDERING = """\
Text Rendering: are the words that were asked for written in the picture? Score N/A if the request asks for no words.
  4  All are there, spelled as asked, easy to read, and sit in the scene as they should.
  3  Readable, with a slip in a letter, in upper or lower case, or in spacing.
  2  Partly readable; several letters are wrong, doubled or distorted.
  1  Unreadable, other words, or none."""

_IMAGE_FAITHFULNESS = """\
Image Faithfulness: is what the request did not mention still as it was in the source?
  4  People, things, background, style and light that were not to change are the same; what was to change did.
  3  A minor part of the source has drifted, a background detail or a shade.
  2  Something that makes the source what it is was lost or altered, a face for example.
  1  The source is hardly to be recognised, or was ignored."""

_METHOD = """\
For each aspect go in two steps. First look at the whole and settle on the level above that fits best. Then look
closely, name what you see that speaks for and against it, and move the score up or down from that level by as much as
what you found is worth; scores are decimal numbers from 1 to 4, and pictures of different quality should get different
scores. Judge only what can be seen.

Last, think of how the request could be worded so that a generator would avoid the weaknesses you found, and write it.

Answer in exactly this form, with your own words in the place of the brackets:

# User Request Analysis
[what the request asks for, said and implied]
# Detailed Judgement"""

_SECTION = """\
{number}. {title}:
## Justification: [what you see, and how it leads to the score]
## Score: [a number from 1 to 4{or_none}]"""

_ENDING = """\
# Summary: [the picture in two sentences]

# User Request Refinement:
## Refinement Comments: [what to say more clearly, and why]
## Refined Request: [the request as it should be put, and nothing else]
"""


def _sections(*titles: str) -> str:
    return "\n".join(
        _SECTION.format(
            number=i,
            title=title,
            or_none=", or N/A" if title == "Text Rendering" else "",
        )
        for i, title in enumerate(titles, 1)
    )


T2I = "\n\n".join(
    [
        "You are an exacting judge of generated pictures. You are given a request and the picture made for it. Score "
        "three aspects of the picture, each from 1 (worst) to 4 (best), and then improve the request.",
        "The request:\n{prompt}",
        "The picture:\n<image>",
        _TEXT_FAITHFULNESS,
        _PHYSICAL_QUALITY,
        _TEXT_RENDERING,
        f"{_METHOD}\n{_sections('Text Faithfulness', 'Physical and Visual Quality', 'Text Rendering')}\n{_ENDING}",
    ]
)
"""For a generated image."""

EDIT = "\n\n".join(
    [
        "You are an exacting judge of edited pictures. You are given a source picture, a request to change it, and the "
        "picture after the change. Score four aspects of the change, each from 1 (worst) to 4 (best), and then improve "
        "the request.",
        "The request:\n{prompt}",
        "The source:\n<image>",
        "After the change:\n<image>",
        _TEXT_FAITHFULNESS,
        _IMAGE_FAITHFULNESS,
        _PHYSICAL_QUALITY,
        _TEXT_RENDERING,
        f"{_METHOD}\n"
        f"{_sections('Text Faithfulness', 'Image Faithfulness', 'Physical and Visual Quality', 'Text Rendering')}\n"
        f"{_ENDING}",
    ]
)
"""For an edited image: the source first."""

PAIR = """\
Two pictures were generated for the same request. Say which of them you would hand to the person who asked.

The request:
{prompt}

The first picture:
<image>

The second picture:
<image>

Weigh, in this order: which one shows more exactly what was asked for, words to be written included; which one is freer
of visible errors in bodies, geometry, light and texture; which one is better to look at. Their order here means
nothing. If neither is better in a way that you can name, it is a tie.

Give your reasons in a few sentences. Then end with one line in exactly this form:
Verdict: first
where in the place of "first" may stand "second" or "tie".
"""
"""For two images of one request."""
