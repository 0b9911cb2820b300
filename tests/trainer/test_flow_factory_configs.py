"""Every `rewards:` and `eval_rewards:` block that Flow-Factory publishes loads unchanged (its commit a0b2bc5)."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

import tasks.rewards.parser
from tasks.errors import ConfigError, UnknownRewardError
from tasks.rewards import RewardConfig


def local(name: str, model: str, batch_size: int = 16, **more: Any) -> dict[str, Any]:
    """A reward as the examples write a local model."""
    return {
        "name": name,
        "reward_model": model,
        **more,
        "batch_size": batch_size,
        "device": "cuda",
        "dtype": "bfloat16",
    }


def pick(batch_size: int = 16, **more: Any) -> dict[str, Any]:
    return local("pick_score", "PickScore", batch_size, **more)


def rubric(kind: str, *aspects: str, max_retries: int = 5) -> dict[str, Any]:
    """A rubric judge as the examples write it."""
    name = f"rational_rewards_{kind.lower()}"
    return {
        **local(name, name, batch_size=8),
        "api_base_url": "http://127.0.0.1:8000/v1",
        "api_key": "EMPTY",
        "vlm_model": f"RationalRewards-8B-{kind}",
        "max_concurrent": 8,
        "max_retries": max_retries,
        "timeout": 300,
        "temperature": 0.1,
        "max_tokens": 2048,
        "aspects": list(aspects),
    }


T2I = rubric("T2I", "text_faithfulness", "physical_quality", "text_rendering")
EDIT = rubric("Edit", "text_faithfulness", "image_faithfulness", "physical_quality", "text_rendering")
YES_NO = {
    "name": "vllm_evaluate",
    "reward_model": "vllm_evaluate",
    "batch_size": 16,
    "api_base_url": "http://localhost:8000/v1",
    "api_key": "EMPTY",
    "vlm_model": "Qwen3-VL",
    "max_concurrent": 100,
    "max_retries": 10,
    "timeout": 60,
    "top_logprobs": 20,
    "async_reward": True,
    "num_workers": 4,
}
CLIP_AND_PICK = [local("text_alignment", "CLIP", weight=1.0), pick(weight=0.5)]
AUDIO = [
    {
        "name": "audio_text_alignment",
        "reward_model": "clap",
        "weight": 1.0,
        "batch_size": 4,
        "device": "cuda",
        "model_name_or_path": "laion/larger_clap_general",
    },
    local("audio_video_alignment", "imagebind", batch_size=4, weight=1.0, mode="audio_video"),
]


def config(rewards: Any, eval_rewards: Any = None, aggregation: str = "gdpo", global_std: bool = False) -> Any:
    blocks = {"rewards": rewards, "train": {"advantage_aggregation": aggregation, "global_std": global_std}}
    return blocks | ({} if eval_rewards is None else {"eval_rewards": eval_rewards})


EXAMPLES: dict[str, Any] = {
    "awm/lora/flux1, awm/lora/sd3_5, grpo/lora/sd3_5, grpo/lora/sd3_5/nocfg, multinode": config(
        [pick()], [pick(32)], "sum", True
    ),
    "awm/lora/flux2_klein_base, nft/lora/flux1": config([pick()], [pick(32)], "sum"),
    "crd/lora/sd3_5": config([local("ocr", "OCR", weight=1)], [local("ocr", "OCR", 32)], "sum", True),
    "dgpo/lora/sd3_5": config(
        [local("pickscore", "PickScore", weight=1.0)], [local("pickscore", "PickScore", 32)], "sum", True
    ),
    "dpo/lora/sd3_5": config([pick(64)], [pick(128)]),
    "grpo/full/flux1, flux2/t2i, qwen_image, sd3_5, wan21/t2v, wan22/t2v": config(CLIP_AND_PICK),
    "grpo/full/flux1_kontext, flux2/i2i, qwen_image_edit_plus, wan21/i2v, wan21/v2v, wan22/i2v": config(pick()),
    "grpo/full/flux2/i2i": config(pick(weight=0.5)),
    "grpo/full/flux2_klein": config([local("pick_score_rank", "PickScore_Rank", weight=1)], [pick()]),
    "grpo/full/flux2_klein_base, lora/flux2_klein, lora/wan22/t2v": config([pick(weight=1)]),
    "grpo/full/qwen_image_edit_plus, z_image_turbo": config([pick()]),
    "grpo/full/z_image, nft/full/wan22, nft/lora/wan21": config([pick()], [pick(32)]),
    "grpo/lora/flux1": config([local("pickscore_rank", "PickScore_Rank", weight=1.0)], local("pickscore", "PickScore")),
    "grpo/lora/ltx2/i2av, t2av": config(AUDIO, global_std=True),
    "grpo/lora/ltx2/t2av_pickscore": config([pick(32, weight=1.0)], global_std=True),
    "nft/full/flux1": config([local("text_alignment", "CLIP"), pick()], aggregation="sum"),
    "nft/full/flux2_klein_base": config([pick(weight=1)], [local("pickscore", "PickScore")]),
    "nft/full/z_image_turbo": config([pick()], [pick(32)], global_std=True),
    "nft/lora/flux1/rational_rewards_t2i": config([T2I]),
    "nft/lora/flux1_kontext/rational_rewards_edit": config([{**EDIT, "max_retries": 3}]),
    "nft/lora/qwen_image/rational_rewards_t2i": config([T2I], [T2I]),
    "nft/lora/qwen_image_edit_plus/rational_rewards_edit": config([EDIT], [EDIT]),
    "nft/lora/sd3_5": config([pick(weight=1)], [pick(32)], "sum"),
    "template/sd3_5/async_reward": config(
        [pick(async_reward=False), YES_NO], [pick(32, async_reward=False), YES_NO], "sum", True
    ),
}

REMOTE = "flow_factory.rewards.my_reward_remote.RemotePointwiseRewardModel"
REMOTE_GROUP = "flow_factory.rewards.my_reward_remote.RemoteGroupwiseRewardModel"
AESTHETIC = {"name": "aesthetic", "reward_model": "PickScore", "weight": 1.0, "batch_size": 16}
TEXT_ALIGN = {"name": "text_align", "reward_model": "CLIP", "weight": 0.5, "batch_size": 32}
GUIDANCE: dict[str, Any] = {
    "a built-in": {
        "rewards": [
            {
                "name": "aesthetic",
                "reward_model": "PickScore",
                "dtype": "bfloat16",
                "device": "cuda",
                "batch_size": 16,
            }
        ]
    },
    "one reward": {"rewards": {"name": "aesthetic", "reward_model": "PickScore", "batch_size": 16}},
    "one's own": {
        "rewards": [{"name": "custom", "reward_model": "flow_factory.rewards.MyPointwiseReward", "batch_size": 16}]
    },
    "several": {"rewards": [AESTHETIC, TEXT_ALIGN]},
    "gdpo": {
        "train": {"trainer_type": "grpo", "advantage_aggregation": "gdpo"},
        "rewards": [AESTHETIC, TEXT_ALIGN],
    },
    "one model twice": {
        "rewards": [
            {"name": "aesthetic_1", "reward_model": "PickScore", "batch_size": 16},
            {"name": "aesthetic_2", "reward_model": "PickScore", "batch_size": 32},
        ]
    },
    "other rewards in evaluation": {
        "rewards": [{"name": "fast_score", "reward_model": "PickScore", "batch_size": 32}],
        "eval_rewards": [{"name": "hps", "reward_model": "my_rewards.HPSv2RewardModel", "batch_size": 8}],
    },
    "async": {
        "rewards": [
            {
                "name": "remote_aesthetic",
                "reward_model": REMOTE,
                "server_url": "http://localhost:8000",
                "batch_size": 16,
                "async_reward": True,
                "num_workers": 4,
            },
            {"name": "pick_score", "reward_model": "PickScore", "batch_size": 16},
        ]
    },
    "two servers": {
        "rewards": [
            {
                "name": f"remote_reward_{i}",
                "reward_model": REMOTE,
                "server_url": f"http://localhost:{7999 + i}",
                "batch_size": 16,
                "async_reward": True,
                "num_workers": 4,
                "timeout": 60.0,
                "retry_attempts": 3,
            }
            for i in (1, 2)
        ]
    },
    "a server for groups": {
        "rewards": [
            {
                "name": "remote_ranking",
                "reward_model": REMOTE_GROUP,
                "server_url": "http://localhost:8000",
                "timeout": 60.0,
                "retry_attempts": 3,
            }
        ]
    },
    "the readme": {
        "rewards": {
            "name": "aesthetic",
            "reward_model": "PickScore",
            "batch_size": 16,
            "device": "cuda",
            "dtype": "bfloat16",
        }
    },
}


@pytest.mark.parametrize("where", [*EXAMPLES, *GUIDANCE])
def test_each_published_block_loads_unchanged(where: str, tmp_path: Path) -> None:
    given = copy.deepcopy((EXAMPLES | GUIDANCE)[where])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"model_type": "flux1"}, **given}))
    loaded = RewardConfig.from_yaml(file)
    for block, specs in (("rewards", loaded.rewards), ("eval_rewards", loaded.eval_rewards)):
        entries = given.get(block, [])
        entries = [entries] if isinstance(entries, dict) else entries
        assert [s.name for s in specs] == [e["name"] for e in entries]
        assert [s.weight for s in specs] == [e.get("weight", 1.0) for e in entries]
        assert {s.dtype for s in specs} <= {"bfloat16"}
        for spec, entry in zip(specs, entries, strict=True):
            assert spec.async_reward == entry.get("async_reward", True)
            assert spec.num_workers == entry.get("num_workers", 1)
            for key in ("vlm_model", "aspects", "server_url", "top_logprobs", "mode"):
                assert spec.options.get(key) == entry.get(key) or key not in entry
    train = given.get("train", {})
    assert loaded.advantage_aggregation == train.get("advantage_aggregation", "gdpo")
    assert loaded.global_std == train.get("global_std", True)


def test_their_paths_of_built_ins_are_ours() -> None:
    theirs = "flow_factory.rewards.pick_score.PickScoreRewardModel"
    by_path, by_name = (
        RewardConfig.from_dict({"rewards": {"reward_model": model}}).rewards[0] for model in (theirs, "pickscore")
    )
    assert by_path.reward_model == by_name.reward_model == "PickScore"
    assert by_path.fingerprint == by_name.fingerprint


def test_one_model_twice_is_one_computation() -> None:
    first, second = RewardConfig.from_dict(GUIDANCE["one model twice"]).rewards
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("model", ["clap", "ImageBind"])
def test_a_name_that_is_not_built_here_is_refused_where_it_is_used(model: str) -> None:
    loaded = RewardConfig.from_dict({"rewards": pick(), "eval_rewards": local("audio", model)})
    assert [spec.name for spec in loaded.of("train")] == ["pick_score"]
    with pytest.raises(UnknownRewardError, match=rf"reward 'audio': {model.lower()} is not built here.*dotted path"):
        loaded.of("eval")


def test_a_name_without_a_module_is_no_file_of_the_folder_one_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("")  # as `python -c` has it
    assert RewardConfig.from_dict({"rewards": local("audio", "clap")}).rewards[0].name == "audio"


def test_num_workers_is_explained_once(caplog: pytest.LogCaptureFixture) -> None:
    tasks.rewards.parser._say_whose_concurrency.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            RewardConfig.from_dict({"rewards": [pick(num_workers=4), local("other", "CLIP", num_workers=2)]})
    assert [r.getMessage() for r in caplog.records] == [
        "num_workers is accepted and not used: concurrency is the workers', celery worker --concurrency"
    ]


def test_the_launch_keeps_what_train_said() -> None:
    loaded = RewardConfig.from_dict(config(pick(), aggregation="sum")).for_launch("today")
    assert (loaded.advantage_aggregation, loaded.global_std) == ("sum", False)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"rewards": [pick(), pick()]}, "rewards: two rewards of the name 'pick_score'"),
        ({"rewards": pick(), "eval_rewards": [pick(), pick()]}, "eval_rewards: two rewards of the name 'pick_score'"),
        ({"rewards": pick(weight=float("nan"))}, r"rewards\[0\] \(pick_score\): weight: .*finite.*found nan"),
        ({"rewards": pick(weight=float("inf"))}, r"rewards\[0\] \(pick_score\): weight: .*finite.*found inf"),
        ({"rewards": pick(weight="heavy")}, r"rewards\[0\] \(pick_score\): weight: .*found 'heavy'"),
        (config(pick(), aggregation="gpdo"), "train: advantage_aggregation must be gdpo or sum, found 'gpdo'"),
        (config(pick(), global_std="yes"), "train: global_std must be true or false, found 'yes'"),  # type: ignore[arg-type]
        ({"rewards": local("audio", "clapp")}, "unknown reward model 'clapp'"),
        ({"rewards": pick(), "train": []}, r"train: needs a mapping, found list \[\]"),
        ({"rewards": pick(), "eval_rewards": False}, "eval_rewards: needs a list of rewards or one reward, found bool"),
        ({"rewards": pick(extra_kwargs="")}, "extra_kwargs must be a mapping, found str ''"),
    ],
)
def test_a_wrong_block_is_named(blocks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardConfig.from_dict(blocks)


def test_a_train_block_that_says_nothing_of_advantages_is_the_trainers() -> None:
    for train in (None, {}, {"learning_rate": 1e-4, "advantage_aggregation": None}):
        assert RewardConfig.from_dict({"rewards": pick(), "train": train}).advantage_aggregation == "gdpo"
