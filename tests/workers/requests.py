"""Requests as a client would send them, with their payloads, for tests of the scoring side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tasks import media
from tasks.messages import MediaRef, Outcome, RewardCall, SampleRequest
from tasks.rewards import RewardConfig
from tasks.settings import load_settings
from workers import Accelerator, RewardArguments, RewardModel
from workers.loading.cache import LoadedModel
from workers.scoring.runner import ModelRunner


def call_of(**entry: Any) -> RewardCall:
    """The computation of an entry of a `rewards:` block."""
    (spec,) = RewardConfig.from_dict({"rewards": entry}).rewards
    return spec.call


class Requests:
    """Makes requests for samples and keeps their payloads."""

    def __init__(self) -> None:
        self.payloads: dict[str, bytes] = {}
        self._num = 0

    def ref(self, array: np.ndarray, kind: str = "raw") -> MediaRef:
        """The reference to an array in the payloads."""
        if kind == "jpeg":
            frames = array if array.ndim == 4 else array[None]
            data = media.join_frames([media.to_jpeg(frame) for frame in frames])
        else:
            data = array.tobytes()
        name = f"c.{len(self.payloads)}"
        self.payloads[name] = bytearray(data)
        return MediaRef(name=name, digest=media.digest(data), shape=array.shape, format=kind)

    def sample(self, prompt: str = "a cat", metadata: dict | None = None, kind: str = "raw", **fields: Any) -> Any:
        """A sample; fields are arrays, or lists of arrays, and what a request has beside media."""
        self._num += 1
        beside = {n: fields.pop(n) for n in ("fps", "sample_rate", "withheld") if n in fields}
        refs = {
            name: tuple(self.ref(one, kind) for one in value)
            if isinstance(value, list)
            else self.ref(value, "float32" if name == "audio" else kind)
            for name, value in fields.items()
        }
        address = f"run:f:{self._num}"
        return SampleRequest(address=address, prompt=prompt, media=refs, metadata=metadata or {}, **beside)


def make(cls: type[RewardModel], **options: Any) -> LoadedModel:
    """A model in memory, made without a catalog."""
    config = RewardArguments(name=cls.__name__, reward_model=f"tests.{cls.__name__}", extra_kwargs=options)
    return LoadedModel(cls(config, Accelerator("cpu")))


def run(
    model: LoadedModel, samples: Sequence[SampleRequest], payloads: dict[str, bytes], batch_size: int = 16
) -> list[Outcome]:
    """What becomes of samples, in their order."""
    call = call_of(reward_model="tests.Mine", batch_size=batch_size)
    found: dict[str, Outcome] = {}
    for outcomes in iter_run(model, call, samples, payloads):
        assert not found.keys() & outcomes.keys()
        found.update(outcomes)
    assert set(found) == {s.address for s in samples}
    return [found[s.address] for s in samples]


def iter_run(
    model: LoadedModel, call: RewardCall, samples: Sequence[SampleRequest], payloads: dict[str, bytes]
) -> Iterator[dict[str, Outcome]]:
    """As the scoring task runs them."""
    return ModelRunner(load_settings()).run(model, call, samples, payloads)


def plain(outcomes: Sequence[Outcome]) -> list[Any]:
    """Rewards, and for failures their kind."""
    return [o.reward if o.reward is not None else o.failure.kind for o in outcomes]
