"""Nothing that a person wrote in a block of rewards is lost, or becomes something else, without a word."""

from __future__ import annotations

import logging
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.errors import ConfigError, UnknownOptionError, UnknownRewardError
from tasks.rewards import RewardConfig, RewardSpec

MINE = "my_rewards.Mine"


@pytest.fixture
def from_text(tmp_path: Path) -> Any:
    def load(text: str) -> RewardConfig:
        path = tmp_path / "rewards.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return RewardConfig.from_yaml(path)

    return load


def spec_of(**entry: Any) -> RewardSpec:
    return RewardConfig.from_dict({"rewards": entry}).rewards[0]


# --- keys given twice ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("rewards:\n  reward_model: OCR\n  weight: 1\n  weight: 2\n", "weight", (3, 4)),
        ("rewards:\n  - reward_model: OCR\n    name: a\n    batch_size: 4\n    name: b\n", "name", (3, 5)),
        ("rewards: {reward_model: OCR}\nrewards: {reward_model: PickScore}\n", "rewards", (1, 2)),
        ("rewards: {reward_model: OCR}\ntrain: {}\ntrain: {advantage_aggregation: sum}\n", "train", (2, 3)),
        ("rewards: {reward_model: my.Own, extra_kwargs: {size: 1,\n size: 2}}\n", "size", (1, 2)),
        ("rewards:\n  reward_model: my.Own\n  deep: [{a: {b: 1,\n  b: 2}}]\n", "b", (3, 4)),
        ("rewards: {reward_model: OCR}\neval_rewards:\n  name: a\n  name: b\n  reward_model: OCR\n", "name", (3, 4)),
        ("rewards: {reward_model: OCR}\ntrain:\n  global_std: true\n  global_std: false\n", "global_std", (3, 4)),
        ("x: &a {weight: 1}\ny: &b {weight: 2}\nrewards:\n  reward_model: OCR\n  <<: *a\n  <<: *b\n", "<<", (5, 6)),
        ("x: &a {weight: 1,\n  weight: 2}\nrewards:\n  reward_model: OCR\n  <<: *a\n", "weight", (1, 2)),
    ],
)  # fmt: skip
def test_a_key_that_is_given_twice_is_refused_with_both_lines(from_text: Any, text: str, key: str, lines: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        from_text(text)
    said = f"the key {key!r} is given twice, in line {lines[0]} and in line {lines[1]}; one of them would be lost"
    assert said in str(caught.value)
    assert "rewards.yaml: " in str(caught.value)


def test_keys_of_the_trainers_own_that_are_given_twice_are_its_business_and_said(from_text: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        config = from_text("model: {a: 1}\nmodel: {a: 2}\nrewards: {reward_model: OCR}\ntrain: {lr: 1}\n")
    assert [spec.name for spec in config.rewards] == ["OCR"]
    assert "the key 'model' is given twice, in line 1 and in line 2" in caplog.text


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"reward_model": MINE, "size": 2, "extra_kwargs": {"size": 1}}, "size"),
        ({"reward_model": MINE, "size": None, "extra_kwargs": {"size": 1}}, "size"),
        ({"reward_model": MINE, "size": 1, "extra_kwargs": {"size": 1}}, "size"),
        ({"reward_model": "vllm_evaluate", "question": "A?", "extra_kwargs": {"question": "B?"}}, "question"),
        (
            {
                "reward_model": "RemotePointwiseRewardModel",
                "server_url": "http://x:1",
                "required_fields": ["image"],
                "extra_kwargs": {"required_fields": ["video"]},
            },
            "required_fields",
        ),
    ],
)
def test_an_option_beside_extra_kwargs_and_in_it_is_refused(entry: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"rewards\[0\].*{key!r} is given twice, beside extra_kwargs and in it"):
        spec_of(**entry)


def test_what_an_anchor_brings_is_overridden_as_yaml_says(from_text: Any, caplog: Any) -> None:
    config = from_text(
        """
        defaults: &judge
          {reward_model: vllm_evaluate, api_base_url: "http://judge:8000/v1", weight: 0.5, top_logprobs: 5}
        rewards:
          - {<<: *judge, name: one}
          - {<<: *judge, name: two, weight: 2}
        """
    )
    assert [(s.name, s.weight, s.options["top_logprobs"]) for s in config.rewards] == [("one", 0.5, 5), ("two", 2.0, 5)]
    assert caplog.text == ""


