"""From the name of a checkpoint, a path or an id on the Hugging Face hub, to its files, or to what is to be done."""

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

_one_load = threading.Lock()


@contextlib.contextmanager
def loading(option: str, name: str, revision: str = "") -> Iterator[list[Said]]:
    """Held around what reads a checkpoint; whatever goes wrong becomes an error that says what to do.

    One thread at a time: while they build a model, transformers and open_clip change what is global in the process.
    What they warn of within is in the list, and a warning that means other numbers is something that went wrong; a
    caller that has looked for itself at what is warned of takes it out.

    Args:
        option: The reward's option that names the checkpoint.
        name: What it says, for the message.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelLoadError: Names the option, the checkpoint and, for one on the hub, HF_HUB_OFFLINE.
    """
    with _one_load, listening() as heard:
        try:
            yield heard
            refuse_other_numbers(option, name, heard)
        except ModelLoadError:
            raise
        except Exception as error:  # the libraries have no tree: OSError, ValueError, RuntimeError, errors of their own
            raise ModelLoadError(_what_to_do(option, name, revision, error)) from error


def local_or_hub(option: str, name: str) -> str:
    """An existing path, made absolute, or an id on the hub as it is.

    Raises:
        ModelLoadError: A path that does not exist.
    """
    path = Path(name).expanduser()
    if path.exists():
        return str(path.absolute())
    if name.startswith(("/", ".", "~")):
        raise ModelLoadError(
            f"{option}: there is no {str(path)!r} on this worker; a checkpoint is a path on the worker or an id on "
            "the Hugging Face hub, which with HF_HUB_OFFLINE=1 is looked for in the worker's cache only"
        )
    return name


def find_file(option: str, name: str, file: str, revision: str = "") -> str:
    """Path of a checkpoint's one file: `name` is that file, a directory that holds `file`, or a repository on the hub.

    Raises:
        ModelLoadError: There is none.
    """
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
    """Within this context a thread's new layers keep the memory as they find it: a checkpoint overwrites all of it.

    To draw the random weights of a ViT-H/14 takes 19 s.
    """
    return _NothingDrawn()


# --- private -------------------------------------------------------------------------------------

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
        if getattr(func, "__name__", "") in _DRAWING:
            return (
                args[0]
                if args and isinstance(args[0], torch.Tensor)
                else kwargs["tensor"]
            )
        return func(*args, **kwargs)


def _what_to_do(option: str, name: str, revision: str, error: Exception) -> str:
    at = f" at revision {revision!r}" if revision else ""
    said = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), ""
    ).rstrip(".")
    failed = f"{option}: {name!r}{at} cannot be loaded ({type(error).__name__}: {said})"
    if Path(name).exists():
        return f"{failed}; it is a path on this worker: are its files complete, and of this kind of model?"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{failed}; HF_HUB_OFFLINE is set on this worker, so it is looked for in {constants.HF_HUB_CACHE} only: "
            f"download it there with HF_HUB_OFFLINE=0{_by_command(name, revision)}, or give a path on this worker"
        )
    return (
        f"{failed}; are the name and revision right, and does this worker reach the Hugging Face hub? Without it, put "
        f"the files into its cache{_by_command(name, revision)} and set HF_HUB_OFFLINE=1, or give a path on this worker"
    )


def _by_command(name: str, revision: str) -> str:
    is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return (
        f" (`hf download {name}{f' --revision {revision}' if revision else ''}`)"
        if is_repository
        else ""
    )
