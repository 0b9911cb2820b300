from __future__ import annotations

import copy
import logging
import pickle
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

from tasks.errors import ModelLoadError
from tasks.settings import load_settings
from tests import reward_models
from tests.servers import ROOT, clean_env
from tests.workers.requests import call_of
from workers import RewardArguments
from workers.loading.building import build
from workers.loading.cache import ModelCache
from workers.loading.device import is_out_of_memory

OURS = "tests.reward_models."


@pytest.fixture
def models() -> ModelCache:
    return ModelCache(load_settings(modules="tests.reward_models", device="cpu"))


def load(models: ModelCache, **entry):
    with models.lend(call_of(**entry)) as loaded:
        return loaded


def error_of(models: ModelCache, **entry) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(models, **entry)
    return str(caught.value)


def test_a_class_in_an_allowed_module_is_loaded_with_its_configuration(models):
    loaded = load(models, reward_model=f"{OURS}PixelCode", name="code", add=3, dtype="fp16", batch_size=2, timeout_s=9)
    config = loaded.model.config
    assert (config.name, config.batch_size, config.timeout_s, config.add) == ("code", 2, 9.0, 3)
    assert (config.dtype_name, config.image_format) == ("float16", "raw")
    assert config.extra_kwargs == {"add": 3}
    assert type(loaded.model).__module__ == "tests.reward_models"


def test_a_constructor_that_says_very_much_is_cut_and_where_it_raised_is_told(models, monkeypatch):
    """The reason is in the outcome of each sample; torch names every weight that a file lacks."""

    class Lacking(reward_models.PixelCode):
        def __init__(self, *args):
            raise RuntimeError("missing keys: " + "layer.weight, " * 10_000)

    monkeypatch.setattr("tests.reward_models.Lacking", Lacking, raising=False)
    said = error_of(models, reward_model=f"{OURS}Lacking")
    assert said.startswith(f"reward model {OURS}Lacking cannot be loaded: RuntimeError: missing keys: layer.weight, ")
    assert said.endswith("in __init__)")
    assert len(said) < 2000


def test_a_model_knows_its_device_and_dtype(models):
    model = load(models, reward_model=f"{OURS}PixelCode", dtype="half").model
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float16


def test_the_log_says_what_a_model_that_asks_for_its_device_was_given(models, monkeypatch, caplog):
    """A worker that lost its GPU goes on on the CPU, with the same rewards and much later."""

    class OnDevice(reward_models.PixelCode):
        def __init__(self, config, accelerator):
            super().__init__(config, accelerator)
            self.weight = torch.ones(1, device=self.device)

    monkeypatch.setattr(reward_models, "OnDevice", OnDevice, raising=False)
    caplog.set_level(logging.INFO)
    load(models, reward_model=f"{OURS}OnDevice")
    load(models, reward_model=f"{OURS}PixelCode")
    said = [line for line in caplog.text.splitlines() if "loaded reward=" in line]
    assert [line.endswith(" device=cpu") for line in said] == [True, False]


@pytest.mark.parametrize("name", ["jpeg_compressibility", "JPEG_incompressibility"])
def test_a_built_in_is_loaded_whatever_modules_are_allowed(name):
    assert load(ModelCache(load_settings()), reward_model=name)


def test_one_computation_has_one_instance_and_another_has_its_own(models):
    first = load(models, reward_model=f"{OURS}PixelCode")
    assert load(models, reward_model=f"{OURS}PixelCode", name="other", weight=3) is first
    assert load(models, reward_model=f"{OURS}PixelCode", add=1) is not first
    assert models.names == (f"{OURS}PixelCode",)


def test_threads_that_ask_at_once_share_one_load(models):
    made = []

    class SlowToMake(reward_models.PixelCode):
        def __init__(self, config, accelerator):
            super().__init__(config, accelerator)
            made.append(self)
            time.sleep(0.2)

    reward_models.SlowToMake = SlowToMake
    try:
        start, seen = threading.Barrier(6), []

        def ask():
            start.wait()
            seen.append(load(models, reward_model=f"{OURS}SlowToMake"))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        del reward_models.SlowToMake
    assert len(made) == 1
    assert len(seen) == 6
    assert all(loaded is seen[0] for loaded in seen)


