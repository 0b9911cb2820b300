from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as constants
import pytest
import torch

from tasks.errors import ModelLoadError
from tasks.rewards import RewardConfig
from tasks.settings import Settings
from workers.loading import build
from workers.models.checkpoints import find_file, loading, local_or_hub, without_initialising


def why_not(model: str, **options: str) -> str:
    """The reason why a worker cannot build a built-in."""
    (spec,) = RewardConfig.from_dict({"rewards": {"reward_model": model, **options}}).rewards
    with pytest.raises(ModelLoadError) as caught:
        build(spec.call, Settings(device="cpu"))
    return str(caught.value)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """HF_HUB_OFFLINE=1 and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Callable[[str], None]]:
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
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
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
        ("CLIP", {}, "processor_name_or_path", "openai/clip-vit-large-patch14"),
        ("HPSv2", {}, "checkpoint_path", "xswu/HPSv2"),
        ("aesthetic", {}, "processor_name_or_path", "openai/clip-vit-large-patch14"),
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
