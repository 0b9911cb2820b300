"""Loads the reward models that REWARDQ_PRELOAD names, before a worker takes tasks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from tasks.errors import ModelLoadError, SettingsError
from tasks.rewards import RewardConfig, RewardSpec
from tasks.settings import Settings
from workers.base import RewardModel
from workers.loading import Models
from workers.tracebacks import place_in, tracebacks, words_of

log = logging.getLogger(__name__)


def preload(settings: Settings, queues: Sequence[str], models: Models) -> None:
    """Load and warm up what a worker for `queues` is told to.

    Raises:
        ConfigError: A name or the YAML file is wrong.
        SettingsError: There are more than REWARDQ_MAX_MODELS.
        ModelLoadError: One cannot be loaded, or its first call raises.
    """
    specs = specs_to_preload(settings.preload, queues)
    num_local = sum(s.is_local for s in specs)
    if settings.max_models and num_local > settings.max_models:
        raise SettingsError(f"it names {num_local} models, more than REWARDQ_MAX_MODELS={settings.max_models}")
    for spec in specs:
        with models.lend(spec.call) as loaded:
            _warm_up(spec, loaded.model)


def _warm_up(spec: RewardSpec, model: RewardModel) -> None:
    try:
        model.warm_up()
    except Exception as error:  # a reward model may be the user's code
        tracebacks.write("warm-up failed", spec.reward_model, error)
        place = "" if spec.is_builtin else place_in(error, spec.reward_model)
        raise ModelLoadError(
            f"reward model {spec.reward_model} cannot be warmed up: {words_of(error)}{place}"
        ) from error


def specs_to_preload(preload: str, queues: Sequence[str]) -> list[RewardSpec]:
    """The computations named by `preload`, comma-separated names or a YAML file, that workers for `queues` are sent.

    A class of the user's without `version` is another computation in each launch, and left out.
    """
    if not preload.strip():
        return []
    if preload.endswith((".yaml", ".yml")) or os.path.isfile(preload):
        config = RewardConfig.from_yaml(preload)
    else:
        names = dict.fromkeys(name.strip() for name in preload.split(",") if name.strip())
        config = RewardConfig.from_dict({"rewards": [{"name": name, "reward_model": name} for name in names]})
    found: dict[str, RewardSpec] = {}
    for spec in (s.part for s in (*config.rewards, *config.eval_rewards) if s.queue in queues):
        if spec.counts_launch:
            log.warning("not preloaded reward=%s reason=it has no version", spec.reward_model)
            continue
        found.setdefault(spec.fingerprint, spec)
    return list(found.values())
