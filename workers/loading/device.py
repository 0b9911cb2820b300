"""The memory of a process's device, and whether the device is still there."""

from __future__ import annotations

import gc
import sys

from workers.loading.tracebacks import words_of

_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def free_memory() -> None:
    """Give back what is no longer used: reference cycles, and device memory that torch keeps for its next tensors."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory was too small."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    words = words_of(error)
    return any(known in words for known in _OUT_OF_MEMORY)


def loss_of_device(name: str) -> RuntimeError | None:
    """What CUDA says if this process can use its GPU no more, whatever it calls; only a new process can.

    A GPU is lost after an assert or a wrong address in a kernel, or when it fell off its bus.

    Args:
        name: The GPU, as REWARDQ_DEVICE names it. A name without an index (or `cpu`) means torch's current GPU: to ask
            another GPU would tell nothing, and would take memory there.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize(name if name.startswith("cuda") else None)
    except RuntimeError as error:
        return None if is_out_of_memory(error) else error
    return None
