"""Everything that users import: `from rewardq import RewardClient, Sample, PointwiseRewardModel`.

Each name is imported from the package that owns it when it is first used. So a trainer does not import the workers'
side, a reward class does not import the trainer's side, and neither imports torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.errors import (
        BusyError,
        CollectTimeoutError,
        ConfigError,
        EvictionError,
        InvalidSampleError,
        MissingExtraError,
        ModelLoadError,
        PayloadGoneError,
        RanksMissingError,
        RankTakenError,
        RedisRefusalError,
        RedisUnreachableError,
        RewardError,
        ScoringError,
        SettingsError,
        StaleCodeError,
        StartError,
        TicketError,
        UnknownOptionError,
        UnknownRewardError,
        WireError,
    )
    from tasks.rewards import RewardConfig
    from tasks.samples import Sample
    from tasks.settings import Settings
    from tasks.version import __version__
    from trainer_client import Failed, RewardBatch, RewardClient, Ticket
    from workers import (
        Accelerator,
        GroupwiseRewardModel,
        PointwiseRewardModel,
        RewardArguments,
        RewardModel,
        RewardModelOutput,
        Unscored,
    )

__all__ = [
    "Accelerator",
    "BusyError",
    "CollectTimeoutError",
    "ConfigError",
    "EvictionError",
    "Failed",
    "GroupwiseRewardModel",
    "InvalidSampleError",
    "MissingExtraError",
    "ModelLoadError",
    "PayloadGoneError",
    "PointwiseRewardModel",
    "RankTakenError",
    "RanksMissingError",
    "RedisRefusalError",
    "RedisUnreachableError",
    "RewardArguments",
    "RewardBatch",
    "RewardClient",
    "RewardConfig",
    "RewardError",
    "RewardModel",
    "RewardModelOutput",
    "Sample",
    "ScoringError",
    "Settings",
    "SettingsError",
    "StaleCodeError",
    "StartError",
    "Ticket",
    "TicketError",
    "UnknownOptionError",
    "UnknownRewardError",
    "Unscored",
    "WireError",
    "__version__",
]

_HOMES = {
    "trainer_client": ("Failed", "RewardBatch", "RewardClient", "Ticket"),
    "workers": (
        "Accelerator",
        "GroupwiseRewardModel",
        "PointwiseRewardModel",
        "RewardArguments",
        "RewardModel",
        "RewardModelOutput",
        "Unscored",
    ),
    "tasks.rewards": ("RewardConfig",),
    "tasks.samples": ("Sample",),
    "tasks.settings": ("Settings",),
    "tasks.version": ("__version__",),
}
"""Names by the module that has them. All others are errors, of `tasks.errors`."""

_HOME_OF = {}
for _home, _names in _HOMES.items():
    _HOME_OF.update(dict.fromkeys(_names, _home))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rewardq' has no attribute {name!r}")
    home = _HOME_OF.get(name, "tasks.errors")
    _check_whose(home.partition(".")[0])
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _check_whose(package: str) -> None:
    """Raise ImportError if a module of the user comes before our package of this name.

    `find_spec` looks the module up without running it.
    """
    ours = Path(__file__).parents[1] / package
    spec = importlib.util.find_spec(package)
    file = spec.origin if spec else None
    if Path(file or "").resolve().parent != ours.resolve():
        raise ImportError(
            f"the module `{package}` imported here is {file or 'a folder without __init__.py'}, not rewardq's package "
            f"at {ours}; rename that file, or start from another directory"
        )