def test_a_mapping_that_takes_the_place_of_an_anchors_is_said(from_text: Any, caplog: Any) -> None:
    config = from_text(
        """
        defaults: &own {reward_model: my.Own, extra_kwargs: {size: 1}}
        rewards:
          <<: *own
          extra_kwargs: {depth: 2}
        """
    )
    assert config.rewards[0].options == {"depth": 2}
    assert "line 5: extra_kwargs replaces that of <<, of which nothing is kept" in caplog.text


# --- what YAML retypes ---------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["1e-1", "1E-1", "+1e-1", ".1e0", "1.e-1", "0.1", "10.0e-2", "100e-3"])
def test_a_number_in_exponent_form_is_a_number_everywhere(from_text: Any, written: str) -> None:
    text = f"""
        rewards:
          - {{name: judge, reward_model: vllm_evaluate, temperature: {written}, weight: {written}, timeout: {written}}}
          - {{name: rubric, reward_model: rational_rewards_t2i, aspect_weights: {{text_faithfulness: {written}}}}}
          - {{name: own, reward_model: my.Own, scale: {written}, deep: [{{x: {written}}}]}}
    """
    judge, rubric, own = from_text(text).rewards
    assert (judge.weight, judge.options["temperature"], judge.options["timeout"]) == (0.1, 0.1, 0.1)
    assert rubric.options["aspect_weights"] == {"text_faithfulness": 0.1}
    assert own.options == {"scale": 0.1, "deep": [{"x": 0.1}]}
    parsed_elsewhere = RewardConfig.from_dict(yaml.safe_load(textwrap.dedent(text))).rewards
    assert (parsed_elsewhere[0].weight, parsed_elsewhere[0].options) == (judge.weight, judge.options)
    assert parsed_elsewhere[1].options == rubric.options


def test_a_whole_number_in_exponent_form_is_a_whole_number(from_text: Any) -> None:
    text = "rewards: {reward_model: rational_rewards_t2i, batch_size: 2e0, timeout_s: 1e3, max_tokens: 4e3}"
    for config in (from_text(text), RewardConfig.from_dict(yaml.safe_load(text))):
        (spec,) = config.rewards
        assert (spec.batch_size, spec.timeout_s, spec.options["max_tokens"]) == (2, 1000.0, 4000)
        assert type(spec.options["max_tokens"]) is int


@pytest.mark.parametrize("value", ["1e-1", "1.5e0", "1e400", "2e"])
def test_what_is_no_whole_number_in_exponent_form_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="option max_tokens: "):
        spec_of(reward_model="rational_rewards_t2i", max_tokens=value)


def test_an_option_of_ones_own_class_that_is_a_number_as_text_is_said(caplog: Any) -> None:
    assert spec_of(reward_model=MINE, scale="1e-3").options == {"scale": "1e-3"}
    assert "the option scale is the text '1e-3'; where a number is meant, write it with a point, 1.0e-3" in caplog.text


@pytest.mark.parametrize(
    "written", ["1", "2.0", "1.10", "on", "2026-01-01", "0x1F", "010", "1:30", "1_0", "1e3", "007"]
)
def test_a_key_whose_value_is_a_text_keeps_what_was_written(from_text: Any, written: str) -> None:
    (spec,) = from_text(
        f"""
        rewards:
          - reward_model: vllm_evaluate
            name: {written}
            version: {written}
            vlm_model: {written}
            extra_kwargs: {{question: {written}}}
        """
    ).rewards
    assert (spec.name, spec.version) == (written, written)
    assert (spec.options["vlm_model"], spec.options["question"]) == (written, written)


def test_versions_that_are_one_number_are_two_versions(from_text: Any) -> None:
    first, second = (from_text(f"rewards: {{reward_model: my.Own, version: {v}}}").rewards[0] for v in ("1.1", "1.10"))
    assert (first.version, second.version) == ("1.1", "1.10")
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(("given", "version"), [(1, "1"), (2.5, "2.5"), ("1", "1")])
def test_a_version_that_was_read_elsewhere_as_a_number_is_text(given: Any, version: str) -> None:
    assert spec_of(reward_model=MINE, version=given).version == version
    assert (
        spec_of(reward_model=MINE, version=given).fingerprint == spec_of(reward_model=MINE, version=version).fingerprint
    )


