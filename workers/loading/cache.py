"""The reward models of a process: each is loaded once, and kept while there is room."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from tasks import catalog
from tasks.errors import ModelLoadError
from tasks.hashing import canonical, hash_of
from tasks.messages import RewardCall
from tasks.settings import Settings
from workers.base import RewardModel
from workers.loading.building import build, is_allowed, reward_class
from workers.loading.builtin_versions import check_builtin
from workers.loading.code import LOADED_CODE
from workers.loading.device import free_memory
from workers.loading.load_errors import as_load_error
from workers.loading.load_warnings import Said, in_short, listening, one_line
from workers.loading.signature import signature_of
from workers.loading.tracebacks import tracebacks

log = logging.getLogger(__name__)

RETRY_LOAD_S = 60.0
"""A model that could not be loaded is not tried again for this long; its samples get the reason at once."""

OUTDATED_S = 600.0
"""A model of another launch that was not used for this long goes when its computation is loaded anew. Two jobs that run
at the same time use theirs more often."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Cache key of a model: its fingerprint, plus the connection options of a remote model."""

    fingerprint: str
    connection: str
    """How a server is asked, which the fingerprint leaves out; empty for a model that runs here."""
    computation: str
    """Hash of what is asked for, made here: a message may have the fingerprint of one reward and the model of another,
    which must not answer for the first from then on."""

    @classmethod
    def of(cls, call: RewardCall) -> CacheKey:
        """The key of the model that `call` needs."""
        builtin = catalog.CATALOG.get(call.model)
        if builtin is None or builtin.is_local:
            return cls(call.instance or call.fingerprint, "", _computation(call))
        connection = f"{call.timeout_s} {sorted(call.options.items())}"
        return cls(call.fingerprint, connection, _computation(call))

    @property
    def is_local(self) -> bool:
        """Whether the model runs here, rather than at a server."""
        return self.connection == ""


@dataclass(slots=True)
class LoadedModel:
    """A reward model in memory. `lock` is held while the model is called, unless it is thread-safe."""

    model: RewardModel
    lock: threading.Lock = field(default_factory=threading.Lock)
    max_batch: int = 1_000_000
    """The largest batch that is tried, after a larger one did not fit into the device's memory."""
    num_too_large: int = 0
    """How many samples did not fit into the device's memory even alone."""
    load_warnings: tuple[str, ...] = ()
    """What libraries warned of while the model loaded, in short; the origin of its outcomes says it."""

    @property
    def device(self) -> str:
        """What the model computes on; empty until it has asked for its device, which a judge never does."""
        return str(vars(self.model).get("device", ""))


@dataclass(slots=True, eq=False)
class _Cached:
    """A load, done or under way, and who uses its model."""

    call: RewardCall
    load: Future[LoadedModel] = field(default_factory=Future)
    num_lent: int = 0
    used_at_s: float = 0.0
    """When its model was last given back (monotonic)."""
    failed_at_s: float = 0.0
    """When its load failed (monotonic)."""
    fingerprints: set[str] = field(default_factory=set)
    """Fingerprints of the requests that use it. A trainer that cannot read the class's source has another one."""

    @property
    def has_failed(self) -> bool:
        return self.load.done() and self.load.exception() is not None

    @property
    def is_in_memory(self) -> bool:
        return self.load.done() and not self.has_failed

    def may_be_tried_again(self, now_s: float) -> bool:
        """Whether its load failed long enough ago."""
        return self.has_failed and now_s - self.failed_at_s > RETRY_LOAD_S

    def is_outdated(self, call: RewardCall, now_s: float) -> bool:
        """Whether probably nobody asks for it again: an earlier launch left it, or its load failed long ago."""
        if self.num_lent:
            return False
        if self.has_failed:
            return self.may_be_tried_again(now_s)
        return now_s - self.used_at_s > OUTDATED_S and _differ_in_launch(
            self.call, call
        )


