"""From a reward's computation to the model in memory: imports within bounds, one instance for each, so many at once."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
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


Instance = tuple[str, str]
"""What an instance of a model is kept under: its fingerprint, which does not say how a server is asked, and that."""


_OUT_OF_MEMORY = ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(slots=True)
class LoadedModel:
    """A reward model in memory. `lock` is held while it is called, unless it is thread-safe."""

    model: RewardModel
    lock: threading.Lock = field(default_factory=threading.Lock)
    max_batch: int = 1_000_000
    """The batch size that fitted into the device's memory."""


class Models:
    """The reward models of a process: each is loaded once, whoever asks first. Safe between threads.

    At most REWARDQ_MAX_MODELS local ones are in memory; one that is lent is never evicted.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Condition()
        self._loads: dict[Instance, Future[LoadedModel]] = {}
        """The most recently used last."""
        self._num_lent: Counter[Instance] = Counter()
        self._names: dict[Instance, str] = {}
        self._failed_at: dict[Instance, float] = {}

    def is_loaded(self, call: RewardCall) -> bool:
        """Whether the model is in memory."""
        load = self._loads.get(_instance(call))
        return load is not None and load.done() and load.exception() is None

    @property
    def loading(self) -> tuple[str, ...]:
        """Fingerprints of models that are being loaded now."""
        with self._lock:
            return tuple(fingerprint for (fingerprint, _), load in self._loads.items() if not load.done())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models in memory."""
        with self._lock:
            loaded = [self._names[key] for key, load in self._loads.items() if load.done() and not _has_failed(load)]
        return tuple(dict.fromkeys(loaded))

    @contextlib.contextmanager
    def lend(self, call: RewardCall) -> Iterator[LoadedModel]:
        """The model, in memory for as long as it is lent; a second thread waits for the first one's load.

        Waits while all the models that there is room for are lent.

        Raises:
            ModelLoadError: Says which model, and what to install, allow or mend.
        """
        key = _instance(call)
        load, is_first = self._reserve(key, call.model)
        try:
            if is_first:
                self._load_into(load, call)
            yield load.result()
        finally:
            with self._lock:
                self._num_lent[key] -= 1
                self._lock.notify_all()

    def _reserve(self, key: Instance, name: str) -> tuple[Future[LoadedModel], bool]:
        """The model's load, counted as lent, and whether it is to be begun."""
        with self._lock:
            self._lock.wait_for(lambda: self._is_kept(key) or self._make_room(key))
            is_first = not self._is_kept(key)
            load: Future[LoadedModel] = Future() if is_first else self._loads[key]
            self._loads.pop(key, None)
            self._loads[key] = load
            self._names[key] = name
            self._num_lent[key] += 1
        return load, is_first

    def _is_kept(self, key: Instance) -> bool:
        """Whether there is a load to wait for or to use; one that failed is begun anew after a while."""
        load = self._loads.get(key)
        if load is None or not _has_failed(load):
            return load is not None
        return time.monotonic() - self._failed_at[key] <= RETRY_LOAD_S

    def _make_room(self, key: Instance) -> bool:
        """Whether one more model may be loaded, after evicting one that nobody uses."""
        kept = [k for k, load in self._loads.items() if _is_local(k) and not _has_failed(load)]
        if not self._settings.max_models or not _is_local(key) or len(kept) < self._settings.max_models:
            return True
        unused = next((k for k in kept if not self._num_lent[k]), None)
        if unused is None:
            return False
        del self._loads[unused]
        log.info("evicted reward=%s", self._names.pop(unused))
        free_memory()
        return True

    def _load_into(self, load: Future[LoadedModel], call: RewardCall) -> None:
        started = time.perf_counter()
        try:
            model = LoadedModel(build(call, self._settings))
        except BaseException as error:  # a reward model's constructor may raise anything, SystemExit too
            self._failed_at[_instance(call)] = time.monotonic()
            log.warning("load failed reward=%s error=%s", call.model, type(error).__name__)
            load.set_exception(_as_load_error(call, error))
        else:
            log.info("loaded reward=%s load_s=%.2f", call.model, time.perf_counter() - started)
            load.set_result(model)
            return
        free_memory()


def free_memory() -> None:
    """Give back what is no longer used: reference cycles, and device memory that torch keeps for its next tensors."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory was too small."""
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _OUT_OF_MEMORY)


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


def _instance(call: RewardCall) -> Instance:
    builtin = catalog.CATALOG.get(call.model)
    if builtin is None or builtin.is_local:
        return call.fingerprint, ""
    return call.fingerprint, f"{call.timeout_s} {sorted(call.options.items())}"


def _is_local(key: Instance) -> bool:
    """Whether the instance holds a model, rather than asking an API."""
    return key[1] == ""


def _has_failed(load: Future[LoadedModel]) -> bool:
    return load.done() and load.exception() is not None


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
        return ModelLoadError(str(error))  # without the traceback, whose frames hold what was loaded
    builtin = catalog.CATALOG.get(call.model)
    if isinstance(error, ModuleNotFoundError) and builtin is not None and builtin.extra and error.name:
        return ModelLoadError(str(MissingExtraError(f"reward model {call.model}", error.name, builtin.extra)))
    advice = "; REWARDQ_MAX_MODELS bounds how many models this worker keeps" if is_out_of_memory(error) else ""
    return ModelLoadError(f"reward model {call.model} cannot be loaded: {type(error).__name__}: {error}{advice}")
