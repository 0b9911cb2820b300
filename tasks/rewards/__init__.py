"""Rewards as configured: from YAML to validated specs, with fingerprints, queues and weights.

`yaml_file` reads the file, `yaml_keys` sorts the keys of an entry, `parser` makes a `RewardSpec` of an entry, `options`
checks a built-in's options, `own_class` asks the source of a user's class. `fingerprint` says when two rewards are the
same computation, `queues` where messages go. `schema` has the JSON schema for editors.
"""

from tasks.rewards.config import RewardConfig, Split
from tasks.rewards.fields import (
    BY_NAME,
    GENERATED,
    SAMPLE_FIELDS,
    THEIR_NAMES,
    no_such_field,
    with_numbers,
)
from tasks.rewards.spec import (
    DTYPES,
    JPEG,
    RAW,
    ConstantOnFailure,
    OnFailure,
    RewardSpec,
)

__all__ = [
    "BY_NAME",
    "DTYPES",
    "GENERATED",
    "JPEG",
    "RAW",
    "SAMPLE_FIELDS",
    "THEIR_NAMES",
    "ConstantOnFailure",
    "OnFailure",
    "RewardConfig",
    "RewardSpec",
    "Split",
    "no_such_field",
    "with_numbers",
]
