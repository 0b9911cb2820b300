"""Says why a reward model cannot be loaded, and what to do about it."""

from __future__ import annotations

import socket
from pathlib import Path

from tasks import catalog
from tasks.errors import MissingExtraError, ModelLoadError
from tasks.messages import RewardCall
from tasks.shadows import OURS, warning
from workers.loading.device import is_out_of_memory
from workers.loading.tracebacks import user_line, words_of
from workers.texts import cut

MAX_ERROR_CHARS = 1500
"""Of what a constructor raises: torch names each weight that a file lacks, and each outcome has the reason."""


def as_load_error(call: RewardCall, error: BaseException) -> ModelLoadError:
    """What a constructor or an import raised, as a new error without a traceback, whose frames hold what was loaded."""
    if isinstance(error, ModelLoadError):
        return ModelLoadError(str(error))
    missing = _missing_extra(call, error)
    if missing is not None:
        return ModelLoadError(str(missing))
    words = cut(words_of(error), MAX_ERROR_CHARS)
    line = user_line(error, call.model)
    return ModelLoadError(
        f"reward model {call.model} cannot be loaded: {words}{line}{_advice(call, error)}"
    )


def _missing_extra(call: RewardCall, error: BaseException) -> MissingExtraError | None:
    """What to install, if a built-in lacks a package that one of our extras has."""
    builtin = catalog.CATALOG.get(call.model)
    if builtin is None or not builtin.extra:
        return None
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    what = f"reward model {call.model}"
    return MissingExtraError(what, error.name, builtin.extra, socket.gethostname())


def _advice(call: RewardCall, error: BaseException) -> str:
    """What to do about an error of a constructor or an import, where that is known."""
    if is_out_of_memory(error):
        return "; REWARDQ_MAX_MODELS bounds how many models this worker keeps"
    if not isinstance(error, ImportError):
        return ""
    missing = error.name or ""
    if missing.partition(".")[0] in OURS:
        return f"; {warning(Path.cwd()) or 'that name is a package of rewardq'}"
    if not isinstance(error, ModuleNotFoundError) or not missing:
        return ""
    host = socket.gethostname()
    is_class_module = f"{call.model}.".startswith(f"{missing}.")
    if is_class_module:
        return f"; start the worker on {host} where its file is, or with that folder on PYTHONPATH"
    return (
        f"; install it in the worker's environment on {host}, then restart the worker"
    )
