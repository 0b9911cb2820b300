"""What is read from the source of a class, against the class itself: known and the same, or unknown; never another."""

# ruff: noqa: E501  (a class in a line of text reads better whole)
from __future__ import annotations

import importlib
import itertools
import sys
import textwrap

import pytest

from tasks.errors import ConfigError
from tasks.rewards import SAMPLE_FIELDS, RewardConfig
from tasks.source.declared import declared_by
from tasks.source.lineage import OUR_VALUES
from workers import RewardModel

numbers = itertools.count()

HEAD = "from workers import GroupwiseRewardModel, PointwiseRewardModel, RewardModel, RewardModelOutput\n"
HELPERS = """
from workers import PointwiseRewardModel

COMMON = ("prompt", "image")
WITH_METADATA = (*COMMON, "metadata")
NAMES = ["video"]


class Shared(PointwiseRewardModel):
    required_fields = WITH_METADATA


class Mixin:
    required_fields = ("prompt", "audio")
    optional_fields = ("metadata",)
"""
"""What a class of the user's may import, plainly written."""

TRICKS = """
from workers import PointwiseRewardModel


class Meta(type):
    def __new__(meta, name, bases, body):
        return super().__new__(meta, name, bases, {**body, "required_fields": ("prompt", "audio")})


class Subclassing(PointwiseRewardModel):
    def __init_subclass__(cls, **kw):
        cls.required_fields = ("prompt", "video", "metadata")


def decorated(cls):
    cls.required_fields = ("prompt", "video", "metadata")
    return cls


def make():
    return type("Made", (PointwiseRewardModel,), {"required_fields": ("prompt", "metadata")})
"""
"""The same, with what happens while it runs."""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's, in which `HELPERS` and `TRICKS` stand for those above; gives its name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    made = []

    def write(body: str) -> str:
        number = next(numbers)
        helpers, tricks, name = f"helpers_{number}", f"tricks_{number}", f"rewards_{number}"
        made.extend((helpers, tricks, name))
        (tmp_path / f"{helpers}.py").write_text(HELPERS)
        (tmp_path / f"{tricks}.py").write_text(TRICKS)
        text = textwrap.dedent(body).replace("HELPERS", helpers).replace("TRICKS", tricks)
        (tmp_path / f"{name}.py").write_text(HEAD + text)
        importlib.invalidate_caches()
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


def said_by(value):
    """What an attribute of the class itself says."""
    value = value() if callable(value) else value
    return (value,) if isinstance(value, str) else tuple(value)


KNOWN = [
    'class Mine(PointwiseRewardModel):\n    required_fields = ("prompt", "metadata")',
    'class Mine(PointwiseRewardModel):\n    required_fields = ["prompt", "metadata"]',
    'class Mine(PointwiseRewardModel):\n    required_fields = "video"',
    'class Mine(PointwiseRewardModel):\n    required_fields: tuple[str, ...] = ("prompt", "metadata")',
    "class Mine(PointwiseRewardModel):\n    required_fields: tuple[str, ...]",
    "class Mine(PointwiseRewardModel):\n    pass",
    "class Mine(GroupwiseRewardModel):\n    pass",
    'C = ("prompt", "image")\nclass Mine(PointwiseRewardModel):\n    required_fields = C + ("metadata",)',
    'C = ("prompt", "image")\nclass Mine(PointwiseRewardModel):\n    required_fields = (*C, "metadata")',
    'C = ("prompt", "image")\nclass Mine(PointwiseRewardModel):\n    required_fields = C',
    'class Mine(PointwiseRewardModel):\n    required_fields = tuple(["prompt", "metadata"])',
    'class Mine(PointwiseRewardModel):\n    _C = ("prompt",)\n    required_fields = _C + ("metadata",)',
    'class Mine(PointwiseRewardModel):\n    required_fields = ("prompt",)\n    required_fields += ("metadata",)',
    'class Mine(PointwiseRewardModel):\n    required_fields = PointwiseRewardModel.required_fields + ("metadata",)',
    'class A(PointwiseRewardModel):\n    required_fields = ("audio",)\nclass Mine(A):\n    pass',
    "from HELPERS import COMMON\nclass Mine(PointwiseRewardModel):\n    required_fields = COMMON",
    "import HELPERS as h\nclass Mine(PointwiseRewardModel):\n    required_fields = h.WITH_METADATA",
    "from HELPERS import Shared\nclass Mine(Shared):\n    pass",
    "from HELPERS import Shared as Mine",
    "import HELPERS\nMine = HELPERS.Shared",
    "class A(PointwiseRewardModel):\n    required_fields = ('metadata',)\nMine = A",
    "_G = GroupwiseRewardModel\nclass Mine(_G):\n    required_fields = ('metadata',)",
    "from HELPERS import Mixin\nclass Mine(Mixin, PointwiseRewardModel):\n    pass",
    "from HELPERS import Mixin\nclass Mine(PointwiseRewardModel, Mixin):\n    pass",
    "import abc\nclass Mine(PointwiseRewardModel, abc.ABC):\n    optional_fields = ('metadata',)",
    'import workers\nclass Mine(workers.PointwiseRewardModel):\n    required_fields = ("video",)',
    "from typing import Generic, TypeVar\nT = TypeVar('T')\nclass Mine(PointwiseRewardModel, Generic[T]):\n    pass",
    'class Top(PointwiseRewardModel):\n    required_fields = ("audio",)\n'
    'class L(Top):\n    pass\nclass R(Top):\n    required_fields = ("video",)\nclass Mine(L, R):\n    pass',
]
"""Ways to say it that are read."""

