from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from typing import Any

import pytest

from tasks.errors import ModelLoadError
from tasks.messages import RewardCall
from tasks.rewards import RewardConfig
from tasks.settings import Settings
from tests.clock import Clock
from tests.reward_models import image_of
from tests.servers import wait_until
from trainer_client import RewardClient, Sample
from workers import PointwiseRewardModel, RewardModelOutput
from workers.loading import cache as loading
from workers.loading.cache import ModelCache

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


def models_of(max_models: int = 0) -> ModelCache:
    return ModelCache(Settings(device="cpu", modules=__name__, max_models=max_models))


def alive() -> list[int]:
    """Numbers of the models whose memory is not freed."""
    return [m.config.n for m in (ref() for ref in made) if m is not None]


def use(models: ModelCache, *numbers: int) -> None:
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


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(loading, "time", found := Clock())
    return found


def test_what_earlier_launches_left_of_a_computation_goes_when_it_is_loaded_anew(clock):
    models = models_of()
    for launch in ("one", "two", "three"):
        use_unversioned(models, launch)
        use_unversioned(models, launch, n=2)
        use(models, 1)
        clock.now += 1.5 * loading.OUTDATED_S
        assert sorted(alive()) == [0, 1, 2]
    assert len(made) == 3 + 3 + 1


def test_launches_at_the_same_time_keep_theirs(clock):
    models = models_of()
    with models.lend(unversioned("lent")):
        for _ in range(3):
            use_unversioned(models, "one")
            use_unversioned(models, "two")
            clock.now += 0.5 * loading.OUTDATED_S
        clock.now += 0.75 * loading.OUTDATED_S
        use_unversioned(models, "three")
        assert len(made) == 4
        assert len(alive()) == 2
        assert models.is_loaded(unversioned("lent"))


def test_other_options_are_another_computation_however_long_unused(clock):
    models = models_of()
    for n in range(3):
        use_unversioned(models, "one", n=n)
        clock.now += 2 * loading.OUTDATED_S
    use_unversioned(models, "one", n=3, dtype="float32")
    clock.now += 2 * loading.OUTDATED_S
    use_unversioned(models, "one", n=3, dtype="bfloat16")
    assert alive() == [0, 1, 2, 3, 3]


def unversioned(launch: str, **options: Any) -> RewardCall:
    entry = {"reward_model": f"{__name__}.Mine", "n": 0, **options}
    return RewardConfig.from_dict({"rewards": entry}).for_launch(launch).rewards[0].call


def use_unversioned(models: ModelCache, launch: str, **options: Any) -> None:
    with models.lend(unversioned(launch, **options)):
        pass


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


def test_a_load_that_failed_keeps_nothing_of_those_who_asked_and_is_forgotten_with_its_launch(monkeypatch):
    class Request:
        pass

    def ask() -> weakref.ref[Any]:
        request = Request()
        with pytest.raises(ModelLoadError):
            lend_failing(models)
        return weakref.ref(request)

    models = models_of()
    asked = [ask() for _ in range(3)]
    gc.collect()
    assert [ref() for ref in asked] == [None] * 3
    monkeypatch.setattr(loading, "RETRY_LOAD_S", 0.0)
    use(models, 1)
    assert len(models._cached) == 1


def lend_failing(models: ModelCache) -> None:
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
                most.append(len(models.loaded))  # one look: to ask for each in turn may count one that has gone

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: not any(thread.is_alive() for thread in threads), timeout_s=60)
    assert not wrong
    assert len(most) == 4 * 50
    assert max(most) == 2


def test_a_worker_that_may_keep_one_model_takes_turns_with_two_and_gives_the_rewards_of_each(workers, settings):
    model = {"reward_model": "tests.reward_models.PixelCode", "batch_size": 2}
    config = {"rewards": [{"name": "plain", **model}, {"name": "more", "add": 1000, **model}]}
    (worker,) = workers("gpu", env={"REWARDQ_MAX_MODELS": "1"})
    with RewardClient.from_dict(config, "bounded", settings=settings) as client:
        client.submit([Sample(image=image_of(n)) for n in range(8)])
        batch = client.collect(timeout_s=60)
    assert batch.rewards["plain"].tolist() == [float(n) for n in range(8)]
    assert batch.rewards["more"].tolist() == [1000.0 + n for n in range(8)]
    events = re.findall(r"(loaded|evicted) reward=tests\.reward_models\.PixelCode", worker.log_text)
    assert "evicted" in events
    assert events == ["loaded", *["evicted", "loaded"] * (len(events) // 2)], "never two at once"
