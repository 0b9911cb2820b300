"""Finds the class of a reward model, within the modules that a worker may import, and makes an instance of it."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

from tasks import catalog
from tasks.errors import ConfigError, ModelLoadError
from tasks.messages import RewardCall
from tasks.rewards.options import options_in_message
from tasks.settings import Settings
from tasks.source.declared import may_be_reward_model
from tasks.source.files import find_source
from workers.base import Accelerator, RewardArguments, RewardModel
from workers.loading.code import LOADED_CODE


def build(call: RewardCall, settings: Settings) -> RewardModel:
    """A new instance of the reward model that `call` names.

    Raises:
        ModelLoadError: The class may not be imported, or an option is none that a trainer would have sent.
    """
    cls = reward_class(call.model, settings)
    config = RewardArguments(
        name=call.name,
        reward_model=call.model,
        batch_size=call.batch_size,
        dtype_name=call.dtype,
        device_name=settings.device,
        timeout_s=call.timeout_s,
        image_format=call.image_format,
        extra_kwargs=_options(call),
    )
    accelerator = Accelerator(settings.device)
    if _takes_arguments_by_name(cls):
        return cls(config=config, accelerator=accelerator)
    return cls(config, accelerator)


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
    if not is_allowed(model, settings):
        raise ModelLoadError(
            f"reward model {model}: this worker may not import {path!r}; "
            f"start it with REWARDQ_MODULES={','.join((*settings.allowed_modules, path))}"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    _look_before_import(path, name, settings)
    LOADED_CODE.follow(path)
    return _class_in(path, name)


def is_allowed(model: str, settings: Settings) -> bool:
    """Whether a dotted path is within REWARDQ_MODULES."""
    path = model.rpartition(".")[0]
    return any(f"{path}.".startswith(f"{m}.") for m in settings.allowed_modules)


def _options(call: RewardCall) -> dict[str, Any]:
    """The options of a call; those of a built-in are checked as the trainer checks them."""
    if call.model not in catalog.CATALOG:
        return dict(call.options)
    try:
        return options_in_message(call.model, call.options)
    except ConfigError as error:
        raise ModelLoadError(str(error)) from None


def _look_before_import(path: str, name: str, settings: Settings) -> None:
    """Refuse a module that has no reward model of this name, as its source says, before its import runs its code.

    A module that REWARDQ_MODULES names itself is imported whatever is in it: the operator has said so.

    Raises:
        ModelLoadError: It is a package's `__main__`, has no such class, or its source cannot tell.
    """
    parts = [*path.split("."), name]
    if not all(part.isidentifier() for part in parts) or "__main__" in parts:
        raise ModelLoadError(f"{path}.{name} is no dotted path of a class")
    if path in settings.allowed_modules or path in sys.modules:
        return
    if may_be_reward_model(f"{path}.{name}"):
        return
    instead = f"name the module itself: REWARDQ_MODULES={','.join((*settings.allowed_modules, path))}"
    if find_source(path) is None:
        raise ModelLoadError(
            f"No module named {path!r} whose source this worker can read; if it is compiled, {instead}"
        )
    raise ModelLoadError(
        f"{path} has no reward model {name!r} that its source shows, so this worker does not import it; if it makes "
        f"the class while it runs, {instead}"
    )


def _takes_arguments_by_name(cls: type[RewardModel]) -> bool:
    """Whether a constructor has `config` and `accelerator`, as Flow-Factory gives them; else they go in this order."""
    try:
        signature = inspect.signature(cls)
        signature.bind(config=None, accelerator=None)
    except (TypeError, ValueError):
        return False
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    return inspect.Parameter.VAR_POSITIONAL not in kinds


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
