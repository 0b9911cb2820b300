from __future__ import annotations

import datetime
import math
import textwrap

import pytest

from tasks.catalog import ALIASES, CATALOG
from tasks.errors import ConfigError, UnknownOptionError, UnknownRewardError
from tasks.rewards import RewardConfig, RewardSpec

MINE = "my_rewards.Mine"


def spec_of(**entry) -> RewardSpec:
    return RewardConfig.from_dict({"rewards": entry}).rewards[0]


def error_of(**entry) -> str:
    with pytest.raises(ConfigError) as caught:
        spec_of(**entry)
    return str(caught.value)


def from_text(tmp_path, text: str) -> RewardConfig:
    path = tmp_path / "rewards.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return RewardConfig.from_yaml(path)


def test_a_flow_factory_block_loads_unchanged(tmp_path):
    config = from_text(
        tmp_path,
        """
        model: {name: flux}
        rewards:
          - name: "text"
            reward_model: "OCR"
            weight: 0.5
            dtype: "bfloat16"
            device: "cuda"
            batch_size: 8
            async_reward: false
            num_workers: 2
          - name: judge
            reward_model: vllm_evaluate
            api_base_url: http://127.0.0.1:9000/v1
            vlm_model: Qwen2.5-VL
        eval_rewards:
          - reward_model: jpeg_compressibility
        """,
    )
    text, judge = config.rewards
    assert (text.name, text.reward_model, text.weight, text.batch_size) == ("text", "OCR", 0.5, 8)
    assert (text.async_reward, text.num_workers, text.queue) == (False, 2, "gpu")
    assert (judge.queue, judge.options["vlm_model"]) == ("vlm", "Qwen2.5-VL")
    assert [s.name for s in config.of("eval")] == ["jpeg_compressibility"]
    assert [s.name for s in config.of("train")] == ["text", "judge"]
    assert config.queues == ("gpu", "vlm")


def test_one_reward_may_stand_without_a_list(tmp_path):
    config = from_text(tmp_path, "rewards:\n  name: text\n  reward_model: OCR\n  batch_size: 4\n")
    assert [(s.name, s.batch_size) for s in config.rewards] == [("text", 4)]


def test_evaluation_uses_the_training_rewards_unless_given():
    config = RewardConfig.from_dict({"rewards": [{"reward_model": "OCR"}], "eval_rewards": None})
    assert config.of("eval") == config.of("train")


def test_a_name_is_the_models_unless_given_and_case_does_not_count():
    assert spec_of(reward_model="ocr").name == "OCR"
    assert spec_of(reward_model=MINE).name == MINE


@pytest.mark.parametrize("path", sorted(ALIASES))
def test_flow_factorys_dotted_paths_of_built_ins_are_ours(path):
    needed = {name: "http://localhost:1" for name, o in CATALOG[ALIASES[path]].options.items() if o.is_needed}
    assert spec_of(reward_model=path, **needed).reward_model == ALIASES[path]


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("rewards:\n", "nothing"),
        ("rewards: []\n", "needs a list"),
        ("rewards: OCR\n", "needs a list"),
        ("rewards: [OCR]\n", "rewards[0]"),
        ("reward:\n  reward_model: OCR\n", "no rewards: block; found the keys reward"),
        ("- reward_model: OCR\n", "needs a mapping"),
        ("", "found nothing"),
        ("rewards: [\n", "is no YAML"),
        ("rewards:\n  - name: a\n", "reward_model must name"),
        ("rewards:\n  - reward_model: 5\n", "reward_model must name"),
        ('rewards:\n  - reward_model: "a\\0b.C"\n', "reward_model must be one line of printable characters"),
        ("rewards:\n  - reward_model: OCR\neval_rewards: 3\n", "eval_rewards: needs a list"),
    ],
)
def test_a_file_of_another_shape_is_refused_with_its_place(tmp_path, text, needle):
    with pytest.raises(ConfigError) as caught:
        from_text(tmp_path, text)
    assert needle in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        RewardConfig.from_yaml(tmp_path / "none.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "rewards.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="is no YAML"):
        RewardConfig.from_yaml(tmp_path / "rewards.yaml")


