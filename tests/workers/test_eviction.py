from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest

from tasks.errors import ModelLoadError
from tasks.messages import RewardCall
from tasks.rewards import RewardConfig
from tasks.settings import Settings
from tests.servers import wait_until
from workers import PointwiseRewardModel, RewardModelOutput, loading
from workers.loading import Models

made: list[weakref.ref[Any]] = []


@pytest.fixture(autouse=True)
def nothing_made():
    made.clear()


class Mine(PointwiseRewardModel):
    """Notes that it was made."""

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        self.cycle = self  # as modules with hooks are
        made.append(weakref.ref(self))
        if config.extra_kwargs.get("fails"):
            raise RuntimeError("CUDA out of memory. Tried to allocate 4 GiB")

    def __call__(self, prompt: Any, **kwargs: Any) -> RewardModelOutput:
        return RewardModelOutput([1.0] * len(prompt))


def call_of(n: int = 0, **options: Any) -> RewardCall:
    entry = {"reward_model": f"{__name__}.Mine", "version": "1", "n": n, **options}
    return RewardConfig.from_dict({"rewards": entry}).rewards[0].call


def models_of(max_models: int = 0) -> Models:
    return Models(Settings(device="cpu", modules=__name__, max_models=max_models))


def alive() -> list[int]:
    """Numbers of the models whose memory is not freed."""
    return [m.config.n for m in (ref() for ref in made) if m is not None]


def use(models: Models, *numbers: int) -> None:
    for n in numbers:
        with models.lend(call_of(n)) as loaded:
            assert loaded.model.config.n == n
        del loaded


def test_without_a_bound_every_model_stays():
    models = models_of()
    use(models, 0, 1, 2, 3)
    assert alive() == [0, 1, 2, 3]


def test_the_least_recently_used_model_makes_room_and_its_memory_is_freed():
    models = models_of(max_models=2)
    gc.disable()  # to evict is to free, without waiting for a collection
    try:
        use(models, 0, 1, 0, 2)
        assert alive() == [0, 2]
    finally:
        gc.enable()
    assert models.is_loaded(call_of(0))
    assert not models.is_loaded(call_of(1))
    use(models, 0)
    assert len(made) == 3, "what stayed is not loaded again"
    use(models, 1)
    assert alive() == [0, 1]


def test_a_model_in_use_is_never_evicted_and_who_needs_its_place_waits():
    models, got = models_of(max_models=1), []
    with models.lend(call_of(0)) as loaded:
        waiting = threading.Thread(target=lambda: got.append(use(models, 1)), daemon=True)
        waiting.start()
        time.sleep(0.2)
        assert models.is_loaded(call_of(0))
        with models.lend(call_of(0)) as again:  # used by two meanwhile
            assert again is loaded
        time.sleep(0.1)
        assert alive() == [0]
        assert not got
        del loaded, again
    waiting.join(10)
    assert got == [None]
    assert alive() == [1]


def test_the_model_that_is_not_in_use_goes_though_it_was_used_later():
    models = models_of(max_models=2)
    with models.lend(call_of(0)):
        use(models, 1, 2)
        assert alive() == [0, 2]


def test_a_judge_takes_no_place():
    models = models_of(max_models=1)
    judge = RewardConfig.from_dict({"rewards": {"reward_model": "vllm_evaluate"}}).rewards[0].call
    use(models, 0)
    with models.lend(judge):
        assert alive() == [0]
    use(models, 0)
    assert len(made) == 1


def test_a_load_that_fails_holds_no_memory_and_takes_no_place():
    models = models_of(max_models=1)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match=r"CUDA out of memory.*REWARDQ_MAX_MODELS"):
            lend_failing(models)
        assert alive() == []
    use(models, 1)
    use(models, 1)
    assert len(made) == 2
    assert alive() == [1]


def lend_failing(models: Models) -> None:
    with models.lend(call_of(7, fails=True)):
        raise AssertionError("it was lent")


def test_an_error_while_it_is_lent_gives_the_model_back():
    models = models_of(max_models=1)
    with pytest.raises(ValueError, match="mine"), models.lend(call_of(0)):
        raise ValueError("mine")
    use(models, 1)
    assert alive() == [1]


def test_many_threads_and_models_within_a_bound_all_get_what_they_ask_for(monkeypatch):
    monkeypatch.setattr(loading, "free_memory", lambda: None)  # a collection takes a third of a second
    models, wrong, most = models_of(max_models=2), [], []

    def work(seed: int) -> None:
        for i in range(50):
            n = (seed * 7 + i * i) % 5
            with models.lend(call_of(n)) as loaded:
                if loaded.model.config.n != n:
                    wrong.append(n)
                most.append(sum(models.is_loaded(call_of(k)) for k in range(5)))

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: not any(thread.is_alive() for thread in threads), timeout_s=60)
    assert not wrong
    assert len(most) == 4 * 50
    assert max(most) == 2
