"""From a reward's computation to the model in memory: imports within bounds, one instance for each, so many at once."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from tasks import catalog
from tasks.errors import MissingExtraError, ModelLoadError
from tasks.messages import RewardCall
from tasks.settings import Settings
from tasks.shadows import OURS, warning
from workers.base import Accelerator, RewardArguments, RewardModel
from workers.process.code import LOADED, check_builtin
from workers.process.load_warnings import Said, in_short, listening, one_line
from workers.scoring.arguments import taking_of
from workers.scoring.outputs import cut
from workers.scoring.tracebacks import place_in, tracebacks, words_of

log = logging.getLogger(__name__)

RETRY_LOAD_S = 60.0
"""A model that could not be loaded is not tried again for this long; its samples get the reason at once."""

OUTDATED_S = 600.0
"""A model of another launch that was not used for this long goes when its computation is loaded anew. Two jobs that run
at the same time use theirs more often."""

MAX_ERROR_CHARS = 1500
"""Of what a constructor raises: torch names each weight that a file lacks, and each outcome has the reason."""

Instance = tuple[str, str]
"""What an instance of a model is kept under: its fingerprint, which does not say how a server is asked, and that."""


_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass(slots=True)
class LoadedModel:
    """A reward model in memory. `lock` is held while it is called, unless it is thread-safe."""

    model: RewardModel
    lock: threading.Lock = field(default_factory=threading.Lock)
    max_batch: int = 1_000_000
    """The batch size that fitted into the device's memory."""
    num_too_large: int = 0
    """Samples that did not fit even alone."""
    load_warnings: tuple[str, ...] = ()
    """What libraries warned of while it loaded, in short; its outcomes' origin has it."""

    @property
    def device(self) -> str:
        """What it computes on; empty until it has asked for its device, which a judge never does."""
        return str(vars(self.model).get("device", ""))


@dataclass(slots=True, eq=False)
class _Kept:
    """A load, done or under way, and who uses it."""

    call: RewardCall
    load: Future[LoadedModel] = field(default_factory=Future)
    num_lent: int = 0
    used_at: float = 0.0
    """When it was last given back (monotonic)."""
    failed_at: float = 0.0
    fingerprints: set[str] = field(default_factory=set)
    """Of those who asked for it: a trainer that can read the class's source and one that cannot have their own."""

    @property
    def has_failed(self) -> bool:
        return self.load.done() and self.load.exception() is not None


