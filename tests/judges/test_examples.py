from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tasks.catalog import CATALOG, VLM
from tasks.errors import ConfigError
from tasks.rewards import RewardConfig
from tests.judges.scripted import MODEL, fails, says_yes
from tests.servers import run_python, worker_env

FOLDER = Path(__file__).parents[2] / "examples" / "judges"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_loads(path):
    config = RewardConfig.from_yaml(path)
    assert config.queues == (VLM,)
    for spec in (*config.rewards, *config.eval_rewards):
        assert spec.is_judge
        assert spec.options["vlm_model"]
        assert spec.timeout_s > spec.options["timeout"]


def test_there_is_one_for_each_built_in_judge_and_each_trainer():
    used = {s.reward_model for path in FILES for s in RewardConfig.from_yaml(path).rewards}
    assert used == {name for name, entry in CATALOG.items() if entry.is_judge and not entry.part}
    for trainer in ("t2i_qwen_image", "t2i_flux1", "edit_qwen_image_edit", "edit_flux1_kontext"):
        assert FOLDER / f"rational_rewards_{trainer}.yaml" in FILES


def test_one_has_training_and_evaluation_apart():
    config = RewardConfig.from_yaml(FOLDER / "train_and_eval.yaml")
    assert {s.reward_model for s in config.of("train")}.isdisjoint(s.reward_model for s in config.of("eval"))


def test_the_readme_names_every_example_and_no_other():
    text = (FOLDER / "README.md").read_text()
    assert {path.name for path in FILES} == set(re.findall(r"\]\(([\w.]+\.yaml)\)", text))


def test_flow_factorys_blocks_load_as_they_are():
    block = yaml.safe_load(
        """
        - {name: a, reward_model: rational_rewards_t2i, batch_size: 8, device: cuda, dtype: bfloat16,
           api_base_url: "http://127.0.0.1:8000/v1", api_key: EMPTY, vlm_model: RationalRewards-8B-T2I,
           max_concurrent: 8, max_retries: 5, timeout: 300, temperature: 0.1, max_tokens: 2048,
           aspects: [text_faithfulness, physical_quality, text_rendering]}
        - {name: b, reward_model: flow_factory.rewards.rational_rewards_t2i.RationalRewardsT2IRewardModel,
           api_base_url: "http://127.0.0.1:8000/v1"}
        - {name: c, reward_model: flow_factory.rewards.rational_rewards_edit.RationalRewardsEditRewardModel,
           max_retries: 3}
        - {name: d, reward_model: flow_factory.rewards.vllm_evaluate.VLMEvaluateRewardModel, vlm_model: Qwen3-VL,
           max_concurrent: 100, max_retries: 10, timeout: 60, top_logprobs: 20, canonicalize: false,
           max_cache_size: 1024}
        """
    )
    specs = RewardConfig.from_dict({"rewards": block}).rewards
    names = ["rational_rewards_t2i", "rational_rewards_t2i", "rational_rewards_edit", "vllm_evaluate"]
    assert [s.reward_model for s in specs] == names
    assert specs[0].batch_size == 4, "a judge's chunk has at most 4 samples"
    assert specs[0].fingerprint == specs[1].fingerprint, "how a judge is asked is no part of what it answers"


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("rational_rewards_t2i", {"aspects": ["image_faithfulness"]}, "option aspects"),
        ("rational_rewards_t2i", {"aspects": []}, "option aspects"),
        ("rational_rewards_t2i", {"aspect_weights": {"text_faithfulness": -1.0}}, "option aspect_weights"),
        ("rational_rewards_t2i", {"missing_aspects": "zero"}, "option missing_aspects"),
        ("rational_rewards_t2i", {"max_tokens": 0}, "option max_tokens"),
        ("rational_rewards_t2i", {"temperature": -0.1}, "option temperature"),
        ("rational_rewards_t2i", {"rubric_file": "no-such-file.txt"}, "cannot read"),
        ("rational_rewards_t2i", {"rubric_file": "x", "rubric": "y {prompt}"}, "both rubric and rubric_file"),
        ("vllm_evaluate", {"api_base_url": "localhost:8000"}, "option api_base_url"),
        ("vllm_evaluate", {"api_base_url": []}, "option api_base_url"),
        ("vllm_evaluate", {"top_logprobs": 21}, "option top_logprobs"),
        ("vllm_evaluate", {"fleet_max_concurrent": -1}, "option fleet_max_concurrent"),
        ("pairwise_judge", {"opponents": 0}, "option opponents"),
        ("pairwise_judge", {"opponents": "some"}, "option opponents"),
    ],
)
def test_a_wrong_option_is_refused_with_its_name(model, options, words):
    with pytest.raises(ValueError, match=words):
        RewardConfig.from_dict({"rewards": {"reward_model": model, **options}})


def test_a_rubric_is_cut_to_no_size_but_refused_when_it_is_a_mistake(tmp_path):
    (tmp_path / "huge.txt").write_bytes(b"x" * 300_000)
    (tmp_path / "empty.txt").write_text(" \n")
    for name, words in (("huge.txt", "is larger than"), ("empty.txt", "is empty")):
        with pytest.raises(ValueError, match=words):
            RewardConfig.from_dict({"rewards": {"reward_model": "pairwise_judge", "rubric_file": name}}, tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/dev/zero", "is larger than"),
        ("a\0b", "cannot read 'a.x00b': embedded null byte"),
        ("~nobody_of_this_name/x", "cannot read '~nobody_of_this_name/x': "),
        (".", "cannot read '.': "),
        ("latin.txt", "cannot read 'latin.txt': 'utf-8' codec"),
    ],
)
def test_a_rubric_that_cannot_be_read_is_refused_with_its_name(tmp_path, name, words):
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ConfigError, match=words):
        RewardConfig.from_dict({"rewards": {"reward_model": "pairwise_judge", "rubric_file": name}}, tmp_path)


def test_the_script_prints_rewards_and_reasons(settings, workers, judge_server, picture, tmp_path):
    server = judge_server(lambda q: says_yes(0.75) if q.number != 1 else fails(400, "no such picture"))
    workers("vlm")
    reward = {"reward_model": "vllm_evaluate", "name": "good", "api_base_url": server.url, "vlm_model": MODEL}
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": reward}))
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    score = (FOLDER / "score.py", "rewards.yaml", "a cat", "0.png", "1.png")
    done = run_python(*score, cwd=tmp_path, env=worker_env(settings, {}))
    lines = sorted(line for line in done.stdout.splitlines() if "  good  " in line)
    assert sorted(line.split("  good  ")[1] for line in lines) == [
        "0.7500",
        "failed: the judge answered 400 after 1 request: no such picture",
    ]
