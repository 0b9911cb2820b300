from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants as constants
import huggingface_hub.file_download as file_download
import numpy as np
import open_clip
import pytest
import torch
import transformers

from tasks.errors import ModelLoadError
from tasks.rewards import RewardConfig
from tasks.settings import Settings
from tests.workers.checkpoints import ARCHITECTURE, Reference, pictures, save_clip
from tests.workers.test_clip_models import cosines
from workers import PointwiseRewardModel
from workers.loading.building import build
from workers.models.checkpoints import find_file, loading, local_or_hub, without_initialising


def why_not(model: str, **options: str) -> str:
    """The reason why a worker cannot build a built-in."""
    with pytest.raises(ModelLoadError) as caught:
        load(model, **options)
    return str(caught.value)


def load(model: str, **options: str) -> PointwiseRewardModel:
    """A built-in as a worker for the CPU builds it."""
    entry = {"reward_model": model, "dtype": "float32", **options}
    (spec,) = RewardConfig.from_dict({"rewards": entry}).rewards
    return build(spec.call, Settings(device="cpu"))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """Libraries of before version 5 and 1 remember where it was, and that they were offline."""
    start_anew = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", cache, raising=False)
    start_anew()
    yield
    start_anew()


@pytest.fixture
def offline(monkeypatch, empty_cache):
    """HF_HUB_OFFLINE=1 and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cached(offline) -> Callable[..., None]:
    """Puts a folder's files into that cache: `cached("org/name", folder, revision="v2")`."""

    def put(repository: str, folder: Path, revision: str = "main") -> None:
        in_cache = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
        commit = f"{len(revision):040x}"
        (in_cache / "refs").mkdir(parents=True, exist_ok=True)
        (in_cache / "refs" / revision).write_text(commit)
        shutil.copytree(folder, in_cache / "snapshots" / commit)

    return put


@pytest.fixture
def hub(monkeypatch, empty_cache) -> Iterator[Callable[[str], None]]:
    """A hub on loopback that answers every request by 404 with the error code it is told: `hub("RevisionNotFound")`."""
    codes = [""]

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", codes[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    yield lambda code: codes.__setitem__(0, code)
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_directory_that_does_not_exist_is_named_with_its_option_and_the_offline_variable(clip_folder):
    said = why_not("PickScore", model_name_or_path="/no/such/folder", processor_name_or_path=str(clip_folder))
    assert "model_name_or_path" in said
    assert "'/no/such/folder'" in said
    assert "HF_HUB_OFFLINE=1" in said
    said = why_not("PickScore", model_name_or_path=str(clip_folder), processor_name_or_path="./no/such")
    assert "processor_name_or_path" in said
    assert "no/such" in said