class Models:
    """The reward models of a process: each is loaded once, whoever asks first. Safe between threads.

    At most REWARDQ_MAX_MODELS local ones are in memory; one that is lent is never evicted.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Condition()
        self._kept: dict[Instance, _Kept] = {}
        """The most recently used last."""

    def is_loaded(self, call: RewardCall) -> bool:
        """Whether the model is in memory."""
        kept = self._kept.get(_instance(call))
        return kept is not None and kept.load.done() and not kept.has_failed

    @property
    def loading(self) -> tuple[str, ...]:
        """Fingerprints of models that are being loaded now."""
        with self._lock:
            return tuple(
                f
                for kept in self._kept.values()
                if not kept.load.done()
                for f in kept.fingerprints
            )

    @property
    def loaded(self) -> tuple[str, ...]:
        """Fingerprints of the models in memory."""
        with self._lock:  # a thread that asks for a model adds its fingerprint
            return tuple(f for kept in self._in_memory() for f in kept.fingerprints)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models in memory."""
        return tuple(dict.fromkeys(kept.call.model for kept in self._in_memory()))

    @contextlib.contextmanager
    def lend(self, call: RewardCall) -> Iterator[LoadedModel]:
        """The model, in memory for as long as it is lent; a second thread waits for the first one's load.

        Waits while all the models that there is room for are lent.

        Raises:
            ModelLoadError: Says which model, and what to install, allow or mend.
            StaleCodeError: This process has loaded other code of the user's than is asked for, and than there is now.
        """
        self._check_before_load(call)
        kept, is_first = self._reserve(call)
        try:
            if is_first:
                self._load_into(kept)
            self.check_code(
                call
            )  # it has imported more; and an error of other code would mislead
            error = kept.load.exception()
            if error is not None:
                raise ModelLoadError(
                    str(error)
                )  # a new one: each raise adds to its traceback, which holds all frames
            yield kept.load.result()
        finally:
            with self._lock:
                kept.num_lent -= 1
                kept.used_at = time.monotonic()
                self._lock.notify_all()

    def check_code(self, call: RewardCall) -> None:
        """Whether the user's code that is loaded is what `call` asks for. Raises as `lend`."""
        if call.code and _is_allowed(call.model, self._settings):
            LOADED.check(call.model, call.code)

    def _check_before_load(self, call: RewardCall) -> None:
        """As `check_code`; of what the trainer has not read no new instance is made where it is outdated here."""
        if call.model in catalog.CATALOG:
            return check_builtin(call.model, call.version)
        if not _is_allowed(call.model, self._settings):
            return None
        LOADED.follow(call.model.rpartition(".")[0])
        if call.code:
            LOADED.check(call.model, call.code)
        if not self._is_kept(_instance(call)):
            LOADED.check_files(call.model, call.code)
        return None

    def _in_memory(self) -> list[_Kept]:
        with self._lock:
            return [
                k for k in self._kept.values() if k.load.done() and not k.has_failed
            ]

    def _reserve(self, call: RewardCall) -> tuple[_Kept, bool]:
        """The model's load, counted as lent, and whether it is to be begun."""
        key = _instance(call)
        with self._lock:
            if not self._is_kept(key):
                self._evict_outdated(call)
            self._forget_failure_of_other_code(call)
            self._lock.wait_for(lambda: self._is_kept(key) or self._make_room(key))
            is_first = not self._is_kept(key)
            kept = _Kept(call) if is_first else self._kept[key]
            self._kept.pop(key, None)
            self._kept[key] = kept
            kept.fingerprints.add(call.fingerprint)
            kept.num_lent += 1
        return kept, is_first

    def _is_kept(self, key: Instance) -> bool:
        """Whether there is a load to wait for or to use; one that failed is begun anew after a while."""
        kept = self._kept.get(key)
        return kept is not None and not (
            kept.has_failed and time.monotonic() - kept.failed_at > RETRY_LOAD_S
        )

    def _forget_failure_of_other_code(self, call: RewardCall) -> None:
        """A load that failed says nothing of the code that the class has since: it is begun anew at once."""
        kept = self._kept.get(_instance(call))
        if kept is None or not kept.has_failed or not kept.call.code or not call.code:
            return
        if kept.call.code != call.code:
            del self._kept[_instance(call)]

    def _evict_outdated(self, call: RewardCall) -> None:
        """Drop what earlier launches left of this computation, and loads that failed; nobody may ask for them again."""
        now = time.monotonic()
        outdated = [
            key
            for key, kept in self._kept.items()
            if not kept.num_lent
            and (
                now - kept.failed_at > RETRY_LOAD_S
                if kept.has_failed
                else now - kept.used_at > OUTDATED_S
                and _differ_in_launch(kept.call, call)
            )
        ]
        if outdated:
            self._evict(*outdated)

    def _make_room(self, key: Instance) -> bool:
        """Whether one more model may be loaded, after evicting one that nobody uses."""
        local = [
            k for k, kept in self._kept.items() if _is_local(k) and not kept.has_failed
        ]
        if (
            not self._settings.max_models
            or not _is_local(key)
            or len(local) < self._settings.max_models
        ):
            return True
        unused = next((k for k in local if not self._kept[k].num_lent), None)
        if unused is None:
            return False
        self._evict(unused)
        return True

    def _evict(self, *keys: Instance) -> None:
        for key in keys:
            log.info("evicted reward=%s", self._kept.pop(key).call.model)
        free_memory()

    def _load_into(self, kept: _Kept) -> None:
        started = time.perf_counter()
        call = kept.call
        heard: list[Said] = []
        try:
            reward_class(
                call.model, self._settings
            )  # what an import warns of is not the model's
            with listening() as heard:
                model = LoadedModel(build(call, self._settings))
                taking_of(model.model)
            model.load_warnings = in_short(heard)
        except (
            BaseException
        ) as error:  # a reward model's constructor may raise anything, SystemExit too
            kept.failed_at = time.monotonic()
            reason = _as_load_error(call, error)
            log.warning(
                "load failed reward=%s error=%s reason=%s",
                call.model,
                type(error).__name__,
                reason,
            )
            if not isinstance(
                error, ModelLoadError
            ):  # which is ours, and says all that there is to say
                tracebacks.write("load failed", call.model, error)
            kept.load.set_exception(reason)
        else:
            device = f" device={model.device}" if model.device else ""
            log.info(
                "loaded reward=%s load_s=%.2f%s",
                call.model,
                time.perf_counter() - started,
                device,
            )
            kept.load.set_result(model)
            return
        finally:
            _say_what_was_heard(call, heard)
        free_memory()


def free_memory() -> None:
    """Give back what is no longer used: reference cycles, and device memory that torch keeps for its next tensors."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory was too small."""
    return type(error).__name__ == "OutOfMemoryError" or any(
        words in words_of(error) for words in _OUT_OF_MEMORY
    )