@pytest.mark.parametrize("written", ["010", "1:30", "-0_10", "190:20:30", "1:30.5"])
@pytest.mark.parametrize("key", ["batch_size", "size"])
def test_a_number_that_is_another_to_another_reader_is_refused_with_its_line(
    from_text: Any, written: str, key: str
) -> None:
    with pytest.raises(ConfigError, match=r"line 3: .*write the plain number, or put it in quotes"):
        from_text(f"rewards:\n  reward_model: my.Own\n  {key}: {written}\n")
    assert from_text(f"rewards:\n  reward_model: my.Own\n  size: '{written}'\n").rewards[0].options == {"size": written}


@pytest.mark.parametrize("written", ["007", "0", "-1", "1_000", "0x1F", "0.5"])
def test_a_number_that_every_reader_reads_alike_is_one(from_text: Any, written: str) -> None:
    assert from_text(f"rewards: {{reward_model: my.Own, size: {written}}}").rewards[0].options == {
        "size": yaml.safe_load(written)
    }


def test_a_key_that_yaml_takes_for_a_boolean_is_the_key_that_was_written(from_text: Any) -> None:
    assert from_text("rewards: {reward_model: my.Own, on: 3}").rewards[0].options == {"on": 3}
    with pytest.raises(ConfigError, match="the key True is no text; put it in quotes"):
        RewardConfig.from_dict({"rewards": {"reward_model": MINE, True: 3}})


def test_a_date_is_refused_with_what_to_write(from_text: Any) -> None:
    with pytest.raises(ConfigError, match="what YAML takes for a date goes in quotes"):
        from_text("rewards: {reward_model: my.Own, day: 2026-01-01}")
    with pytest.raises(ConfigError, match=r"rewards\.yaml cannot be read: "):
        from_text("rewards: {reward_model: my.Own, day: 2026-13-41}")


# --- keys that are nobody's ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("wieght", "weight"),
        ("Weight", "weight"),
        ("weigth", "weight"),
        ("async_rewards", "async_reward"),
        ("asnyc_reward", "async_reward"),
        ("asynch_rewards", "async_reward"),
        ("batchsize", "batch_size"),
        ("batch-size", "batch_size"),
        ("nmae", "name"),
        ("on_faliure", "on_failure"),
        ("quue", "queue"),
        ("verison", "version"),
        ("required_field", "required_fields"),
        ("timeouts_s", "timeout_s"),
        ("extra_kwarg", "extra_kwargs"),
        ("num_worker", "num_workers"),
        ("applicable_dataset", "applicable_datasets"),
    ],
)
def test_a_key_of_ours_misspelt_on_a_class_of_ones_own_is_refused(key: str, meant: str) -> None:
    with pytest.raises(UnknownOptionError) as caught:
        spec_of(reward_model=MINE, **{key: 1})
    assert f"{key!r} is no key of a reward; did you mean {meant!r}?" in str(caught.value)
    assert f"put it under extra_kwargs: {{{key}: ...}}" in str(caught.value)
    assert spec_of(reward_model=MINE, extra_kwargs={key: 1}).options == {key: 1}


@pytest.mark.parametrize(
    "key",
    [
        "weights", "names", "device_map", "height", "timeout", "timeout_ms", "type", "kernel", "model_name",
        "torch_dtype", "max_batch_size", "cached", "versions", "mode", "image_size", "num_frames", "scale", "question",
        "queues", "cues",
    ],
)  # fmt: skip
def test_a_key_that_only_resembles_one_of_ours_is_an_option_of_the_class(key: str) -> None:
    assert spec_of(reward_model=MINE, **{key: 1}).options == {key: 1}


def test_a_key_of_ours_under_extra_kwargs_reaches_the_class_and_that_is_said(caplog: Any) -> None:
    spec = spec_of(reward_model=MINE, extra_kwargs={"weight": 0.1})
    assert (spec.weight, spec.options) == (1.0, {"weight": 0.1})
    assert "weight under extra_kwargs is an option of the class" in caplog.text


