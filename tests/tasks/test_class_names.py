from __future__ import annotations

import importlib
import textwrap

import pytest

from tasks.errors import UnknownRewardError
from tasks.rewards import RewardConfig

CLASS = """
from workers import PointwiseRewardModel


class Brightness(PointwiseRewardModel):
    required_fields = ("image",)
"""


@pytest.fixture
def model_named(tmp_path, monkeypatch):
    """Loads a config that names a class, in a folder with these files; returns the name as it is in the config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(name: str, files: dict[str, str], **keys: object) -> str:
        for file, text in files.items():
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": name, **keys}}).rewards
        return spec.reward_model

    return load


@pytest.mark.parametrize(
    ("name", "files", "says"),
    [
        ("mine_a.Brightnes", {"mine_a.py": CLASS}, r"mine_a\.py has no class 'Brightnes' .did you mean 'Brightness'"),
        ("mine_b.brightness", {"mine_b.py": CLASS}, "did you mean 'Brightness'"),
        ("pack_a.Brightnes", {"pack_a/__init__.py": CLASS}, r"pack_a/__init__\.py has no class 'Brightnes'"),
        ("pack_b.sub.Brightnes", {"pack_b/__init__.py": "", "pack_b/sub.py": CLASS}, r"pack_b/sub\.py has no class"),
        ("my_reward.Brightness", {"my_rewards.py": CLASS}, r"did you mean 'my_rewards\.Brightness'"),
        (
            "pack_c.reward.Brightness",
            {"pack_c/__init__.py": "", "pack_c/rewards.py": CLASS},
            r"there is no module 'pack_c\.reward' here, .*did you mean 'pack_c\.rewards\.Brightness'",
        ),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest_one(model_named, name, files, says):
    with pytest.raises(UnknownRewardError, match=says):
        model_named(name, files)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_class_that_is_not_there_is_refused_when_the_reward_is_used(model_named, split):
    model_named("mine_c.Brightness", {"mine_c.py": CLASS})
    block = "rewards" if split == "train" else "eval_rewards"
    config = RewardConfig.from_dict({"rewards": {"reward_model": "OCR"}, block: {"reward_model": "mine_c.Contrast"}})
    with pytest.raises(UnknownRewardError, match=r"mine_c\.py has no class 'Contrast'; reward_model is"):
        config.of(split)


def test_a_class_that_a_notebook_made_is_there(model_named, monkeypatch):
    model_named("mine_f.Brightness", {"mine_f.py": CLASS})
    module = importlib.import_module("mine_f")
    monkeypatch.setattr(module, "Brightnesses", module.Brightness, raising=False)
    assert model_named("mine_f.Brightnesses", {}) == "mine_f.Brightnesses"


@pytest.mark.parametrize("block", ["rewards", "eval_rewards"])
def test_it_is_said_of_which_reward(model_named, block):
    model_named("mine_d.Brightness", {"mine_d.py": CLASS})
    rewards = [{"reward_model": "OCR"}, {"name": "looks", "reward_model": "mine_d.Brightnes"}]
    with pytest.raises(UnknownRewardError, match=rf"{block}\[1\] \(looks\)"):
        RewardConfig.from_dict({"rewards": {"reward_model": "OCR"}, block: rewards})


MAY_BE_THERE = {
    "from elsewhere": "from other import Brightness",
    "from elsewhere by another name": "from other import Luma as Brightness",
    "a star": "from other import *",
    "a function": "def Brightness(config, accelerator): ...",
    "an alias": "class Luma: ...\nBrightness = Luma",
    "one of a tuple": "Brightness, Contrast = make()",
    "annotated": "Brightness: type = make()",
    "within if": "if True:\n    class Brightness: ...",
    "within try": "try:\n    from fast import Brightness\nexcept ImportError:\n    from slow import Luma as Brightness",
    "in a handler": "try:\n    import fast\nexcept ImportError:\n    class Brightness: ...",
    "in finally": "try:\n    import fast\nfinally:\n    class Brightness: ...",
    "within for": "for Brightness in classes: ...",
    "within with": "with a() as Brightness: ...",
    "a case": "match 1:\n    case 1:\n        class Brightness: ...",
    "made by __getattr__": "def __getattr__(name): return make(name)",
    "made by globals": "globals().update(make())",
    "made by setattr": "import sys\nsetattr(sys.modules[__name__], 'Bright' + 'ness', 1)",
    "made by exec": "exec('class Brightness: ...')",
    "made in a function": "def make():\n    global Brightness\n    Brightness = 1\nmake()",
    "walrus": "print(Brightness := make())",
    "no Python of this version": "def :",
}


@pytest.mark.parametrize("how", MAY_BE_THERE)
def test_what_may_be_there_is_not_refused(model_named, how):
    module = f"may_{'_'.join(how.lower().split())}"
    assert model_named(f"{module}.Brightness", {f"{module}.py": MAY_BE_THERE[how]})


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("only_on_workers.Brightness", {}),
        ("rewards_v2.Brightness", {"rewards_v1.py": CLASS}),  # a version, no misspelling
        ("my_reword.Contrast", {"my_rewards.py": CLASS}),  # it has no such class either
        ("folder.Brightness", {"folder/data.txt": "", "folders.py": CLASS}),
    ],
)
def test_a_module_that_is_not_here_may_be_on_the_workers_host(model_named, name, files):
    assert model_named(name, files) == name


def test_whoever_says_what_the_source_would_say_needs_no_source_here(model_named):
    assert model_named("my_reward.Brightness", {"my_rewards.py": CLASS}, required_fields=["image"])
    both = {"kind": "pointwise", "required_fields": ["image"]}
    assert model_named("mine_e.Another", {"mine_e.py": CLASS}, **both)