def loss_of_device(name: str) -> RuntimeError | None:
    """What CUDA says if this process can use its GPU no more, whatever it calls; only a new process can.

    So it is after an assert or a wrong address in a kernel, or when the GPU fell off its bus.

    Args:
        name: The GPU, as REWARDQ_DEVICE names it; without an index (or `cpu`) it is torch's current one. To ask
            another would not tell, and would take memory there.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize(name if name.startswith("cuda") else None)
    except RuntimeError as error:
        return None if is_out_of_memory(error) else error
    return None


def build(call: RewardCall, settings: Settings) -> RewardModel:
    """A new instance of the reward model that `call` names."""
    cls = reward_class(call.model, settings)
    config = RewardArguments(
        name=call.name,
        reward_model=call.model,
        batch_size=call.batch_size,
        dtype_name=call.dtype,
        device_name=settings.device,
        timeout_s=call.timeout_s,
        image_format=call.image_format,
        extra_kwargs=dict(call.options),
    )
    return _made(cls, config, Accelerator(settings.device))


def _made(
    cls: type[RewardModel], config: RewardArguments, accelerator: Accelerator
) -> RewardModel:
    """An instance, its arguments by name where its constructor has these, as Flow-Factory does; else in this order."""
    try:
        signature = inspect.signature(cls)
        signature.bind(config=config, accelerator=accelerator)
        in_order = any(
            p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()
        )
    except (TypeError, ValueError):
        in_order = True
    return (
        cls(config, accelerator)
        if in_order
        else cls(config=config, accelerator=accelerator)
    )


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
    if not _is_allowed(model, settings):
        raise ModelLoadError(
            f"reward model {model}: this worker may not import {path!r}; "
            f"start it with REWARDQ_MODULES={','.join((*settings.allowed_modules, path))}"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    LOADED.follow(path)
    return _class_in(path, name)


def _is_allowed(model: str, settings: Settings) -> bool:
    """Whether a dotted path is within REWARDQ_MODULES."""
    path = model.rpartition(".")[0]
    return any(path == m or path.startswith(f"{m}.") for m in settings.allowed_modules)


def _instance(call: RewardCall) -> Instance:
    builtin = catalog.CATALOG.get(call.model)
    if builtin is None or builtin.is_local:
        return call.instance or call.fingerprint, ""
    return call.fingerprint, f"{call.timeout_s} {sorted(call.options.items())}"


def _is_local(key: Instance) -> bool:
    """Whether the instance holds a model, rather than asking an API."""
    return key[1] == ""


def _differ_in_launch(one: RewardCall, other: RewardCall) -> bool:
    """Whether two computations are the same but for the launch, which counts where the user's code has no version."""
    same = all(
        getattr(one, name) == getattr(other, name)
        for name in ("model", "version", "dtype", "image_format")
    )
    return (
        same and one.options == other.options and one.fingerprint != other.fingerprint
    )


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


def _say_what_was_heard(call: RewardCall, heard: Sequence[Said]) -> None:
    """In the log, each once: what is heard here is shown nowhere else."""
    for said in dict.fromkeys(heard):
        log.warning(
            "load warning reward=%s from=%s said=%s",
            call.model,
            said.source,
            one_line(said.text),
        )


def _as_load_error(call: RewardCall, error: BaseException) -> ModelLoadError:
    if isinstance(error, ModelLoadError):
        return ModelLoadError(
            str(error)
        )  # without the traceback, whose frames hold what was loaded
    builtin = catalog.CATALOG.get(call.model)
    if (
        isinstance(error, ModuleNotFoundError)
        and builtin is not None
        and builtin.extra
        and error.name
    ):
        missing = MissingExtraError(
            f"reward model {call.model}",
            error.name,
            builtin.extra,
            socket.gethostname(),
        )
        return ModelLoadError(str(missing))
    place = "" if builtin is not None else place_in(error, call.model)
    words = cut(words_of(error), MAX_ERROR_CHARS)
    return ModelLoadError(
        f"reward model {call.model} cannot be loaded: {words}{place}{_advice(call, error)}"
    )


def _advice(call: RewardCall, error: BaseException) -> str:
    """What to do about an error of a constructor or an import, where that is known."""
    if is_out_of_memory(error):
        return "; REWARDQ_MAX_MODELS bounds how many models this worker keeps"
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in OURS:
        return f"; {warning(Path.cwd()) or 'that name is a package of rewardq'}"
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    host = socket.gethostname()
    if f"{call.model}.".startswith(f"{error.name}."):  # the class's own module
        return f"; start the worker on {host} where its file is, or with that folder on PYTHONPATH"
    return (
        f"; install it in the worker's environment on {host}, then restart the worker"
    )