@pytest.mark.parametrize(
    ("model", "options", "option", "name"),
    [
        ("PickScore", {}, "processor_name_or_path", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("CLIP", {}, "model_name_or_path", "openai/clip-vit-large-patch14"),
        ("CLIP", {"processor_name_or_path": "a/b"}, "processor_name_or_path", "a/b"),
        ("HPSv2", {}, "checkpoint_path", "xswu/HPSv2"),
        ("aesthetic", {}, "model_name_or_path", "openai/clip-vit-large-patch14"),
        ("CLIP", {"backend": "open_clip", "model_name_or_path": "hf-hub:a/b"}, "model_name_or_path", "a/b"),
        (
            "CLIP",
            {"backend": "open_clip", "model_name_or_path": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"},
            "model_name_or_path",
            "ViT-B-32 laion2b_s34b_b79k",
        ),
    ],
)
def test_a_checkpoint_that_is_not_in_the_cache_of_a_worker_offline_says_what_to_do(
    offline, model, options, option, name
):
    said = why_not(model, **options)
    assert said.startswith(f"{option}: {name!r} cannot be loaded")
    assert "HF_HUB_OFFLINE is set on this worker" in said
    assert str(constants.HF_HUB_CACHE) in said
    if "/" in name:
        assert f"`hf download {name}`" in said


def test_a_revision_that_does_not_exist_is_named(hub, clip_folder):
    hub("RevisionNotFound")
    said = why_not("PickScore", processor_name_or_path=str(clip_folder), revision="v9")
    assert "model_name_or_path: 'yuvalkirstain/PickScore_v1' at revision 'v9' cannot be loaded" in said
    assert "v9 is not a valid git identifier" in said
    assert "HF_HUB_OFFLINE" in said
    said = why_not("CLIP", revision="v9")
    assert said.startswith("model_name_or_path: 'openai/clip-vit-large-patch14' at revision 'v9' cannot be loaded")
    said = why_not("HPSv2", revision="v9")
    assert "checkpoint_path: 'xswu/HPSv2' at revision 'v9' cannot be loaded (RevisionNotFoundError" in said


def test_a_repository_that_does_not_exist_is_named(hub, clip_folder):
    hub("RepoNotFound")
    said = why_not("PickScore", processor_name_or_path=str(clip_folder), model_name_or_path="no/such")
    assert "'no/such' cannot be loaded" in said
    assert "are the name and revision right" in said


def test_a_file_is_found_by_its_path_or_in_a_directory(tmp_path):
    file = tmp_path / "head.pth"
    file.write_bytes(b"x")
    assert find_file("checkpoint_path", str(file), "other.pth") == str(file)
    assert find_file("checkpoint_path", str(tmp_path), "head.pth") == str(file)
    with pytest.raises(ModelLoadError, match=r"holds no 'other\.pth'"):
        find_file("checkpoint_path", str(tmp_path), "other.pth")


def test_a_home_directory_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert local_or_hub("o", "~/model") == str(tmp_path / "model")
    assert local_or_hub("o", "org/name") == "org/name"


def test_broken_files_are_said_to_be_on_this_worker(tmp_path, large_clip_folder):
    file = tmp_path / "aesthetic-model.pth"
    file.write_bytes(b"<html>not found</html>")
    said = why_not("aesthetic", model_name_or_path=str(large_clip_folder), checkpoint_path=str(tmp_path))
    assert f"checkpoint_path: {str(file)!r} cannot be loaded" in said
    assert "are its files complete" in said


def test_a_file_of_weights_that_is_none_is_named_with_the_option_that_the_user_set(tmp_path):
    file = tmp_path / "HPS_v2.1_compressed.pt"
    file.write_bytes(b"<html>not found</html>")
    said = why_not("HPSv2", checkpoint_path=str(tmp_path))
    assert said.startswith(f"checkpoint_path: {str(file)!r} cannot be loaded")
    clip = {"backend": "open_clip", "pretrained": str(file)}
    assert why_not("CLIP", model_name_or_path="ViT-B-32", **clip).startswith(f"pretrained: {str(file)!r} cannot be lo")
    assert why_not("CLIP", model_name_or_path="ViT-X", **clip).startswith("model_name_or_path: 'ViT-X ")


IMAGES = pictures(3, seed=12)
PROMPTS = ["a red cat", "fog", "a red cat"]


def assert_cosines(model: PointwiseRewardModel, expected: object) -> None:
    assert np.ptp(expected) > 0.01, "inputs must matter"
    np.testing.assert_allclose(model(PROMPTS, image=IMAGES).rewards.numpy(), expected, rtol=0, atol=1e-5)


def test_a_revision_is_that_ones_weights_and_an_id_alone_those_of_main(cached, tmp_path, clip_folder):
    other = save_clip(tmp_path / "other", seed=22)
    cached("org/clip", clip_folder)
    cached("org/clip", other, revision="v2")
    for options, folder in (({}, clip_folder), ({"revision": "v2"}, other)):
        reference = Reference(folder)
        expected = [reference.cosine(p, i) for p, i in zip(PROMPTS, IMAGES, strict=True)]
        assert_cosines(load("CLIP", model_name_or_path="org/clip", **options), expected)
    assert why_not("CLIP", model_name_or_path="org/clip", revision="v3").startswith(
        "model_name_or_path: 'org/clip' at revision 'v3' cannot be loaded"
    )


def test_a_revision_is_the_models_and_not_that_of_another_repositorys_processor(cached, tmp_path, clip_folder):
    cached("org/processor", clip_folder)
    cached("org/clip", save_clip(tmp_path / "other", seed=23), revision="v2")
    reference = Reference(tmp_path / "other")
    expected = [reference.logit(p, i) / 26 for p, i in zip(PROMPTS, IMAGES, strict=True)]
    names = {"model_name_or_path": "org/clip", "processor_name_or_path": "org/processor"}
    assert_cosines(load("PickScore", revision="v2", **names), expected)


def test_an_open_clip_model_is_loaded_by_its_id_on_the_hub(cached, open_clip_folder):
    cached("org/open", open_clip_folder)
    direct, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    expected = cosines(direct, open_clip.get_tokenizer(f"local-dir:{open_clip_folder}"), preprocess, PROMPTS, IMAGES)
    assert_cosines(load("CLIP", backend="open_clip", model_name_or_path="hf-hub:org/open"), expected)


def test_an_open_clip_architecture_is_loaded_with_the_weights_of_its_tag(cached, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    architecture, tag = "ViT-B-32", "laion2b_s34b_b79k"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, ARCHITECTURE)  # a smaller one of that name
    direct, _, preprocess = open_clip.create_model_and_transforms(architecture)
    (tmp_path / "published").mkdir()
    save_file(direct.state_dict(), tmp_path / "published" / "open_clip_model.safetensors")
    cached("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", tmp_path / "published")
    expected = cosines(direct, open_clip.get_tokenizer(architecture), preprocess, PROMPTS, IMAGES)
    assert_cosines(load("CLIP", backend="open_clip", model_name_or_path=architecture, pretrained=tag), expected)


def test_one_thread_loads_at_a_time():
    inside, most = [], []

    def load() -> None:
        with loading("o", "n"):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.02)
            inside.pop()

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_layers_are_not_initialised_where_a_checkpoint_overwrites_them_and_in_no_other_thread():
    drawn = []

    def elsewhere() -> None:
        torch.manual_seed(0)
        drawn.append(torch.nn.Linear(4, 4).weight)

    state = torch.random.get_rng_state()
    with without_initialising():
        torch.nn.Linear(64, 64)
        torch.nn.init.normal_(torch.empty(3))
        torch.nn.init.trunc_normal_(torch.empty(3))
        assert torch.equal(torch.random.get_rng_state(), state)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    torch.manual_seed(0)
    assert torch.equal(torch.nn.Linear(4, 4).weight, drawn[0])