@pytest.mark.parametrize(
    ("found", "meant"),
    [("OCRR", "OCR"), ("jpeg_compresibility", "jpeg_compressibility"), ("vlm_evaluate", "vllm_evaluate")],
)
def test_an_unknown_reward_is_refused_and_the_nearest_is_named(found, meant):
    with pytest.raises(UnknownRewardError) as caught:
        spec_of(reward_model=found)
    assert f"unknown reward model {found!r} (did you mean {meant!r}?)" in str(caught.value)


def test_an_unknown_reward_with_no_neighbour_is_told_the_built_ins():
    with pytest.raises(UnknownRewardError, match=r"OCR,.*jpeg_compressibility.*dotted path"):
        spec_of(reward_model="zzzzzzzzzzzz")


@pytest.mark.parametrize(
    ("model", "option", "meant"),
    [
        ("vllm_evaluate", "temprature", "temperature"),
        ("vllm_evaluate", "api_base", "api_base_url"),
        ("OCR", "batchsize", "batch_size"),
        ("OCR", "wieght", "weight"),
    ],
)
def test_an_unknown_option_of_a_built_in_is_refused_and_the_nearest_is_named(model, option, meant):
    with pytest.raises(UnknownOptionError) as caught:
        spec_of(reward_model=model, **{option: 1})
    assert f"has no option {option!r} (did you mean {meant!r}?)" in str(caught.value)
    with pytest.raises(UnknownOptionError):
        spec_of(reward_model=model, extra_kwargs={option: 1})


def test_a_dotted_path_takes_any_option():
    assert spec_of(reward_model=MINE, anything={"deep": [1, 2.5, None, "x"]}).options == {
        "anything": {"deep": [1, 2.5, None, "x"]}
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", "heavy"),
        ("weight", True),
        ("weight", [1.0]),
        ("batch_size", "many"),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("num_workers", 0),
        ("async_reward", "perhaps"),
        ("name", 7),
        ("name", "n" * 101),
        ("name", "two\nlines"),
        ("queue", "a queue"),
        ("queue", ""),
        ("queue", 3),
        ("version", True),
        ("version", [2]),
        ("timeout_s", 0),
        ("timeout_s", math.inf),
        ("timeout_s", True),
        ("cache", "perhaps"),
        ("dtype", "int8"),
        ("dtype", 16),
        ("image_format", "bmp"),
        ("image_format", ["raw"]),
        ("extra_kwargs", [1]),
        ("device", 0),
        ("on_failure", "ignore"),
        ("on_failure", 0.0),
        ("on_failure", {"value": "low"}),
        ("on_failure", {"value": math.nan}),
        ("on_failure", {"value": True}),
        ("on_failure", {"valeu": 0.0}),
        ("on_failure", {}),
    ],
)
@pytest.mark.parametrize("model", ["OCR", MINE])
def test_a_known_key_of_a_wrong_type_is_refused_with_its_place(model, key, value):
    message = error_of(**{"reward_model": model, "name": "mine", key: value})
    assert message.startswith("rewards[0]")
    assert key in message
    assert "ConstantOnFailure" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_logprobs", 2.5),
        ("top_logprobs", True),
        ("top_logprobs", "20"),
        ("vlm_model", 7),
        ("vlm_model", None),
        ("max_retries", [1]),
    ],
)
def test_an_option_of_a_wrong_type_is_refused_with_its_name(option, value):
    assert f"option {option}: " in error_of(reward_model="vllm_evaluate", **{option: value})


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf"])
def test_a_weight_that_is_not_finite_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"weight: .*finite"):
        from_text(tmp_path, f"rewards:\n  reward_model: OCR\n  weight: {text}\n")


def test_negative_and_zero_weights_are_weights():
    assert spec_of(reward_model="OCR", weight=-2).weight == -2.0
    assert spec_of(reward_model="OCR", weight=0).weight == 0.0


def test_a_number_that_yaml_reads_as_text_is_a_number_all_the_same(tmp_path):
    assert from_text(tmp_path, "rewards:\n  reward_model: OCR\n  weight: 1e-3\n").rewards[0].weight == 0.001