class ModelCache:
    """The reward models of a process: each is loaded once, whoever asks first. Safe between threads.

    At most REWARDQ_MAX_MODELS local ones are in memory; a model that is lent is never evicted.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Condition()
        self._cached: dict[CacheKey, _Cached] = {}
        """The most recently used last."""

    def is_loaded(self, call: RewardCall) -> bool:
        """Whether the model is in memory."""
        cached = self._cached.get(CacheKey.of(call))
        return cached is not None and cached.is_in_memory

    @property
    def loading(self) -> tuple[str, ...]:
        """Fingerprints of models that are being loaded now."""
        fingerprints: list[str] = []
        with self._lock:  # a thread that asks for a model adds its fingerprint
            for cached in self._cached.values():
                if not cached.load.done():
                    fingerprints += cached.fingerprints
        return tuple(fingerprints)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Fingerprints of the models in memory."""
        fingerprints: list[str] = []
        with self._lock:
            for cached in self._cached.values():
                if cached.is_in_memory:
                    fingerprints += cached.fingerprints
        return tuple(fingerprints)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models in memory."""
        with self._lock:
            names = [c.call.model for c in self._cached.values() if c.is_in_memory]
        return tuple(dict.fromkeys(names))

    @contextlib.contextmanager
    def lend(self, call: RewardCall) -> Iterator[LoadedModel]:
        """The model, in memory for as long as it is lent; a second thread waits for the first one's load.

        Waits while all the models that there is room for are lent.

        Raises:
            ModelLoadError: Says which model, and what to install, allow or mend.
            StaleCodeError: This process has loaded other code of the user's than is asked for, and than there is now.
        """
        self._check_before_load(call)
        cached, is_first = self._reserve(call)
        try:
            if is_first:
                self._load_into(cached)
            # The load has imported more. Its own error would mislead, if it is of other code than is asked for.
            self.check_code(call)
            error = cached.load.exception()
            if error is not None:
                # A new error: each raise adds to an error's traceback, which holds all frames.
                raise ModelLoadError(str(error))
            yield cached.load.result()
        finally:
            with self._lock:
                cached.num_lent -= 1
                cached.used_at_s = time.monotonic()
                self._lock.notify_all()

    def check_code(self, call: RewardCall) -> None:
        """Whether the user's code that is loaded is what `call` asks for. Raises as `lend`."""
        if call.code and is_allowed(call.model, self._settings):
            LOADED_CODE.check(call.model, call.code)

    def _check_before_load(self, call: RewardCall) -> None:
        """As `check_code`. Also, no new instance is to be made of code that has been edited since its import."""
        if call.model in catalog.CATALOG:
            check_builtin(call.model, call.version)
            return
        if not is_allowed(call.model, self._settings):
            return
        LOADED_CODE.follow(call.model.rpartition(".")[0])
        if call.code:
            LOADED_CODE.check(call.model, call.code)
        if not self._is_cached(CacheKey.of(call)):
            LOADED_CODE.check_files(call.model, call.code)

    def _reserve(self, call: RewardCall) -> tuple[_Cached, bool]:
        """The model's load, counted as lent, and whether it is to be begun."""
        key = CacheKey.of(call)
        with self._lock:
            if not self._is_cached(key):
                self._evict_outdated(call)
            self._forget_failure_of_other_code(call)
            self._lock.wait_for(lambda: self._is_cached(key) or self._make_room(key))
            is_first = not self._is_cached(key)
            cached = _Cached(call) if is_first else self._cached[key]
            self._cached.pop(key, None)
            self._cached[key] = cached  # now the last, the most recently used
            cached.fingerprints.add(call.fingerprint)
            cached.num_lent += 1
        return cached, is_first

    def _is_cached(self, key: CacheKey) -> bool:
        """Whether there is a load to wait for or to use. A load that failed counts as one for RETRY_LOAD_S."""
        cached = self._cached.get(key)
        return cached is not None and not cached.may_be_tried_again(time.monotonic())

    def _forget_failure_of_other_code(self, call: RewardCall) -> None:
        """Forget a load that failed with other code of the class: the model is loaded anew at once."""
        key = CacheKey.of(call)
        cached = self._cached.get(key)
        if cached is None or not cached.has_failed:
            return
        before = cached.call.code
        if before and call.code and before != call.code:
            del self._cached[key]

    def _evict_outdated(self, call: RewardCall) -> None:
        now_s, cached = time.monotonic(), self._cached
        outdated = [key for key in cached if cached[key].is_outdated(call, now_s)]
        if outdated:
            self._evict(*outdated)

    def _make_room(self, key: CacheKey) -> bool:
        """Whether one more model may be loaded, after evicting one that nobody uses."""
        max_models = self._settings.max_models
        if not max_models or not key.is_local:
            return True
        cached = self._cached
        local = [k for k in cached if k.is_local and not cached[k].has_failed]
        if len(local) < max_models:
            return True
        unused = [k for k in local if not cached[k].num_lent]
        if not unused:
            return False
        self._evict(unused[0])
        return True

    def _evict(self, *keys: CacheKey) -> None:
        """Drop models. Takes keys: a caller that held one of these models would keep its memory from being freed."""
        for key in keys:
            log.info("evicted reward=%s", self._cached.pop(key).call.model)
        free_memory()

    def _load_into(self, cached: _Cached) -> None:
        """Load a model, or keep the reason why it cannot be loaded."""
        started_s = time.perf_counter()
        call = cached.call
        heard: list[Said] = []
        try:
            # Imported first and unheard: what an import warns of is not the model's.
            reward_class(call.model, self._settings)
            with listening() as heard:
                model = LoadedModel(build(call, self._settings))
                signature_of(model.model)
            model.load_warnings = in_short(heard)
        except BaseException as error:
            # A constructor may raise anything, SystemExit too.
            self._note_failure(cached, error)
        else:
            device = f" device={model.device}" if model.device else ""
            load_s = time.perf_counter() - started_s
            log.info("loaded reward=%s load_s=%.2f%s", call.model, load_s, device)
            cached.load.set_result(model)
            return
        finally:
            _log_warnings(call, heard)
        # Not within the except: the error's frames hold what was loaded.
        free_memory()

    def _note_failure(self, cached: _Cached, error: BaseException) -> None:
        call = cached.call
        cached.failed_at_s = time.monotonic()
        reason = as_load_error(call, error)
        log.warning(
            "load failed reward=%s error=%s reason=%s",
            call.model,
            type(error).__name__,
            reason,
        )
        if not isinstance(error, ModelLoadError):  # whose text says all there is to say
            tracebacks.write("load failed", call.model, error)
        cached.load.set_exception(reason)


def _computation(call: RewardCall) -> str:
    builtin = catalog.CATALOG.get(call.model)
    uses_dtype = builtin is None or builtin.uses_dtype
    dtype = call.dtype if uses_dtype else ""
    parts = [
        call.model,
        call.version,
        dtype,
        call.image_format,
        canonical(call.options),
    ]
    return hash_of(parts, 16)


def _differ_in_launch(one: RewardCall, other: RewardCall) -> bool:
    """Whether two computations differ in their launch only, which counts for a class of the user's without version."""
    if one.fingerprint == other.fingerprint:
        return False
    for name in ("model", "version", "dtype", "image_format", "options"):
        if getattr(one, name) != getattr(other, name):
            return False
    return True


def _log_warnings(call: RewardCall, heard: Sequence[Said]) -> None:
    """Log each warning once: those of Python's that were heard are shown nowhere else."""
    for said in dict.fromkeys(heard):
        log.warning(
            "load warning reward=%s from=%s said=%s",
            call.model,
            said.source,
            one_line(said.text),
        )