@pytest.mark.parametrize("model", ["OCR", "vllm_evaluate", MINE])
def test_datasets_of_a_reward_are_refused_alike_for_built_ins_and_ones_own(model: str) -> None:
    with pytest.raises(UnknownOptionError, match=f"{model} has no option 'applicable_datasets': a reward scores every"):
        spec_of(reward_model=model, applicable_datasets=["signs"])


@pytest.mark.parametrize("key", ["eval_reward", "eval-rewards", "evalrewards", "Eval_Rewards", "reward"])
def test_a_block_of_rewards_under_a_misspelt_name_is_refused(key: str) -> None:
    config = {"rewards": {"reward_model": "OCR"}, key: [{"reward_model": "OCR"}]}
    with pytest.raises(ConfigError, match=f"the block {key!r} has rewards in it; did you mean"):
        RewardConfig.from_dict(config)


def test_blocks_of_the_trainers_own_are_let_alone() -> None:
    others = {"reward": {"scale": 1}, "eval": {"reward_model": "x"}, "eval_args": [1], 3: 4}
    assert RewardConfig.from_dict({"rewards": {"reward_model": "OCR"}, **others}).eval_rewards == ()


@pytest.mark.parametrize("key", ["advantage_agregation", "advantages_aggregation", "globl_std", "global-std"])
def test_a_misspelt_key_of_ours_in_the_trainers_block_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"train: {key!r} is read by nobody; did you mean"):
        RewardConfig.from_dict({"rewards": {"reward_model": "OCR"}, "train": {key: "sum"}})


# --- names that are not built here ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["GenEval", "geneval2_soft_tifa", "clap", "HPSv3", "a_forks_own", "ImageReward"])
def test_a_name_that_only_evaluation_uses_loads_and_is_refused_at_use(name: str) -> None:
    config = RewardConfig.from_dict(
        {"rewards": {"reward_model": "OCR"}, "eval_rewards": [{"reward_model": "OCR"}, {"reward_model": name, "x": 1}]}
    )
    assert [spec.reward_model for spec in config.of("train")] == ["OCR"]
    assert config.queues == ("gpu",)
    with pytest.raises(UnknownRewardError, match=rf"(?i)reward '{name}': {name} is not built here"):
        config.of("eval")


@pytest.mark.parametrize("name", ["PickScor", "pick_score", "OCRR", "vlm_evaluate", "PickScoreRank"])
def test_a_built_in_misspelt_is_refused_for_evaluation_too(name: str) -> None:
    with pytest.raises(UnknownRewardError, match="did you mean"):
        RewardConfig.from_dict({"rewards": {"reward_model": "OCR"}, "eval_rewards": {"reward_model": name}})


def test_an_unknown_name_that_training_uses_is_refused() -> None:
    with pytest.raises(UnknownRewardError, match="unknown reward model 'a_forks_own'"):
        spec_of(reward_model="a_forks_own")


def test_what_is_wrong_in_a_file_is_said_once_with_its_name(from_text: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        from_text("rewards:\n  - reward_model: OCR\n    weight: 1\n    weight: 2\n")
    assert str(caught.value).count(".yaml") == 1
    assert "cannot be read" not in str(caught.value)


def test_a_name_that_is_not_built_here_is_not_warned_of_as_a_class_without_source(caplog: Any) -> None:
    RewardConfig.from_dict({"rewards": {"reward_model": "OCR"}, "eval_rewards": [{"reward_model": "clap"}]})
    assert "source" not in caplog.text


def test_a_key_of_ours_within_extra_kwargs_of_a_built_in_is_said_to_belong_beside_it() -> None:
    with pytest.raises(UnknownOptionError, match="weight is a key of the reward and no option of OCR: write it beside"):
        spec_of(reward_model="OCR", extra_kwargs={"weight": 2})


def test_the_number_that_yaml_calls_nan_means_nan(from_text: Any) -> None:
    config = from_text("rewards:\n  - reward_model: OCR\n    on_failure: .nan\n")
    assert config.rewards[0].on_failure == "nan"


@pytest.mark.parametrize("key", ["[a, b]", "{a: 1}"])
@pytest.mark.parametrize("value", ["1", "{x: 1}"])
def test_a_key_that_is_no_word_is_refused_as_what_it_is(from_text: Any, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="unhashable key"):
        from_text(f"rewards:\n  - reward_model: OCR\n    ? {key}\n    : {value}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("evaluation_rewards: [{reward_model: OCR}]", "rewards in the block evaluation_rewards are not read here"),
        ("eval: {rewards: {reward_model: OCR}}", "rewards in the block eval.rewards are not read here"),
        ("advantage_aggregation: sum", "advantage_aggregation beside the block train: is not read here"),
        ("global_std: false", "global_std beside the block train: is not read here"),
    ],
)
def test_what_is_meant_for_us_and_stands_where_nobody_reads_it_is_said(
    from_text: Any, caplog: Any, text: str, words: str
) -> None:
    from_text(f"rewards:\n  - reward_model: OCR\n{text}\n")
    assert words in caplog.text


