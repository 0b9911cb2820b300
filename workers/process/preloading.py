"""Loads the rewards that REWARDQ_PRELOAD names before a worker takes tasks, and asks whether their servers answer."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.errors import ModelLoadError, SettingsError
from tasks.masking import masked
from tasks.rewards import RewardConfig, RewardSpec
from tasks.settings import Settings
from workers.base import RewardModel
from workers.loading.cache import ModelCache
from workers.loading.device import free_memory
from workers.loading.tracebacks import tracebacks, user_line, words_of
from workers.texts import cut

log = logging.getLogger(__name__)

ASK_AGAIN_S = 5.0
"""Pause before servers that did not answer are asked again. A judge takes minutes to start."""

MAX_REASON_CHARS = 1000
"""Of what the heartbeat says of one reward."""


@dataclass(frozen=True, slots=True)
class ServedReward:
    """A reward that a judge or a reward server gives, and who asks it."""

    spec: RewardSpec
    model: RewardModel

    def why_unanswered(self) -> str | None:
        """Why its server gives no answer; None if it answers."""
        try:
            self.model.warm_up()
        except Exception as error:  # whatever a client meets on the network
            words = str(error)
            if not isinstance(error, ModelLoadError):
                words = f"{type(error).__name__}: {error}"
            return cut(masked(f"{_name(self.spec)}: {words}"), MAX_REASON_CHARS)
        return None


class AskServers(threading.Thread):
    """Asks the servers of rewards until each has answered once. The worker takes tasks meanwhile: for other rewards.

    Args:
        say: Called with a reason for each reward whose server has not answered yet.
    """

    def __init__(
        self, rewards: Sequence[ServedReward], say: Callable[[tuple[str, ...]], None]
    ) -> None:
        super().__init__(name="rewardq-ask-servers", daemon=True)
        self._left, self._say = list(rewards), say
        self._said: set[str] = set()

    def ask_all(self) -> None:
        """Ask once, all at the same time; says in the log what is new."""
        left, words = [], []
        for reward, why in zip(self._left, _why_unanswered(self._left), strict=True):
            if why is None:
                log.info("server answers reward=%s", reward.spec.name)
                continue
            left.append(reward)
            words.append(why)
            if why not in self._said:
                log.warning("no answer yet: %s", why)
                self._said.add(why)
        self._left = left
        self._say(tuple(words))

    def run(self) -> None:
        """Ask again and again until all have answered."""
        pause = threading.Event()
        while self._left:
            pause.wait(ASK_AGAIN_S)
            self.ask_all()


def _why_unanswered(rewards: Sequence[ServedReward]) -> list[str | None]:
    """Why the server of each reward gives no answer; None if it answers. All are asked at the same time."""
    found: list[str | None] = [None] * len(rewards)

    def ask(i: int) -> None:
        found[i] = rewards[i].why_unanswered()

    threads = []
    for i in range(len(rewards)):
        thread = threading.Thread(
            target=ask, args=(i,), name="rewardq-ask", daemon=True
        )
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return found


def preload(
    settings: Settings, queues: Sequence[str], models: ModelCache
) -> list[ServedReward]:
    """Load and warm up what a worker for `queues` is told to.

    A class without `version` is another computation in each launch. It is loaded to see that it can be, and not kept.

    Returns:
        The rewards that a server gives. Whether that server answers is not known yet: it may start after the worker.

    Raises:
        ConfigError: A name or the YAML file is wrong.
        SettingsError: There are more than REWARDQ_MAX_MODELS.
        ModelLoadError: Some cannot be loaded, or their first call raises; names each of them.
    """
    kept, tried = _split(_computations(settings.preload, queues))
    num_local, most = sum(spec.is_local for spec in kept), settings.max_models
    if most and num_local > most:
        raise SettingsError(
            f"it names {num_local} models, more than REWARDQ_MAX_MODELS={most}"
        )
    errors: list[str] = []
    served: list[ServedReward] = []
    for spec in tried:
        _load(spec, ModelCache(settings), served, errors)
        free_memory()
    for spec in kept:
        _load(spec, models, served, errors)
    if errors:
        raise ModelLoadError("; ".join(errors))
    return served


def _load(
    spec: RewardSpec, models: ModelCache, served: list[ServedReward], errors: list[str]
) -> None:
    """Load a model, and warm it up unless a server does the work. Why that fails is added to `errors`."""
    try:
        with models.lend(spec.call) as loaded:
            if loaded.model.asks_servers:
                served.append(ServedReward(spec, loaded.model))
            else:
                _warm_up(spec, loaded.model)
    except ModelLoadError as error:
        errors.append(f"{_name(spec)}: {error}")


def _warm_up(spec: RewardSpec, model: RewardModel) -> None:
    try:
        model.warm_up()
    except Exception as error:  # a reward model may be the user's code
        tracebacks.write("warm-up failed", spec.reward_model, error)
        line = user_line(error, spec.reward_model)
        raise ModelLoadError(
            f"reward model {spec.reward_model} cannot be warmed up: {words_of(error)}{line}"
        ) from error


def _name(spec: RewardSpec) -> str:
    """A reward for people."""
    if spec.name == spec.reward_model:
        return f"reward {spec.name!r}"
    return f"reward {spec.name!r} ({spec.reward_model})"


def specs_to_preload(preload: str, queues: Sequence[str]) -> list[RewardSpec]:
    """The computations named by `preload`, comma-separated names or a YAML file, that workers for `queues` are sent.

    A class of the user's without `version` is left out: it is another computation in each launch.
    """
    return _split(_computations(preload, queues))[0]


def _split(specs: Sequence[RewardSpec]) -> tuple[list[RewardSpec], list[RewardSpec]]:
    """The computations that stay in memory, and those that are only tried."""
    kept, tried = [], []
    for spec in specs:
        if spec.counts_launch:
            log.warning(
                "tried and not kept reward=%s: it has no version, and is loaded anew for each start of a trainer",
                spec.reward_model,
            )
            tried.append(spec)
        else:
            kept.append(spec)
    return kept, tried


def _computations(preload: str, queues: Sequence[str]) -> list[RewardSpec]:
    """Each computation once, under the name of the first reward that needs it."""
    if not preload.strip():
        return []
    config = _config_of(preload)
    found: dict[str, RewardSpec] = {}
    for reward in (*config.rewards, *config.eval_rewards):
        if reward.queue not in queues:
            continue
        if not reward.is_built:
            log.warning(
                "not preloaded reward=%s reason=it is not built here",
                reward.reward_model,
            )
        elif reward.part.fingerprint not in found:
            spec = reward.part.model_copy(update={"name": reward.name})
            found[spec.fingerprint] = spec
    return list(found.values())


def _config_of(preload: str) -> RewardConfig:
    """The rewards that REWARDQ_PRELOAD names, as names or as a YAML file."""
    if preload.endswith((".yaml", ".yml")) or os.path.isfile(preload):
        return RewardConfig.from_yaml(preload)
    names = dict.fromkeys(name.strip() for name in preload.split(","))
    rewards = [{"name": name, "reward_model": name} for name in names if name]
    return RewardConfig.from_dict({"rewards": rewards})