def test_a_model_is_said_to_be_loading_while_it_is_and_loaded_once_it_is(models, monkeypatch):
    has_begun, go = threading.Event(), threading.Event()

    class Held(reward_models.PixelCode):
        def __init__(self, config, accelerator):
            super().__init__(config, accelerator)
            has_begun.set()
            assert go.wait(30)

    monkeypatch.setattr(reward_models, "Held", Held, raising=False)
    entry = {"reward_model": f"{OURS}Held"}
    call = call_of(**entry)
    thread = threading.Thread(target=load, args=(models,), kwargs=entry)
    thread.start()
    assert has_begun.wait(30)
    assert models.loading == (call.fingerprint,)
    assert models.loaded == ()
    assert not models.is_loaded(call)
    assert models.names == ()
    go.set()
    thread.join()
    assert models.loading == ()
    assert models.loaded == (call.fingerprint,)
    assert models.is_loaded(call)
    assert models.names == (f"{OURS}Held",)


def test_a_load_that_fails_names_the_cause_and_is_not_listed(models):
    message = error_of(models, reward_model=f"{OURS}FailsToLoad")
    assert f"reward model {OURS}FailsToLoad cannot be loaded: FileNotFoundError: no weights in /nowhere" in message
    assert models.names == ()
    assert not models.is_loaded(call_of(reward_model=f"{OURS}FailsToLoad"))


def failing_model(monkeypatch, *errors):
    """A model whose next loads fail with these; counts the loads."""
    made, left = [], list(errors)

    class Mends(reward_models.PixelCode):
        def __init__(self, config, accelerator):
            super().__init__(config, accelerator)
            made.append(self)
            if left:
                raise left.pop(0)

    monkeypatch.setattr(reward_models, "Mends", Mends, raising=False)
    return made


def test_a_load_that_failed_is_not_repeated_at_once_but_later(models, monkeypatch):
    made = failing_model(monkeypatch, OSError("disk"), OSError("disk"))
    for _ in range(3):
        assert "disk" in error_of(models, reward_model=f"{OURS}Mends")
    assert len(made) == 1
    later = time.monotonic() + 61
    monkeypatch.setattr("workers.loading.cache.time.monotonic", lambda: later)
    assert "disk" in error_of(models, reward_model=f"{OURS}Mends")
    assert len(made) == 2
    monkeypatch.setattr("workers.loading.cache.time.monotonic", lambda: later + 61)
    assert load(models, reward_model=f"{OURS}Mends")
    assert len(made) == 3


@pytest.mark.parametrize("error", [SystemExit(2), KeyboardInterrupt(), MemoryError(), RuntimeError("\ud800")])
def test_a_constructor_that_raises_anything_fails_its_samples_and_not_its_thread(models, monkeypatch, error):
    failing_model(monkeypatch, error)
    assert type(error).__name__ in error_of(models, reward_model=f"{OURS}Mends")


@pytest.mark.parametrize(
    "model", ["os.system", "tests.reward_models_of_others.X", "tests.X", "workers.base.RewardModel"]
)
def test_a_module_that_is_not_allowed_is_not_imported_and_the_variable_is_named(models, model):
    message = error_of(models, reward_model=model)
    module = model.rpartition(".")[0]
    assert f"may not import {module!r}" in message
    assert f"REWARDQ_MODULES=tests.reward_models,{module}" in message
    assert "tests.reward_models_of_others" not in sys.modules


def test_nothing_is_allowed_unless_named():
    assert "REWARDQ_MODULES=tests.reward_models" in error_of(ModelCache(load_settings()), reward_model=f"{OURS}Null")


def test_what_is_below_an_allowed_package_is_allowed():
    assert load(ModelCache(load_settings(modules="tests")), reward_model=f"{OURS}Null")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("tests.reward_models.Absent", "reward_models.py has no 'Absent'"),
        ("tests.reward_models.image_of", "is no reward model; subclass workers.PointwiseRewardModel"),
        ("tests.reward_models.np", "is no reward model"),
        ("tests.reward_models.RewardModelOutput", "is no reward model"),
        ("absent_module.Mine", "No module named 'absent_module'"),
        ("tests.reward_models.deeper.Mine", "No module named 'tests.reward_models.deeper'"),
    ],
)
def test_what_cannot_be_found_is_named(model, words):
    models = ModelCache(load_settings(modules="tests.reward_models,absent_module"))
    assert words in error_of(models, reward_model=model)