def test_other_blocks_of_the_trainers_are_its_own(from_text: Any, caplog: Any) -> None:
    from_text("rewards:\n  - reward_model: OCR\neval: {every: 5}\ndata: [1, {rewards: x}]\nmodel: {name: x}\n")
    assert caplog.text == ""


def test_an_error_of_a_key_says_once_what_was_found() -> None:
    with pytest.raises(ConfigError) as caught:
        spec_of(reward_model="OCR", weight=float("inf"))
    assert str(caught.value).endswith("weight: must be a finite number, found inf")


def test_an_option_like_a_key_of_ours_that_the_class_does_not_name_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (tmp_path / "near_rewards.py").write_text(
        "from workers import PointwiseRewardModel\n"
        "class Mine(PointwiseRewardModel):\n"
        "    def __init__(self, config, accelerator):\n"
        "        self.timeout_ms = config.extra_kwargs['timeout_ms']\n"
    )
    monkeypatch.chdir(tmp_path)
    spec_of(reward_model="near_rewards.Mine", on_fail="nan", timeout_ms=5, theirs=1)
    near, other = [record.getMessage() for record in caplog.records]
    assert near.endswith(
        "on_fail goes to the class as an option of its own, and near_rewards.py does not name it (did "
        "you mean 'on_failure'?)"
    )
    assert other.endswith("theirs goes to the class as an option of its own, and near_rewards.py does not name it")


# --- where it is wrong, and bounds ---------------------------------------------------------------

TWO = "rewards:\n  - reward_model: OCR\n  - reward_model: OCR\n    name: second\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (f"{TWO}    weight: x\n", 3, r"rewards\[1\] \(second\): weight: "),
        (f"{TWO}    wieght: 1\n", 3, r"rewards\[1\] \(second\): OCR has no option 'wieght'"),
        ("rewards:\n- reward_model: OCR\n- reward_model: OCRR\n", 3, "unknown reward model 'OCRR'"),
        ("rewards:\n- reward_model: OCR\n- reward_model: OCR\n", 1, "rewards: two rewards of the name 'OCR'"),
        (f"{TWO}eval_rewards:\n  reward_model: OCR\n  weight: x\n", 6, r"eval_rewards\[0\] \(OCR\): weight: "),
        (f"{TWO}train: {{globul_std: true}}\n", 5, "train: 'globul_std' is read by nobody"),
        (f"{TWO}train: {{global_std: 3}}\n", 5, "train: global_std must be true or false"),
        (f"{TWO}eval-rewards: [{{reward_model: OCR}}]\n", 5, "the block 'eval-rewards' has rewards in it"),
        ("x: 1\nrewards: 3\n", 2, "rewards: needs a list of rewards or one reward"),
    ],
)
def test_an_error_names_the_file_once_and_the_line(from_text: Any, text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^[^:]*\.yaml: line {line}: {words}") as caught:
        from_text(text)
    assert str(caught.value).count(".yaml") == 1


def test_a_config_that_is_no_file_has_no_lines() -> None:
    with pytest.raises(ConfigError, match=r"^rewards\[0\] \(OCR\): weight: "):
        RewardConfig.from_dict({"rewards": [{"reward_model": "OCR", "weight": "x"}]})


@pytest.mark.parametrize(
    "value",
    ["!!int ''", "!!int '_'", "!!float ''", "!!bool x", "!!timestamp x", "2001-12-14t21:59:43.10+99:99", "2026-13-41"],
)
@pytest.mark.parametrize("block", ["rewards:\n  reward_model: my.Own\n  x: ", "rewards: {reward_model: my.Own}\n\nx: "])
def test_a_text_that_is_not_what_its_tag_says_is_refused_with_its_line(from_text: Any, block: str, value: str) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.yaml cannot be read: line 3: .* cannot be read as \w+: "):
        from_text(f"{block}{value}\n")


def aliases(fan: int, depth: int, first: str = "[x]", opened: str = "") -> str:
    """Lists of lists, of which the last stands for `fan ** depth` values; with `{<<: ` mappings of merged mappings."""
    rows = [f"a0: &a0 {first}"]
    for i in range(1, depth):
        rows.append(f"a{i}: &a{i} {opened}[{', '.join([f'*a{i - 1}'] * fan)}]{'}' if opened else ''}")
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (aliases(10, 9), 6, "stands for 211111 values with its aliases, the most is 100000"),
        (aliases(10, 9, "{x: 1}", "{<<: "), 6, "stands for .* values with its aliases"),
        (aliases(1, 200), 64, "nested deeper than 64"),
        ("[" * 65 + "]" * 65, 1, "nested deeper than 64"),
        ("x: &x [*x]", 1, "an anchor is named within itself"),
        ("x: &x {<<: *x}", 1, "an anchor is named within itself"),
        ("x: [" + "1," * 100_001 + "]", 1, "more than 100000 values"),
        ("x: " + "9" * 101, 1, "a number of 101 characters, the most is 100"),
        ("x:\n  0x" + "f" * 5000, 2, "a number of 5002 characters"),
        ('x: "\\uD800"', 1, "has half of a surrogate pair"),
    ],
)
def test_a_file_that_would_take_all_memory_or_time_is_refused_with_its_line(
    from_text: Any, text: str, line: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"rewards\.yaml cannot be read: line {line}: .*{words}"):
        from_text(f"{text}\nrewards: {{reward_model: my.Own}}\n")


