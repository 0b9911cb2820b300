"""Options of a user's class, compared with what its source reads."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import UnknownOptionError
from tasks.rewards import RewardConfig

_numbers = itertools.count()

HEAD = "from workers import PointwiseRewardModel\n"
SCALED = """
class Mine(PointwiseRewardModel):
    def __call__(self, prompt, **kwargs):
        return [{read}] * len(prompt)
"""


@pytest.fixture
def entry_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The spec of a class `Mine` with this source and these options."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source: str, **options: Any) -> Any:
        module = f"optional_{next(_numbers)}"
        (tmp_path / f"{module}.py").write_text(HEAD + source)
        reward = {"reward_model": f"{module}.Mine", "version": "1", **options}
        return RewardConfig.from_dict({"rewards": [reward]}).rewards[0]

    return make


@pytest.mark.parametrize(
    "read",
    [
        "self.config.extra_kwargs.get('scale', 1.0)",
        "self.config.extra_kwargs['scale']",
        "self.config.extra_kwargs.pop('scale')",
        "self.config.scale",
        "getattr(self.config, 'scale', 1.0)",
        "('scale' in self.config.extra_kwargs)",
    ],
)
def test_a_misspelt_option_is_refused_with_the_name_that_the_class_reads(entry_of: Any, read: str) -> None:
    source = SCALED.format(read=read)
    assert entry_of(source, scale=2.0).options == {"scale": 2.0}
    with pytest.raises(UnknownOptionError, match=r"optional_\d+\.py reads no option 'scal'; did you mean 'scale'\?"):
        entry_of(source, scal=2.0)


def test_an_option_read_by_another_name_of_the_mapping_or_by_a_base_or_helper_counts(
    entry_of: Any, tmp_path: Path
) -> None:
    (tmp_path / "option_helper.py").write_text("def scale_of(config):\n    return config.extra_kwargs['threshold']\n")
    source = """
from option_helper import scale_of


class Base(PointwiseRewardModel):
    def __init__(self, config, accelerator):
        super().__init__(config, accelerator)
        options = config.extra_kwargs or {}
        self.scale = options.get("scale", 1.0)


class Mine(Base):
    def __call__(self, prompt, **kwargs):
        return [self.scale * scale_of(self.config)] * len(prompt)
"""
    assert entry_of(source, scale=1, threshold=2).options == {"scale": 1, "threshold": 2}
    for misspelt, meant in {"scael": "scale", "treshold": "threshold"}.items():
        with pytest.raises(UnknownOptionError, match=f"did you mean '{meant}'"):
            entry_of(source, **{misspelt: 1})


@pytest.mark.parametrize(
    "source",
    [
        SCALED.format(read="build(**self.config.extra_kwargs), self.config.extra_kwargs['scale']"),
        SCALED.format(read="[v for v in self.config.extra_kwargs.items()], self.config.scale"),
        SCALED.format(read="self.config.extra_kwargs[prompt[0]], self.config.scale"),
        SCALED.format(read="getattr(self.config, prompt[0]), self.config.scale"),
        SCALED.format(read="self.config.scale").replace("PointwiseRewardModel)", "PickScoreOfALibrary)"),
        "def f(:\n",
        "import other\nMine = other.make('scale')\n",
    ],
)
def test_where_the_source_does_not_tell_all_that_is_read_any_option_is_taken(
    entry_of: Any, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert entry_of(source, scal=2.0).options == {"scal": 2.0}
    assert "goes to the class as an option" not in caplog.text


def test_what_no_source_names_is_said_and_what_is_under_extra_kwargs_is_meant(
    entry_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = SCALED.format(read="self.config.extra_kwargs.get('scale', 1.0)")
    assert entry_of(source, extra_kwargs={"scal": 2.0}).options == {"scal": 2.0}
    assert caplog.text == ""
    assert entry_of(source, colour="red").options == {"colour": "red"}
    assert "colour goes to the class as an option of its own, and optional_" in caplog.text