def test_a_module_with_an_error_says_so(tmp_path, monkeypatch):
    (tmp_path / "my_broken_rewards.py").write_text("this is no Python\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = error_of(ModelCache(load_settings(modules="my_broken_rewards")), reward_model="my_broken_rewards.Mine")
    assert "SyntaxError" in message
    assert "my_broken_rewards" in message


def test_a_module_in_the_workers_folder_is_found(tmp_path, monkeypatch):
    text = "from workers import PointwiseRewardModel\nclass Mine(PointwiseRewardModel):\n    pass\n"
    (tmp_path / "my_rewards_of_the_folder.py").write_text(text)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    models = ModelCache(load_settings(modules="my_rewards_of_the_folder"))
    assert load(models, reward_model="my_rewards_of_the_folder.Mine").model.required_fields == ("prompt", "image")


WITHOUT = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == sys.argv[2]:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

sys.meta_path.insert(0, Blocker())
from tasks.errors import ModelLoadError
from tasks.rewards import RewardConfig
from tasks.settings import load_settings
from workers.loading.cache import ModelCache
(spec,) = RewardConfig.from_dict({"rewards": {"reward_model": sys.argv[1]}}).rewards
try:
    ModelCache(load_settings()).lend(spec.call).__enter__()
except ModelLoadError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("model", "module", "extra"),
    [
        ("OCR", "rapidocr", "ocr"),
        ("OCR", "rapidfuzz", "ocr"),
        ("OCR", "onnxruntime", "ocr"),
        ("vllm_evaluate", "openai", "judge"),
    ],
)
def test_a_missing_extra_names_the_pip_install_to_run(model, module, extra):
    command = [sys.executable, "-c", WITHOUT, model, module]
    found = subprocess.run(command, env=clean_env(), capture_output=True, text=True, cwd=ROOT, check=False)
    assert f"reward model {model} needs the module {module!r}" in found.stdout, found.stderr
    assert re.search(rf"-m pip install .*\[{extra}\]'", found.stdout), found.stdout


CONFIG = RewardArguments(name="n", extra_kwargs={"size": 3})


def test_options_are_attributes_of_the_configuration():
    assert CONFIG.size == 3
    assert not hasattr(CONFIG, "absent")
    with pytest.raises(AttributeError, match=r"no option 'absent'; given: \['size'\]"):
        _ = CONFIG.absent


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_configuration_can_be_copied(copied):
    assert copied(CONFIG) == CONFIG
    assert copied(CONFIG).size == 3


def test_a_model_is_built_with_what_the_call_says():
    model = build(call_of(reward_model=f"{OURS}TextLength"), load_settings(modules=OURS.rstrip(".")))
    assert model(["four", ""]).rewards == [4.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ("config, accelerator", "config, accelerator"),
        ("cfg, acc", "cfg, acc"),
        ("accelerator, config", "config, accelerator"),
        ("*, config, accelerator", "config, accelerator"),
        ("config, accelerator, n=1", "config, accelerator"),
        ("*both", "*both"),
        ("**named", "**named"),
        ("*both, **named", "*both, **named"),
    ],
)
def test_a_constructor_may_call_its_arguments_as_it_likes(tmp_path, monkeypatch, arguments, passed):
    (tmp_path / "my_made.py").write_text(
        "from workers import PointwiseRewardModel\n"
        "class Mine(PointwiseRewardModel):\n"
        f"    def __init__(self, {arguments}):\n"
        f"        super().__init__({passed})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_made", raising=False)
    model = build(call_of(reward_model="my_made.Mine", size=3), load_settings(modules="my_made", device="cpu"))
    assert (model.config.size, model.accelerator.device.type) == (3, "cpu")


def test_a_models_config_names_the_workers_device():
    there = load_settings(modules="tests.reward_models", device="meta")
    model = build(call_of(reward_model=f"{OURS}TensorMean"), there)
    assert (model.config.device.type, model.device.type) == ("meta", "meta")


@pytest.mark.parametrize(
    "words", ["CUDA out of memory. Tried to allocate", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when"]
)
def test_every_way_in_which_a_device_says_that_it_is_full_is_known(words):
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
