"""TRL's reward functions, called as its trainer calls them, against real workers."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.errors import ScoringError
from tasks.samples import Sample
from tasks.settings import Settings
from tests.pipeline.conftest import together
from tests.reward_models import image_of
from trainer_client import RewardClient
from trainer_client.adapters.trl import reward_functions, reward_weights, samples_of, text_of

REWARDS = [
    {"name": "number", "reward_model": "tests.reward_models.PixelCode", "batch_size": 4},
    {"name": "more", "reward_model": "tests.reward_models.PixelCode", "add": 100, "weight": 0.5},
    {"name": "picky", "reward_model": "tests.reward_models.RaisesOn"},
]


class CountingClient(RewardClient):
    """Remembers the steps it was asked for."""

    submitted: list[int | None]

    def submit(self, samples: Any, group_size: int | None = None, **options: Any) -> Any:
        self.__dict__.setdefault("submitted", []).append(options.get("step"))
        return super().submit(samples, group_size, **options)


@pytest.fixture
def client(settings: Settings, workers: Callable[..., Any]) -> Iterator[CountingClient]:
    workers("gpu")
    with CountingClient.from_dict({"rewards": REWARDS}, "trl", settings=settings) as client:
        yield client


class Trainer:
    """Calls reward functions as `GRPOTrainer` does: plain ones in turn, coroutine functions together on a loop."""

    def __init__(self, functions: list[Any]) -> None:
        self.functions = functions
        self.metrics: list[tuple[str, float]] = []

    def rewards(self, rows: list[dict[str, Any]], completions: list[Any]) -> list[list[float | None]]:
        given = {
            "prompts": [row["prompt"] for row in rows],
            "completions": completions,
            "completion_ids": [[1, 2]] * len(rows),
            **{key: [row[key] for row in rows] for key in rows[0] if key != "prompt"},
            "trainer_state": object(),
            "log_extra": lambda column, values: None,
            "log_metric": lambda name, value: self.metrics.append((name, value)),
        }
        found: list[Any] = [None] * len(self.functions)
        waiting = []
        for i, function in enumerate(self.functions):
            if inspect.iscoroutinefunction(function):
                waiting.append(i)
            else:
                found[i] = function(**given)
        if waiting:

            async def together() -> list[Any]:
                return list(await asyncio.gather(*(self.functions[i](**given) for i in waiting)))

            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever)
            thread.start()
            try:
                answers = asyncio.run_coroutine_threadsafe(together(), loop).result(60)
            finally:
                loop.call_soon_threadsafe(loop.stop)
                thread.join()
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()
            for i, answer in zip(waiting, answers, strict=True):
                found[i] = answer
        return found


def rows_of(numbers: list[int]) -> list[dict[str, Any]]:
    return [{"prompt": f"draw {n}", "note": {"abstain": n % 2 == 1}} for n in numbers]


def to_samples(prompts: Any, completions: Any, columns: Any) -> list[Sample]:
    return [
        Sample(prompt=p, image=c, group=p, metadata=note)
        for p, c, note in zip(prompts, completions, columns["note"], strict=True)
    ]


def test_rates_in_columns_of_the_data_set_are_the_samples() -> None:
    columns = {"fps": [24.0, None], "sample_rate": [16000, 48000]}
    found = samples_of(["a", "b"], ["text", "text"], columns)
    assert [(sample.fps, sample.sample_rate) for sample in found] == [(24.0, 16000), (None, 48000)]


@pytest.mark.parametrize("is_async", [False, True])
def test_each_function_gives_its_rewards_in_order_and_none_where_there_is_none(
    client: CountingClient, is_async: bool
) -> None:
    functions = reward_functions(client, to_samples=to_samples, is_async=is_async, timeout_s=30)
    assert [function.__name__ for function in functions] == ["number", "more", "picky"]
    assert [inspect.iscoroutinefunction(function) for function in functions] == [is_async] * 3
    trainer = Trainer(functions)
    for step, numbers in enumerate([[3, 4, 5, 6, 7], [8, 9]]):
        found = trainer.rewards(rows_of(numbers), [image_of(n) for n in numbers])
        assert found[0] == [float(n) for n in numbers]
        assert found[1] == [float(n + 100) for n in numbers]
        assert found[2] == [None if n % 2 else float(n) for n in numbers]
        assert client.submitted == list(range(step + 1))
    assert trainer.metrics[:3] == [
        ("rewards/number/failure_rate", 0.0),
        ("rewards/more/failure_rate", 0.0),
        ("rewards/picky/failure_rate", 0.6),
    ]


def test_completions_of_a_prompt_are_compared_also_where_a_prompt_comes_twice(
    settings: Settings, workers: Callable[..., Any]
) -> None:
    workers("gpu")
    rewards = {"name": "rank", "reward_model": "jpeg_incompressibility_Rank"}
    pictures = [image_of(1, size, size) for size in (8, 64, 32, 16)]
    with RewardClient.from_dict({"rewards": rewards}, "trl", settings=settings) as client:
        in_pairs = reward_functions(client, num_generations=2, timeout_s=30)[0]
        assert in_pairs(prompts=["a"] * 4, completions=pictures) == [0.0, 0.5, 0.5, 0.0]
        at_once = reward_functions(client, timeout_s=30)[0]
        assert at_once(prompts=["a"] * 4, completions=list(pictures)) == [0.0, 0.75, 0.5, 0.25]


RANK = {"rewards": {"name": "rank", "reward_model": "jpeg_incompressibility_Rank"}}


def pictures_of(*sizes: int) -> list[Any]:
    """The larger, the higher their rank."""
    return [image_of(1, size, size) for size in sizes]


class Model:
    """A trainer whose model is in training mode or not, as far as a reward function sees it."""

    def __init__(self, training: bool) -> None:
        self.model = SimpleNamespace(training=training)

    def log_metric(self, name: str, value: float) -> None:
        pass


def test_evaluation_with_another_number_of_generations_compares_its_own_groups(
    settings: Settings, workers: Callable[..., Any]
) -> None:
    workers("gpu")
    with RewardClient.from_dict(RANK, "trl", settings=settings) as client:
        rank = reward_functions(client, num_generations=4, timeout_s=30)[0]
        assert rank(prompts=["a"] * 4 + ["b"] * 4, completions=pictures_of(8, 16, 32, 64, 64, 32, 16, 8)) == [
            *(0.0, 0.25, 0.5, 0.75),
            *(0.75, 0.5, 0.25, 0.0),
        ]
        assert rank(prompts=["a", "a", "b", "b"], completions=pictures_of(8, 64, 32, 16)) == [0.0, 0.5, 0.5, 0.0]
        assert rank(prompts=["a", "b", "a"], completions=pictures_of(8, 64, 32)) == [0.0, 0.0, 0.5]
        either = reward_functions(client, num_generations=4, num_generations_eval=2, timeout_s=30)[0]
        same = {"prompts": ["read the sign"] * 4, "completions": pictures_of(8, 64, 32, 16)}
        assert either(**same, log_metric=Model(training=True).log_metric) == [0.0, 0.75, 0.5, 0.25]
        assert either(**same, log_metric=Model(training=False).log_metric) == [0.0, 0.5, 0.5, 0.0]


def test_rows_without_groups_are_compared_where_prompt_and_source_are_the_same(
    settings: Settings, workers: Callable[..., Any]
) -> None:
    workers("gpu")

    def edits(prompts: Any, completions: Any, columns: Any) -> list[Sample]:
        return [
            Sample(prompt="Is it well done?", image=image, condition_images=[image_of(source)])
            for image, source in zip(completions, columns["source"], strict=True)
        ]

    given = {"prompts": ["blue"] * 4 + ["red"] * 2, "source": [1, 2, 1, 2, 1, 1]}
    with RewardClient.from_dict(RANK, "trl", settings=settings) as client:
        rank = reward_functions(client, to_samples=edits, timeout_s=30)[0]
        assert rank(**given, completions=pictures_of(8, 16, 32, 64, 64, 32)) == [0.0, 0.0, 0.5, 0.5, 0.5, 0.0]


def test_groups_reach_over_ranks_and_a_prompt_may_come_twice(settings: Settings, workers: Callable[..., Any]) -> None:
    workers("gpu")
    clients = [
        RewardClient.from_dict(RANK, "trl", rank=rank, world_size=2, launch="one", settings=settings)
        for rank in range(2)
    ]
    first, second = (
        reward_functions(client, num_generations=6, num_generations_eval=2, timeout_s=30)[0] for client in clients
    )
    train = together(
        lambda: first(prompts=["a"] * 3, completions=pictures_of(8, 16, 24)),
        lambda: second(prompts=["a"] * 3, completions=pictures_of(32, 40, 48)),
    )
    np.testing.assert_allclose(train, [[0, 1 / 6, 2 / 6], [3 / 6, 4 / 6, 5 / 6]], rtol=1e-6)
    evaluation = together(
        lambda: first(prompts=["a", "a", "b"], completions=pictures_of(8, 64, 32)),
        lambda: second(prompts=["b", "a", "a"], completions=pictures_of(16, 16, 32)),
    )
    assert evaluation == [[0.0, 0.5, 0.5], [0.0, 0.0, 0.5]]
    found = together(
        lambda: first(prompts=["a", "b", "c"], completions=pictures_of(8, 64, 32)),
        lambda: second(prompts=["d", "e", "f"], completions=pictures_of(16, 16, 32)),
    )
    for error in found:
        assert isinstance(error, ValueError)
        assert "num_generations=6 and num_generations_eval=2: give both as the trainer has them" in str(error)
    for client in clients:
        client.close()


def test_the_same_completions_asked_again_are_a_new_call(client: CountingClient) -> None:
    number = reward_functions(client, to_samples=to_samples, timeout_s=30)[0]
    given = {"prompts": ["a"], "completions": [image_of(5)], "note": [{}]}
    assert number(**given) == number(**given) == [5.0]
    assert client.submitted == [0, 1]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_that_must_not_fail_raises_from_every_function(
    settings: Settings, workers: Callable[..., Any], is_async: bool
) -> None:
    workers("gpu")
    rewards = [REWARDS[0], {**REWARDS[2], "on_failure": "raise"}]
    with RewardClient.from_dict({"rewards": rewards}, "trl", settings=settings) as client:
        functions = reward_functions(client, to_samples=to_samples, is_async=is_async, timeout_s=30)
        rows, images = rows_of([1, 2]), [image_of(1), image_of(2)]
        with pytest.raises(ScoringError, match="no opinion"):
            Trainer(functions).rewards(rows, images)
        assert Trainer(functions[:1]).rewards(rows_of([2]), [image_of(2)]) == [[2.0]]


def test_a_wrong_to_samples_leaves_no_step_open(client: CountingClient) -> None:
    given = {"prompts": ["a", "b"], "completions": [image_of(5), image_of(6)]}
    number = reward_functions(client, to_samples=lambda prompts, completions, columns: [], timeout_s=30)[0]
    with pytest.raises(ValueError, match="to_samples must give a sample for each of 2 rows, found 0"):
        number(**given)
    assert reward_functions(client, timeout_s=30)[0](**given) == [5.0, 6.0]


def test_the_weights_are_those_of_the_functions(client: CountingClient) -> None:
    assert reward_weights(client) == [1.0, 0.5, 1.0]


def test_rows_become_samples() -> None:
    picture = Image.new("RGB", (4, 4))
    conversation = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a cat"}]
    by_image, by_text, by_column = samples_of(
        ["a dog", conversation, conversation],
        [np.zeros((4, 4, 3), np.uint8), "meow", [{"role": "assistant", "content": [{"type": "text", "text": "purr"}]}]],
        {"image": [None, None, picture], "other": [1, 2, 3]},
    )
    assert (by_image.prompt, by_image.metadata) == ("a dog", {})
    assert by_image.image.shape == (4, 4, 3)
    assert (by_text.prompt, by_text.image, by_text.metadata) == ("a cat", None, {"completion": "meow"})
    assert by_column.image is picture
    assert by_column.metadata == {"completion": "purr"}
    assert text_of([{"role": "assistant", "content": None}]) == ""


def test_importing_the_adapters_imports_no_framework() -> None:
    code = (
        "import sys, trainer_client.adapters.trl, trainer_client.adapters.flow_factory\n"
        "import trainer_client.advantages.formulas\n"
        "print([m for m in ('torch', 'trl', 'accelerate', 'flow_factory', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def trainer_on(functions: list[Any], tmp_path: Path, prompts: list[str], **config: Any) -> Any:
    """A real trainer of a tiny model, with `prompts` to train and to evaluate on."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(30))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    data = Dataset.from_dict({"prompt": prompts})
    return trl.GRPOTrainer(
        model=GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=32, n_embd=16, n_layer=1, n_head=2)),
        reward_funcs=functions,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=8,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            **config,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>"),
    )