def test_what_aliases_stand_for_within_the_bounds_is_read(from_text: Any) -> None:
    config = from_text(f"{aliases(10, 4)}\nrewards: {{reward_model: my.Own, x: *a3, y: {'9' * 15}}}\n")
    assert config.rewards[0].options == {"x": [[[["x"]] * 10] * 10] * 10, "y": int("9" * 15)}


def test_a_file_that_is_no_rewards_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "rewards.yaml"
    path.write_bytes(b"#" * (1 << 20) + b"\nrewards: {reward_model: OCR}\n")
    with pytest.raises(ConfigError, match="has more than 1048576 bytes"):
        RewardConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="has more than 1048576 bytes"):
        RewardConfig.from_yaml("/dev/zero")


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rewards.yaml"
    for wrong in (b"\xff", b"\x00", b"\x7f"):
        path.write_bytes(b"rewards:\n\n  reward_model: " + wrong)
        with pytest.raises(ConfigError, match=r"rewards\.yaml is no YAML: line 3: "):
            RewardConfig.from_yaml(path)


def test_more_rewards_than_anybody_has_are_refused(from_text: Any) -> None:
    with pytest.raises(ConfigError, match="line 1: rewards: 201 rewards, the most is 200"):
        from_text("rewards:\n" + "".join(f"- {{reward_model: OCR, name: n{i}}}\n" for i in range(201)))


def test_a_long_value_is_cut_in_its_error(from_text: Any) -> None:
    with pytest.raises(ConfigError, match="on_failure: needs raise, nan") as caught:
        from_text(f"rewards: {{reward_model: OCR, on_failure: {'a' * 9000}}}")
    assert len(str(caught.value)) < 500
    with pytest.raises(ConfigError, match="could not determine a constructor") as caught:
        from_text(f"rewards: !{'a' * 9000} x")
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("path", ["**.C", "[a.C", "a/b.C", "HPSv2.1", "../x.C"])
def test_a_name_with_a_dot_that_is_no_dotted_path_is_refused_at_use(path: str) -> None:
    config = RewardConfig.from_dict({"rewards": {"reward_model": "OCR"}, "eval_rewards": {"reward_model": path}})
    with pytest.raises(UnknownRewardError, match="is neither a built-in nor the dotted path of a class"):
        config.of("eval")


def test_a_long_key_costs_no_time(from_text: Any) -> None:
    assert from_text(f"rewards: {{reward_model: my.Own}}\n? {'k' * 500_000}\n: 1\n").rewards
