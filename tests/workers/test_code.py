"""What a process knows of the sources that it has executed."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from tasks.errors import ModelLoadError, StaleCodeError
from tasks.settings import load_settings
from tasks.source.code import code_of, digest_of
from tests.workers.requests import call_of
from workers.loading.cache import ModelCache
from workers.loading.code import LoadedCode

CLASS = """
from workers import PointwiseRewardModel
{more}

class Mine(PointwiseRewardModel):
    value = {value}

    def __init__(self, config, accelerator):
        super().__init__(config, accelerator)
        if self.value < 0:
            raise ValueError("no such value")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's; what is imported from it is forgotten after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    finders, before = list(sys.meta_path), set(sys.modules)
    yield tmp_path
    sys.meta_path[:] = finders
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write(folder: Path, module: str, value: float, more: str = "") -> Path:
    path = folder / f"{module}.py"
    path.write_text(CLASS.format(value=value, more=more))
    return path


def models_for(*modules: str) -> ModelCache:
    return ModelCache(load_settings(modules=",".join(modules), device="cpu"))


def lent(models: ModelCache, module: str, **entry):
    """The model of the class as this trainer would ask for it now."""
    with models.lend(call_of(reward_model=f"{module}.Mine", **entry)) as loaded:
        return loaded.model


def test_a_source_is_executed_and_not_the_bytecode_of_an_earlier_one_of_its_size_and_second(folder):
    path = write(folder, "code_a", 1)
    importlib.import_module("code_a")  # leaves its bytecode behind
    del sys.modules["code_a"]
    stat = path.stat()
    write(folder, "code_a", 2)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    model = lent(models_for("code_a"), "code_a")
    assert model.value == 2


def test_a_stale_module_is_named_and_one_that_is_neither_is_named_with_its_place(folder):
    models, asked = models_for("code_b"), call_of(reward_model="code_b.Mine")
    path = write(folder, "code_b", 1)
    old = call_of(reward_model="code_b.Mine")
    assert lent(models, "code_b").value == 1
    write(folder, "code_b", 2)
    with pytest.raises(StaleCodeError, match=r"^code_b\.py changed since this worker loaded it$"):
        lent(models, "code_b")
    with models.lend(old) as loaded:  # who asked for what is loaded is served on
        assert loaded.model.value == 1
    lost = old.model_copy(update={"code": (("code_b", "0" * 16),)})
    with pytest.raises(ModelLoadError) as caught, models.lend(lost):
        pass
    assert str(path) in str(caught.value)
    assert "put the same code on both hosts" in str(caught.value)
    assert asked.code == ()


def test_one_load_serves_a_trainer_that_reads_the_source_and_one_that_cannot(folder):
    """A worker that preloads what its trainers cannot read would have the model in memory twice."""
    write(folder, "code_c", 1)
    models = models_for("code_c")
    read = call_of(reward_model="code_c.Mine", version="1")
    unread = read.model_copy(update={"code": (), "fingerprint": read.instance})
    assert read.fingerprint != unread.fingerprint
    with models.lend(read) as first, models.lend(unread) as second:
        assert first is second
    assert sorted(models.loaded) == sorted((read.fingerprint, unread.fingerprint))


def test_code_that_could_not_be_made_is_made_anew_once_it_is_mended_without_a_restart_where_none_is_needed(folder):
    (folder / "code_d.py").write_text("raise RuntimeError('half a module')\n")
    models = models_for("code_d")
    with pytest.raises(ModelLoadError, match="half a module"):
        lent(models, "code_d", version="1")
    write(folder, "code_d", 1)
    assert lent(models, "code_d", version="2").value == 1


def test_an_import_that_failed_is_tried_again_at_once_where_the_source_is_another(folder):
    path = folder / "code_k.py"
    path.write_text("def half(:\n")
    models = models_for("code_k")
    entry = {"version": "1", "queue": "gpu", "required_fields": ["prompt"]}
    with pytest.raises(ModelLoadError, match="invalid syntax"):
        lent(models, "code_k", **entry)
    write(folder, "code_k", 1)
    assert lent(models, "code_k", **entry).value == 1


@pytest.mark.parametrize("is_package_first", [False, True])
def test_a_module_that_has_become_a_package_or_the_other_way_round_is_stale(folder, is_package_first):
    package, module = folder / "code_l", folder / "code_l.py"
    entry = {"version": "1", "queue": "gpu", "kind": "pointwise", "required_fields": ["prompt"]}

    def make_package() -> None:
        package.mkdir()
        (package / "__init__.py").write_text("from .inner import Mine\n")
        write(package, "inner", 1)

    if is_package_first:
        make_package()
    else:
        write(folder, "code_l", 1)
    models = models_for("code_l")
    assert lent(models, "code_l", **entry).value == 1
    if is_package_first:
        shutil.rmtree(package)
        write(folder, "code_l", 2)
    else:
        module.unlink()
        make_package()
    with pytest.raises(StaleCodeError, match=r"code_l"):
        lent(models, "code_l", **entry)


