"""Which warnings of transformers, open_clip and torch mean that a model gives other numbers, and what to write instead.

A second line of defence behind `transformers_checks` and `open_clip_checks`: they check the model itself, and do not
depend on the words of a warning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tasks.errors import ModelLoadError
from workers.loading.load_warnings import Said, one_line

_OTHER_WEIGHTS = (
    "name a checkpoint that has all the weights of this kind of model, and no others"
)
_OTHER_KIND = "name a checkpoint of the kind of model that this reward is made of"
_OTHER_TOKENIZER = (
    "name a model whose tokenizer is whole (for transformers' models "
    "`processor_name_or_path` may name another)"
)

OTHER_NUMBERS: tuple[tuple[str, str], ...] = (
    (
        r"LOAD REPORT|newly initialized|were not (used|initialized)|initialized from the model checkpoint",
        _OTHER_WEIGHTS,
    ),
    (
        r"size mismatch|mismatched (sizes|shapes|keys)|(missing|unexpected)[ _]keys?",
        _OTHER_WEIGHTS,
    ),
    (
        r"initialized (randomly|partially)|no CLIP weights|Could not find/download default weights",
        _OTHER_WEIGHTS,
    ),
    (r"Resiz(ed|ing) .*embedding|interpolat(ed|ing) .*embedding", _OTHER_WEIGHTS),
    (
        r"QuickGELU mismatch",
        "write the architecture with `-quickgelu` at its end, or without it, as its weights need",
    ),
    (
        r"Ignoring `pretrained",
        "leave `pretrained` out: `local-dir:` and `hf-hub:` have weights of their own",
    ),
    (
        r"Multiple checkpoints found in .*,",
        "leave one file of weights in that directory",
    ),
    (r"You are using a model of type|but you overrode it with", _OTHER_KIND),
    (
        r"not the same type as the class|incorrect (regex|tokenization)",
        _OTHER_TOKENIZER,
    ),
    (
        r"model_id for tokenizer|returning default SimpleTokenizer|Could not (extract|reorder) ",
        _OTHER_TOKENIZER,
    ),
    (r"adapter.*(not|ignor)", "merge the adapter into the model and save that"),
    (
        r"Falling back to (BICUBIC|bilinear|nearest)",
        "name an image processor that resizes by bicubic or bilinear",
    ),
)
"""Patterns of warnings with the advice for each; any other warning is recorded with the outcome, and not refused."""


def refuse_other_numbers(option: str, name: str, heard: Sequence[Said]) -> None:
    """Raise for the first warning that means other numbers.

    Args:
        option: The reward's option that names the checkpoint.
        name: The option's value.
        heard: The warnings of the libraries.

    Raises:
        ModelLoadError: Repeats the warning, and says what to write instead.
    """
    for said in heard:
        # A remark of ours, recorded by note(), is no reason to refuse.
        if said.source == "rewardq":
            continue
        for pattern, advice in OTHER_NUMBERS:
            if re.search(pattern, said.text):
                raise ModelLoadError(
                    f"{option}: {name!r} would give other numbers than its name says, {said.source} warns: "
                    f"{one_line(said.text)}; {advice}"
                )