UNKNOWN = [
    'C = ("prompt",)\nC += ("metadata",)\nclass Mine(PointwiseRewardModel):\n    required_fields = C',
    'C = ["prompt"]\nC.append("metadata")\nclass Mine(PointwiseRewardModel):\n    required_fields = C',
    "from HELPERS import NAMES\nclass Mine(PointwiseRewardModel):\n    required_fields = NAMES + ['metadata']",
    'class Mine(PointwiseRewardModel):\n    if True:\n        required_fields = ("prompt", "metadata")',
    "class Mine(PointwiseRewardModel):\n    for required_fields in [('prompt',), ('metadata',)]:\n        pass",
    'class Mine(PointwiseRewardModel):\n    try:\n        required_fields = ("metadata",)\n    finally:\n        pass',
    'import contextlib\nclass Mine(PointwiseRewardModel):\n    with contextlib.nullcontext(("video",)) as required_fields:'
    "\n        pass",
    'class Mine(PointwiseRewardModel):\n    required_fields, other = ("prompt", "metadata"), 1',
    "class Mine(PointwiseRewardModel):\n    other = (required_fields := ('metadata',))",
    'class Mine(PointwiseRewardModel):\n    required_fields = ["prompt"]\n    required_fields.append("metadata")',
    'class Mine(PointwiseRewardModel):\n    required_fields = tuple(f"{a}" for a in ("prompt", "metadata"))',
    'class Mine(PointwiseRewardModel):\n    required_fields = ("prompt", "metadata") if True else ()',
    'class Mine(PointwiseRewardModel):\n    required_fields = {"metadata": 1}.keys()',
    "class Mine(PointwiseRewardModel):\n    exec(\"required_fields = ('metadata',)\")",
    "class Mine(PointwiseRewardModel):\n    @property\n    def required_fields(self):\n        return ('metadata',)",
    "class Mine(PointwiseRewardModel):\n    def required_fields(self):\n        return ('metadata',)",
    "class Mine(PointwiseRewardModel):\n    @classmethod\n    def required_fields(cls):\n        return ('metadata',)",
    "class Mine(PointwiseRewardModel):\n    def __init__(self, *a):\n        self.required_fields = ('metadata',)",
    "class Mine(PointwiseRewardModel):\n    def __init__(self, *a):\n        vars(self).update(required_fields=['metadata'])",
    "class Mine(PointwiseRewardModel):\n    def __getattribute__(self, name):\n        return ('metadata',)",
    'class Mine(PointwiseRewardModel):\n    pass\nMine.required_fields = ("prompt", "metadata")',
    'class Mine(PointwiseRewardModel):\n    pass\nMine.required_fields += ("metadata",)',
    'class Mine(PointwiseRewardModel):\n    required_fields = ["prompt"]\nMine.required_fields.append("metadata")',
    'class Mine(PointwiseRewardModel):\n    pass\nsetattr(Mine, "required_fields", ("metadata",))',
    "from TRICKS import decorated\n@decorated\nclass Mine(PointwiseRewardModel):\n    pass",
    "from TRICKS import Meta\nclass Mine(PointwiseRewardModel, metaclass=Meta):\n    pass",
    "from TRICKS import Subclassing\nclass Mine(Subclassing):\n    pass",
    "from TRICKS import make\nMine = make()",
    "from TRICKS import make\nclass Mine(make()):\n    pass",
    "from HELPERS import *\nclass Mine(Shared):\n    pass",
    "from HELPERS import Shared as Mine\nMine.required_fields = ('metadata',)",
    "if True:\n    class Mine(PointwiseRewardModel):\n        required_fields = ('metadata',)",
    "class Mine(PointwiseRewardModel):\n    pass\nclass Mine(PointwiseRewardModel):\n    required_fields = ('metadata',)",
    "class A(PointwiseRewardModel):\n    pass\nMine = A\nMine.required_fields = ('metadata',)",
    "try:\n    from HELPERS import Mixin\nexcept ImportError:\n    Mixin = object\nclass Mine(Mixin, PointwiseRewardModel):"
    "\n    pass",
    "class Mine(PointwiseRewardModel):\n    required_fields = ('prompt',)\n    del required_fields\n"
    "    required_fields = make() if False else ('metadata',)",
]
"""Ways that only Python can follow."""