@pytest.mark.parametrize(
    ("found", "meant"),
    [
        ("bf16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("torch.float16", "float16"),
        ("FP16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("float", "float32"),
    ],
)
def test_dtypes_have_many_names(found, meant):
    assert spec_of(reward_model="OCR", dtype=found).dtype == meant


def test_dtype_is_bfloat16_unless_given():
    assert spec_of(reward_model="OCR").dtype == "bfloat16"
    assert spec_of(reward_model="OCR", dtype=None).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("found", "is_constant"), [("raise", False), ("nan", False), ({"value": 0}, True), ({"value": -1.5}, True)]
)
def test_on_failure_is_raise_nan_or_a_value(found, is_constant):
    on_failure = spec_of(reward_model="OCR", on_failure=found).on_failure
    assert (on_failure.value == found["value"]) if is_constant else (on_failure == found)
    assert spec_of(reward_model="OCR").on_failure is None


def test_the_word_nan_in_yaml_is_the_choice_and_no_number(tmp_path):
    assert from_text(tmp_path, "rewards:\n  reward_model: OCR\n  on_failure: nan\n").rewards[0].on_failure == "nan"


def test_extra_kwargs_and_further_keys_are_options_alike():
    nested = spec_of(reward_model=MINE, extra_kwargs={"size": 3}, depth=2)
    flat = spec_of(reward_model=MINE, size=3, depth=2)
    assert nested.options == {"size": 3, "depth": 2}
    assert nested.fingerprint == flat.fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"day": datetime.date(2026, 1, 1)},
        {"set": {1, 2}},
        {"big": 2**70},
        {"text": "\ud800"},
        {"by_number": {0: 1.0}},
    ],
)
def test_options_that_cannot_travel_are_refused(options):
    assert "plain data" in error_of(reward_model=MINE, **options)


def test_options_are_a_copy():
    options = {"sizes": [1, 2]}
    spec = spec_of(reward_model=MINE, **options)
    fingerprint = spec.fingerprint
    options["sizes"].append(3)
    assert spec.fingerprint == fingerprint


@pytest.mark.parametrize("key", ["sk-proj-abcdef", " ", "empty"])
def test_a_literal_api_key_is_refused_with_advice_and_not_shown(key):
    message = error_of(reward_model="vllm_evaluate", api_key=key)
    assert "api_key_env" in message
    assert "sk-proj" not in message


@pytest.mark.parametrize("key", ["EMPTY", "", "OPENAI_API_KEY"])
def test_a_key_is_named_by_its_variable(key):
    name = "api_key_env" if key == "OPENAI_API_KEY" else "api_key"
    assert spec_of(reward_model="vllm_evaluate", **{name: key}).options[name] == key


@pytest.mark.parametrize("variable", ["HOME", "AWS_SECRET_ACCESS_KEY", "REWARDQ_BROKER_URL"])
def test_a_config_cannot_name_any_variable_as_a_key(variable):
    assert "api_key_env must be" in error_of(reward_model="vllm_evaluate", api_key_env=variable)


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two rewards of the name 'OCR'"):
        RewardConfig.from_dict({"rewards": [{"reward_model": "OCR"}, {"reward_model": "ocr"}]})
    twice = [{"reward_model": "OCR", "name": "a"}, {"reward_model": "OCR", "name": "b"}]
    assert len(RewardConfig.from_dict({"rewards": twice}).rewards) == 2


def test_a_name_may_return_in_the_other_split():
    config = RewardConfig.from_dict({"rewards": {"reward_model": "OCR"}, "eval_rewards": {"reward_model": "OCR"}})
    assert config.of("eval")[0].name == config.of("train")[0].name


