"""From the name of a checkpoint, a path or an id on the Hugging Face hub, to its files; errors say what to do."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from torch.overrides import TorchFunctionMode

from tasks.errors import ModelLoadError
from workers.loading.load_warnings import Said, listening
from workers.models.refusals import refuse_other_numbers

_load_lock = threading.Lock()


@contextlib.contextmanager
def loading(option: str, name: str, revision: str = "") -> Iterator[list[Said]]:
    """Held around code that reads a checkpoint; every failure becomes an error that says what to do.

    One thread at a time: transformers and open_clip change globals of the process while they build a model. The list
    gets the warnings of these libraries. At the end, a warning that means other numbers counts as a failure. A caller
    that has checked by itself what a warning is about removes the warning from the list.

    Args:
        option: The reward's option that names the checkpoint.
        name: The option's value.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelLoadError: Names the option, the checkpoint and, if it is on the hub, HF_HUB_OFFLINE.
    """
    with _load_lock, listening() as heard:
        try:
            yield heard
            refuse_other_numbers(option, name, heard)
        except ModelLoadError:
            raise
        except Exception as error:  # the libraries raise OSError, ValueError, RuntimeError and errors of their own
            raise ModelLoadError(_what_to_do(option, name, revision, error)) from error


def local_or_hub(option: str, name: str) -> str:
    """The absolute path of a checkpoint that exists here, else the name, which then is an id on the hub.

    Raises:
        ModelLoadError: The name can only be a path, and there is nothing at that path.
    """
    path = Path(name).expanduser()
    if path.exists():
        _refuse_odd_file(option, path)
        return str(path.absolute())
    if name.startswith(("/", ".", "~")):
        raise ModelLoadError(
            f"{option}: there is no {str(path)!r} on this worker; a checkpoint is a path on the worker or an id on "
            "the Hugging Face hub, which with HF_HUB_OFFLINE=1 is looked for in the worker's cache only"
        )
    return name


def find_file(option: str, name: str, file: str, revision: str = "") -> str:
    """Path of a checkpoint that is one file.

    Args:
        option: The reward's option that names the checkpoint.
        name: The file, a directory that holds `file`, or a repository on the hub that holds `file`.
        file: The file's name in a directory or repository.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelLoadError: There is no such file.
    """
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ModelLoadError(f"{option}: {file!r} leads out of the checkpoint")
    found = Path(local_or_hub(option, name))
    if found.is_file():
        return str(found)

    if found.is_dir():
        if not (found / file).is_file():
            raise ModelLoadError(
                f"{option}: the directory {str(found)!r} on this worker holds no {file!r}"
            )
        return str(found / file)

    with loading(option, name, revision):
        return huggingface_hub.hf_hub_download(name, file, revision=revision or None)


def without_initialising() -> TorchFunctionMode:
    """Within this context, layers that this thread makes are not initialised: a checkpoint overwrites their weights.

    Drawing the random weights of a ViT-H/14 takes 19 s.
    """
    return _NothingDrawn()


# --- private -------------------------------------------------------------------------------------

_OF_THE_SYSTEM = ("/proc", "/sys")
"""Folders whose files are no checkpoints, though they look like regular files: `/proc/self/environ` has our keys."""


def _refuse_odd_file(option: str, path: Path) -> None:
    """Raise for what is no regular file or folder: a device or a pipe would be read for ever."""
    real = path.resolve()
    is_usual = real.is_file() or real.is_dir()
    if not is_usual or any(real.is_relative_to(one) for one in _OF_THE_SYSTEM):
        raise ModelLoadError(
            f"{option}: {str(path)!r} on this worker is no checkpoint, but a device, a pipe or a file of the system"
        )


_DRAWING = (
    "normal_",
    "uniform_",
    "trunc_normal_",
    "xavier_uniform_",
    "kaiming_uniform_",
    "kaiming_normal_",
)


class _NothingDrawn(TorchFunctionMode):  # type: ignore[misc]
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _DRAWING:
            return func(*args, **kwargs)
        is_positional = args and isinstance(args[0], torch.Tensor)
        return args[0] if is_positional else kwargs["tensor"]


def _what_to_do(option: str, name: str, revision: str, error: Exception) -> str:
    at = f" at revision {revision!r}" if revision else ""
    said = _first_line(str(error)).rstrip(".")
    failed = f"{option}: {name!r}{at} cannot be loaded ({type(error).__name__}: {said})"
    if Path(name).exists():
        return f"{failed}; it is a path on this worker: are its files complete, and of this kind of model?"

    command = _download_command(name, revision)
    if constants.HF_HUB_OFFLINE:
        return (
            f"{failed}; HF_HUB_OFFLINE is set on this worker, so it is looked for in {constants.HF_HUB_CACHE} only: "
            f"download it there with HF_HUB_OFFLINE=0{command}, or give a path on this worker"
        )
    return (
        f"{failed}; are the name and revision right, and does this worker reach the Hugging Face hub? Without the hub, "
        f"put the files into its cache{command} and set HF_HUB_OFFLINE=1, or give a path on this worker"
    )


def _first_line(text: str) -> str:
    """The first line that is not blank, without white space around it."""
    return next(iter(text.strip().splitlines()), "").strip()


def _download_command(name: str, revision: str) -> str:
    """The command that fetches a repository, in brackets; empty if the name is no repository's."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        return ""
    at = f" --revision {revision}" if revision else ""
    return f" (`hf download {name}{at}`)"