@pytest.mark.parametrize("source", KNOWN)
def test_what_is_plainly_written_is_read_as_python_reads_it(module, source):
    name = module(source)
    declared = declared_by(f"{name}.Mine")
    cls = importlib.import_module(name).Mine
    assert set(declared.required_fields) == set(said_by(cls.required_fields))
    assert declared.optional_fields == said_by(cls.optional_fields)
    assert declared.queue is None
    assert declared.unread_queue == ""
    assert declared.kind == ("groupwise" if "Groupwise" in source else "pointwise")


@pytest.mark.parametrize("source", UNKNOWN)
def test_what_only_python_can_follow_is_unknown_and_everything_travels(module, source):
    name = module(source)
    declared = declared_by(f"{name}.Mine")
    assert declared.required_fields is None
    (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": f"{name}.Mine"}}).rewards
    assert (spec.fields, spec.required) == (SAMPLE_FIELDS, ())
    cls = importlib.import_module(name).Mine
    made = object.__new__(cls)
    if "__init__" in vars(cls):
        made.__init__()
    assert said_by(made.required_fields) != ("prompt", "image"), "the class itself says something else than the usual"


@pytest.mark.parametrize("source", [s.replace("required_fields", "optional_fields") for s in UNKNOWN[:22]])
def test_optional_fields_are_read_alike(module, source):
    assert declared_by(f"{module(source)}.Mine").optional_fields is None


@pytest.mark.parametrize(
    ("source", "queue"),
    [
        ("class Mine(PointwiseRewardModel):\n    queue = 'old'", "old"),
        ("Q = 'old'\nclass Mine(PointwiseRewardModel):\n    queue = Q", "old"),
        ("Q = 'old'\nclass Mine(PointwiseRewardModel):\n    queue = Q + '_ocr'", "old_ocr"),
        ("class A(PointwiseRewardModel):\n    queue = 'old'\nclass Mine(A):\n    pass", "old"),
        ("class Mine(PointwiseRewardModel):\n    def __init__(self):\n        self.queue = []", "gpu"),
        ("from HELPERS import Shared\nclass Mine(Shared):\n    pass", "gpu"),
    ],
)
def test_a_queue_that_can_be_read_is_the_rewards(module, source, queue, caplog):
    (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": f"{module(source)}.Mine"}}).rewards
    assert spec.queue == queue
    assert "is sent to the queue" not in caplog.text


@pytest.mark.parametrize(
    "source",
    [
        "import os\nclass Mine(PointwiseRewardModel):\n    queue = os.environ.get('Q', 'old')",
        "class Mine(PointwiseRewardModel):\n    queue = f'old_{1}'",
        "class Mine(PointwiseRewardModel):\n    if True:\n        queue = 'old'",
        "class Mine(PointwiseRewardModel):\n    queue = 7",
        "class Mine(PointwiseRewardModel):\n    @property\n    def queue(self):\n        return 'old'",
        "class Mine(PointwiseRewardModel):\n    pass\nMine.queue = 'old'",
        "class A(PointwiseRewardModel):\n    pass\nB = A\nB.queue = 'old'\nclass Mine(B):\n    pass",
        "class Mine(PointwiseRewardModel):\n    pass\nsetattr(Mine, 'queue', 'old')",
    ],
)
def test_a_queue_that_is_assigned_and_cannot_be_read_is_asked_for(module, source):
    reward = {"reward_model": f"{module(source)}.Mine"}
    with pytest.raises(ConfigError, match=r"names a queue in a way that cannot be read.*queue: its_name"):
        RewardConfig.from_dict({"rewards": reward})
    assert RewardConfig.from_dict({"rewards": {**reward, "queue": "old"}}).rewards[0].queue == "old"


@pytest.mark.parametrize(
    "source",
    [
        "from no_such_library import Base\nclass Mine(Base, PointwiseRewardModel):\n    required_fields = ('image',)",
        "from TRICKS import make\nMine = make()",
        "from TRICKS import make\nclass Mine(make()):\n    pass",
    ],
)
def test_where_a_queue_may_be_named_out_of_sight_the_usual_one_is_said_once(module, source, caplog):
    reward = {"reward_model": f"{module(source)}.Mine"}
    for _ in range(2):
        assert RewardConfig.from_dict({"rewards": reward}).rewards[0].queue == "gpu"
    assert caplog.text.count("is sent to the queue gpu: whether it names another cannot be read") == 1
    caplog.clear()
    RewardConfig.from_dict({"rewards": {**reward, "queue": "gpu"}})
    assert not caplog.text


def test_a_class_whose_source_is_not_here_is_said_to_be_sent_to_the_usual_queue(caplog):
    reward = {"reward_model": f"only_on_the_worker_{next(numbers)}.Mine"}
    assert RewardConfig.from_dict({"rewards": reward}).rewards[0].queue == "gpu"
    assert "its source is not here" in caplog.text


def test_what_a_call_names_travels_without_being_declared_where_it_is_small(module):
    name = module(
        """
        class Mine(PointwiseRewardModel):
            required_fields = ("prompt", "audio")

            def __call__(self, prompt, audio, audio_sample_rate=None, metadata=None, video=None):
                ...
        """
    )
    (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": f"{name}.Mine"}}).rewards
    assert spec.fields == ("prompt", "audio", "metadata", "sample_rate")
    assert spec.required == (("audio",),)


def test_what_a_call_looks_up_in_its_kwargs_travels_too(module):
    name = module(
        """
        class Mine(PointwiseRewardModel):
            required_fields = ("prompt",)

            def __call__(self, prompt, **kwargs):
                def rows():
                    return kwargs.get("metadata")
                return rows()

        class Other(PointwiseRewardModel):
            required_fields = ("prompt",)

            def __call__(self, prompt, **kwargs):
                "Not of metadata."

        class Fixed(PointwiseRewardModel):
            required_fields = ("prompt",)

            def __call__(self, prompt, kwargs=None):
                return "metadata"
        """
    )
    entries = [{"name": own, "reward_model": f"{name}.{own}"} for own in ("Mine", "Other", "Fixed")]
    fields = [spec.fields for spec in RewardConfig.from_dict({"rewards": entries}).rewards]
    assert fields == [("prompt", "metadata"), ("prompt",), ("prompt",)]


def test_the_numbers_of_media_travel_with_them_under_flow_factorys_names_too(module):
    name = module("class Mine(PointwiseRewardModel):\n    required_fields = ('video', 'audio_sample_rate')")
    (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": f"{name}.Mine"}}).rewards
    assert set(spec.fields) == {"video", "fps", "sample_rate"}
    (given,) = RewardConfig.from_dict(
        {"rewards": {"reward_model": f"{name}.Mine", "required_fields": ["prompt", "frame_rate"]}}
    ).rewards
    assert given.fields == ("prompt", "fps")


@pytest.mark.parametrize("fields", [["images"], [7], 7, {"image": 1}, "images"])
def test_fields_that_are_none_are_refused_with_what_there_is(fields):
    with pytest.raises(ConfigError, match=r"no field 'images' \(did you mean 'image'\?\)|must be a list of fields"):
        RewardConfig.from_dict({"rewards": {"reward_model": "nowhere.Mine", "required_fields": fields}})


def test_what_python_warns_of_in_the_users_code_is_no_warning_of_the_trainers(module):
    name = module("class Mine(PointwiseRewardModel):\n    required_fields = ('image',)\n    pattern = '\\d'")
    assert declared_by(f"{name}.Mine").required_fields == ("image",)


def test_a_class_that_was_edited_is_read_anew(module, tmp_path):
    name = module("class Mine(PointwiseRewardModel):\n    required_fields = ('image',)")
    assert declared_by(f"{name}.Mine").required_fields == ("image",)
    (tmp_path / f"{name}.py").write_text(HEAD + "class Mine(PointwiseRewardModel):\n    required_fields = ('audio',)")
    assert declared_by(f"{name}.Mine").required_fields == ("audio",)


def test_a_package_goes_before_a_module_of_its_name_as_for_python(module, tmp_path):
    name = module("class Mine(PointwiseRewardModel):\n    required_fields = ('image',)")
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import Mine as Inner\n\n\nclass Mine(Inner):\n    pass\n")
    (package / "inner.py").write_text(HEAD + "class Mine(PointwiseRewardModel):\n    required_fields = ('audio',)")
    assert importlib.import_module(name).Mine.required_fields == ("audio",)
    assert declared_by(f"{name}.Mine").required_fields == ("audio",)


@pytest.mark.parametrize("text", ["this is no Python", "x = (" * 300, "a\0b", "é = 1"])
def test_a_module_that_cannot_be_read_is_unknown(module, tmp_path, text):
    name = module("")
    (tmp_path / f"{name}.py").write_bytes(text.encode("latin-1"))
    assert declared_by(f"{name}.Mine") is None


def test_our_own_base_class_declares_what_is_taken_for_its():
    assert {name: getattr(RewardModel, name) for name in OUR_VALUES} == OUR_VALUES