@pytest.mark.parametrize(
    "changed",
    [{"name": "other"}, {"weight": 3.0}, {"batch_size": 3}, {"device": "cpu"}, {"queue": "mine"}, {"timeout_s": 5},
     {"on_failure": "nan"}, {"async_reward": False}],
)  # fmt: skip
@pytest.mark.parametrize("model", ["OCR", MINE, "vllm_evaluate"])
def test_rewards_that_compute_the_same_have_one_fingerprint(model, changed):
    assert spec_of(reward_model=model, **changed).fingerprint == spec_of(reward_model=model).fingerprint


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        (MINE, {"size": 3}),
        (MINE, {"size": None}),
        (MINE, {"dtype": "float32"}),
        (MINE, {"version": "2"}),
        (MINE, {"image_format": "jpeg"}),
        ("OCR", {"version": "2"}),
        ("OCR", {"image_format": "jpeg"}),
        ("vllm_evaluate", {"temperature": 0.5}),
        ("vllm_evaluate", {"api_base_url": "http://elsewhere/v1"}),
        ("vllm_evaluate", {"question": "Is {prompt} there?"}),
        ("vllm_evaluate", {"image_format": "png"}),
    ],
)
def test_rewards_that_compute_otherwise_differ_in_fingerprint(model, changed):
    assert spec_of(reward_model=model, **changed).fingerprint != spec_of(reward_model=model).fingerprint


def test_two_classes_differ_in_fingerprint():
    assert spec_of(reward_model=MINE).fingerprint != spec_of(reward_model="my_rewards.Other").fingerprint
    assert spec_of(reward_model="OCR").fingerprint != spec_of(reward_model="jpeg_compressibility").fingerprint


def test_a_default_written_out_is_the_same_computation():
    plain = spec_of(reward_model="vllm_evaluate")
    written = spec_of(reward_model="vllm_evaluate", temperature=0, timeout=60, image_format="jpeg", api_key="EMPTY")
    assert written.fingerprint == plain.fingerprint
    assert spec_of(reward_model="OCR", image_format="raw").fingerprint == spec_of(reward_model="OCR").fingerprint


def test_dtype_does_not_count_where_the_built_in_does_not_use_it():
    assert spec_of(reward_model="OCR", dtype="float32").fingerprint == spec_of(reward_model="OCR").fingerprint


def test_the_order_of_options_does_not_count_but_their_structure_does():
    one = spec_of(reward_model=MINE, a=1, b={"x": 1, "y": 2}).fingerprint
    assert spec_of(reward_model=MINE, b={"y": 2, "x": 1}, a=1).fingerprint == one
    assert spec_of(reward_model=MINE, a={"x": 1}).fingerprint != spec_of(reward_model=MINE, a=[["x", 1]]).fingerprint
    assert spec_of(reward_model=MINE, a=1).fingerprint != spec_of(reward_model=MINE, a="1").fingerprint


def test_edited_code_is_a_new_computation_in_each_launch_unless_it_has_a_version():
    mine, versioned = spec_of(reward_model=MINE), spec_of(reward_model=MINE, version="1")
    assert mine.for_launch("a").fingerprint != mine.for_launch("b").fingerprint
    assert mine.for_launch("a").fingerprint == mine.for_launch("a").fingerprint
    assert versioned.for_launch("a").fingerprint == versioned.for_launch("b").fingerprint
    ocr = spec_of(reward_model="OCR")
    assert ocr.for_launch("a").fingerprint == ocr.for_launch("b").fingerprint


def test_a_config_stands_in_a_launch_as_a_whole():
    config = RewardConfig.from_dict({"rewards": {"reward_model": MINE}, "eval_rewards": {"reward_model": MINE}})
    a, b = config.for_launch("a"), config.for_launch("b")
    assert a.of("train")[0].fingerprint != b.of("train")[0].fingerprint
    assert a.of("eval")[0].fingerprint != b.of("eval")[0].fingerprint


def test_a_judge_that_samples_counts_the_slot_unless_its_answers_are_cached():
    assert not spec_of(reward_model="vllm_evaluate").counts_slot
    assert spec_of(reward_model="vllm_evaluate", temperature=0.7).counts_slot
    assert not spec_of(reward_model="vllm_evaluate", temperature=0.7, cache=True).counts_slot
    assert not spec_of(reward_model=MINE, temperature=0.7).counts_slot


def test_a_judge_takes_files_and_a_local_model_pixels():
    assert spec_of(reward_model="vllm_evaluate", image_format="webp").image_format == "webp"
    assert "image_format" in error_of(reward_model="vllm_evaluate", image_format="raw")
    assert "image_format" in error_of(reward_model="OCR", image_format="png")
