"""The fields of a sample, as a reward says which of them it takes."""

from __future__ import annotations

from tasks.errors import nearest

SAMPLE_FIELDS = (
    "prompt", "image", "video", "audio", "condition_images", "condition_videos", "metadata", "fps", "sample_rate",
)  # fmt: skip
GENERATED = ("image", "video", "audio")
CONDITIONS = ("condition_images", "condition_videos")

THEIR_NAMES = {"audio_sample_rate": "sample_rate", "frame_rate": "fps"}
"""Fields as Flow-Factory calls them, to ours."""

BY_NAME = ("metadata", "fps", "sample_rate", *THEIR_NAMES)
"""Fields that a class takes by naming them in its `__call__`, without declaring them, as in Flow-Factory: they are
small."""

_NUMBER_OF_MEDIUM = {"video": "fps", "audio": "sample_rate"}


def no_such_field(name: str) -> str:
    """What to say of a field that no sample has."""
    return (
        f"a sample has no field {name!r}{nearest(str(name), SAMPLE_FIELDS)}; it has {', '.join(SAMPLE_FIELDS)} "
        "(a column of the data set is a key of its metadata)"
    )


def with_numbers(fields: tuple[str, ...]) -> tuple[str, ...]:
    """`fields` with the numbers that travel with them: fps with a video, the sample rate with audio."""
    numbers = [
        number for medium, number in _NUMBER_OF_MEDIUM.items() if medium in fields
    ]
    return tuple(dict.fromkeys((*fields, *numbers)))