def test_a_class_that_raises_and_is_mended_is_stale_and_not_wrong_for_good(folder):
    write(folder, "code_e", -1)
    models = models_for("code_e")
    with pytest.raises(ModelLoadError, match="no such value"):
        lent(models, "code_e")
    write(folder, "code_e", 1)
    with pytest.raises(StaleCodeError, match=r"code_e\.py changed"):
        lent(models, "code_e")


def test_a_class_that_no_trainer_has_read_gets_no_new_instance_of_outdated_code(folder):
    write(folder, "code_f", 1)
    models, call = models_for("code_f"), call_of(reward_model="code_f.Mine", version="1")
    first = call.model_copy(update={"code": (), "fingerprint": "1" * 16, "instance": "1" * 16})
    second = call.model_copy(update={"code": (), "fingerprint": "2" * 16, "instance": "2" * 16})
    with models.lend(first):
        pass
    write(folder, "code_f", 2)
    with models.lend(first) as loaded:
        assert loaded.model.value == 1
    with pytest.raises(StaleCodeError), models.lend(second):
        pass
    (folder / "code_f.py").unlink()
    with pytest.raises(StaleCodeError), models.lend(second):
        pass


BY_COMPUTED_NAMES = {
    "when asked for": """
import importlib

def __getattr__(name):
    return getattr(importlib.import_module(".in" + "ner", __name__), name)
""",
    "all at once": """
import pkgutil, sys

for found in pkgutil.iter_modules(__path__):
    __import__(f"{__name__}.{found.name}")
Mine = sys.modules[f"{__name__}.inner"].Mine
""",
}


@pytest.mark.parametrize("init", BY_COMPUTED_NAMES.values(), ids=BY_COMPUTED_NAMES.keys())
def test_a_new_version_is_not_of_old_code_where_a_package_finds_its_modules_by_computed_names(folder, init):
    package = folder / "code_m"
    package.mkdir()
    (package / "__init__.py").write_text(init)
    write(package, "inner", 1)
    models, entry = models_for("code_m"), {"queue": "gpu", "kind": "pointwise", "required_fields": ["prompt"]}
    first = call_of(reward_model="code_m.Mine", version="1", **entry)
    assert [module for module, _ in first.code] == ["code_m"]
    with models.lend(first) as loaded:
        assert loaded.model.value == 1
    assert lent(models, "code_m", version="2", **entry).value == 1
    write(package, "inner", 2)
    with models.lend(first) as loaded:  # who has its rewards of the old code is served on
        assert loaded.model.value == 1
    with pytest.raises(StaleCodeError, match=r"code_m/inner\.py"):
        lent(models, "code_m", version="3", **entry)


def test_a_module_that_was_imported_before_it_was_followed_counts_as_it_is_then(folder):
    write(folder, "code_g", 1)
    importlib.import_module("code_g")
    code = LoadedCode()
    code.follow("code_g")
    asked = code_of("code_g.Mine")
    code.check("code_g.Mine", asked)
    assert code.digest("code_g.Mine", ()) == digest_of(asked)
    write(folder, "code_g", 2)
    with pytest.raises(StaleCodeError):
        code.check("code_g.Mine", code_of("code_g.Mine"))


def test_a_part_that_only_the_trainer_has_and_the_worker_never_imports_is_no_other_code(folder):
    write(folder, "code_h", 1, more="try:\n    import code_h_extra\nexcept ImportError:\n    pass")
    extra = folder / "code_h_extra.py"
    extra.write_text("")
    call = call_of(reward_model="code_h.Mine")
    assert [module for module, _ in call.code] == ["code_h", "code_h_extra"]
    extra.unlink()
    with models_for("code_h").lend(call) as loaded:
        assert loaded.model.value == 1


def test_libraries_are_imported_as_ever(folder):
    write(folder, "code_i", 1)
    code = LoadedCode()
    code.follow("code_i.part")
    assert code.follows("code_i")
    assert not any(code.follows(name) for name in ("torch", "numpy.linalg", "tasks.source.code", "workers"))


def test_a_built_in_of_another_version_is_refused_and_after_an_upgrade_stale(tmp_path, monkeypatch):
    """A trainer that was upgraded, and a worker that was not, or not restarted."""
    models, call = ModelCache(load_settings()), call_of(reward_model="jpeg_compressibility", version="mine")
    assert call.version == "1/mine"
    with models.lend(call):
        pass
    newer = call.model_copy(update={"version": "2/mine", "fingerprint": "f" * 16, "instance": "f" * 16})
    with pytest.raises(ModelLoadError, match=r"of version 1 in the rewardq .* asks for version 2"), models.lend(newer):
        pass
    upgraded = tmp_path / "catalog.py"
    upgraded.write_text("")
    monkeypatch.setattr("workers.loading.builtin_versions._CATALOG_AT_START", {upgraded: "0" * 16})
    with pytest.raises(StaleCodeError, match="rewardq changed since this worker loaded it"), models.lend(newer):
        pass