@pytest.mark.filterwarnings("ignore")  # those of the trainer and what it imports
@pytest.mark.parametrize("is_async", [False, True])
def test_the_real_trainer_trains_on_them(client: CountingClient, is_async: bool, tmp_path: Path) -> None:
    seen: list[str] = []

    def drawn(prompts: Any, completions: Any, columns: Any) -> list[Sample]:
        seen.extend(completions)
        numbers = [len(set(text.split())) for text in completions]
        return [
            Sample(prompt=p, image=image_of(n), group=p, metadata={"abstain": n % 3 == 0})
            for p, n in zip(prompts, numbers, strict=True)
        ]

    functions = reward_functions(client, to_samples=drawn, is_async=is_async, num_generations=4, timeout_s=60)
    prompts = ["w1 w2", "w3 w4", "w5", "w6"]
    trainer = trainer_on(functions, tmp_path, prompts, reward_weights=reward_weights(client), max_steps=2)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/more/mean"] == pytest.approx(first["rewards/number/mean"] + 100)
    assert len(client.submitted) == 2
    assert len(seen) == 16
    shares = [len(set(text.split())) % 3 == 0 for text in seen[:8]]
    assert first["rewards/picky/failure_rate"] == pytest.approx(np.mean(shares))


@pytest.mark.filterwarnings("ignore")
def test_the_real_trainer_evaluates_in_groups_of_its_own_size(
    settings: Settings, workers: Callable[..., Any], tmp_path: Path
) -> None:
    workers("gpu")

    def drawn(prompts: Any, completions: Any, columns: Any) -> list[Sample]:
        return [Sample(image=picture) for picture in pictures_of(*range(8, 8 + 8 * len(prompts), 8))]

    with RewardClient.from_dict(RANK, "trl", settings=settings) as client:
        functions = reward_functions(client, to_samples=drawn, num_generations=4, num_generations_eval=2, timeout_s=30)
        sizes = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
        trainer = trainer_on(functions, tmp_path, ["w1", "w1"], **sizes, max_steps=1)
        assert trainer.evaluate()["eval_rewards/rank/mean"] == pytest.approx(0.25)
        trainer.train()
        assert trainer.state.log_history[-2]["rewards/rank/mean"] == pytest.approx(0.375)
