"""From a reward's computation to the model in memory: imports within bounds, one instance for each fingerprint."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from tasks import catalog
from tasks.errors import MissingExtraError, ModelLoadError
from tasks.messages import RewardCall
from tasks.settings import Settings
from workers.base import Accelerator, RewardArguments, RewardModel

log = logging.getLogger(__name__)

RETRY_LOAD_S = 60.0
"""A model that could not be loaded is not tried again for this long; its samples get the reason at once."""


@dataclass(slots=True)
class LoadedModel:
    """A reward model in memory. `lock` is held while it is called, unless it is thread-safe."""

    model: RewardModel
    lock: threading.Lock = field(default_factory=threading.Lock)
    max_batch: int = 1_000_000
    """The batch size that fitted into the device's memory."""


class Models:
    """The reward models of a process: each is loaded once, whoever asks first. Safe between threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._loads: dict[str, Future[LoadedModel]] = {}
        self._names: dict[str, str] = {}
        self._failed_at: dict[str, float] = {}

    def is_loaded(self, call: RewardCall) -> bool:
        """Whether the model is in memory."""
        load = self._loads.get(call.fingerprint)
        return load is not None and load.done() and load.exception() is None

    @property
    def loading(self) -> tuple[str, ...]:
        """Fingerprints of models that are being loaded now."""
        with self._lock:
            return tuple(f for f, load in self._loads.items() if not load.done())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models in memory."""
        with self._lock:
            return tuple(dict.fromkeys(self._names[f] for f, load in self._loads.items() if load.done()))

    def load(self, call: RewardCall) -> LoadedModel:
        """The model; a second thread waits for the first one's load.

        Raises:
            ModelLoadError: Says which model, and what to install, allow or mend.
        """
        with self._lock:
            load = self._loads.get(call.fingerprint)
            if load is not None and self._may_retry(call.fingerprint, load):
                load = None
            is_first = load is None
            if load is None:
                load = self._loads[call.fingerprint] = Future()
                self._names[call.fingerprint] = call.model
        if is_first:
            self._load_into(load, call)
        return load.result()

    def _may_retry(self, fingerprint: str, load: Future[LoadedModel]) -> bool:
        failed = load.done() and load.exception() is not None
        return failed and time.monotonic() - self._failed_at[fingerprint] > RETRY_LOAD_S

    def _load_into(self, load: Future[LoadedModel], call: RewardCall) -> None:
        started = time.perf_counter()
        try:
            model = LoadedModel(build(call, self._settings))
        except BaseException as error:  # a reward model's constructor may raise anything, SystemExit too
            self._failed_at[call.fingerprint] = time.monotonic()
            log.warning("load failed reward=%s error=%s", call.model, type(error).__name__)
            load.set_exception(_as_load_error(call, error))
        else:
            log.info("loaded reward=%s load_s=%.2f", call.model, time.perf_counter() - started)
            load.set_result(model)


def build(call: RewardCall, settings: Settings) -> RewardModel:
    """A new instance of the reward model that `call` names."""
    cls = reward_class(call.model, settings)
    config = RewardArguments(
        name=call.name,
        reward_model=call.model,
        batch_size=call.batch_size,
        dtype_name=call.dtype,
        timeout_s=call.timeout_s,
        image_format=call.image_format,
        extra_kwargs=dict(call.options),
    )
    return cls(config, Accelerator(settings.device))


def reward_class(model: str, settings: Settings) -> type[RewardModel]:
    """The class of a built-in name, or of a dotted path within REWARDQ_MODULES.

    Raises:
        ModelLoadError: Not allowed, not importable, or no reward model.
    """
    builtin = catalog.CATALOG.get(model)
    if builtin is not None:
        path, _, name = builtin.path.partition(":")
        return _class_in(path, name)
    path, _, name = model.rpartition(".")
    if not any(path == m or path.startswith(f"{m}.") for m in settings.allowed_modules):
        raise ModelLoadError(
            f"reward model {model}: this worker may not import {path!r}; "
            f"start it with REWARDQ_MODULES={','.join((*settings.allowed_modules, path))}"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return _class_in(path, name)


def _class_in(path: str, name: str) -> type[RewardModel]:
    module = importlib.import_module(path)
    try:
        cls = getattr(module, name)
    except AttributeError:
        raise ModelLoadError(f"{module.__file__} has no {name!r}") from None
    if not (isinstance(cls, type) and issubclass(cls, RewardModel)):
        raise ModelLoadError(
            f"{path}.{name} is no reward model; subclass workers.PointwiseRewardModel or GroupwiseRewardModel"
        )
    return cls


def _as_load_error(call: RewardCall, error: BaseException) -> ModelLoadError:
    if isinstance(error, ModelLoadError):
        return error
    builtin = catalog.CATALOG.get(call.model)
    if isinstance(error, ModuleNotFoundError) and builtin is not None and builtin.extra and error.name:
        return ModelLoadError(str(MissingExtraError(f"reward model {call.model}", error.name, builtin.extra)))
    return ModelLoadError(f"reward model {call.model} cannot be loaded: {type(error).__name__}: {error}")
