from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings

import pytest

from tasks.settings import load_settings
from tests.reward_models import image_of
from tests.workers.requests import call_of
from trainer_client import RewardClient, Sample
from workers.loading import load_warnings
from workers.loading.cache import ModelCache
from workers.loading.load_warnings import MAX_SAID, MAX_SAID_CHARS, Said, in_short, listening, note

pytestmark = pytest.mark.filterwarnings("default")  # else Python's warnings would be raised where they are given


@pytest.fixture
def library():
    """A logger that keeps what it says to itself, as transformers' does; what its handler shows is in `.shown`."""
    logger = logging.getLogger("transformers")
    before = logger.propagate, logger.level, list(logger.handlers)
    shown: list[str] = []

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    logger.handlers, logger.propagate = [Shown()], False
    logger.setLevel(logging.WARNING)
    logger.shown = shown
    yield logger
    logger.propagate, logger.level, logger.handlers = before
    del logger.shown


def global_state() -> tuple:
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in load_warnings.LIBRARIES)]
    return (
        warnings.showwarning,
        [(logger.name, logger.level, list(logger.handlers)) for logger in loggers],
        [handler.filters[:] for logger in loggers for handler in logger.handlers],
    )


def test_what_a_thread_is_warned_of_is_heard_whatever_way_it_comes(library):
    with listening() as heard:
        logging.getLogger("transformers.modeling_utils").warning("newly %s", "initialized")
        logging.warning("to the root")  # as open_clip does
        warnings.warn("in Python's way", UserWarning, stacklevel=1)
        logging.getLogger("a_library_of_the_users").error("an error")
        logging.getLogger("transformers").info("not a warning")
    assert heard == [
        Said("transformers.modeling_utils", "newly initialized"),
        Said("root", "to the root"),
        Said("UserWarning", "in Python's way"),
        Said("a_library_of_the_users", "an error"),
    ]
    assert library.shown == ["newly initialized"]


def test_other_threads_are_not_heard_and_their_warnings_go_where_they_went(library, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))

    def elsewhere() -> None:
        logging.getLogger("transformers").warning("of another model")
        warnings.warn("of another thread", UserWarning, stacklevel=1)

    with listening() as heard:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        warnings.warn("of this one", UserWarning, stacklevel=1)
    assert heard == [Said("UserWarning", "of this one")]
    assert library.shown == ["of another model"]
    assert shown == ["of another thread"]


def test_two_threads_that_listen_at_once_hear_each_their_own():
    both, found = threading.Barrier(2), {}

    def load(name: str) -> None:
        with listening() as heard:
            both.wait(30)
            logging.getLogger("timm").warning(name)
            warnings.warn(name, UserWarning, stacklevel=1)
            both.wait(30)
        found[name] = heard

    before = global_state()
    threads = [threading.Thread(target=load, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [Said("timm", name), Said("UserWarning", name)] for name in ("one", "other")}
    assert global_state() == before


def test_what_is_said_once_a_process_is_heard_at_each_load():
    from transformers.utils import logging as of_transformers

    logger = of_transformers.get_logger("transformers.models.clip")

    def load() -> list[Said]:
        with listening() as heard:
            logger.warning_once("said once")
            warnings.warn("shown once", UserWarning, stacklevel=1)
        return heard

    assert load() == load() == [Said("transformers.models.clip", "said once"), Said("UserWarning", "shown once")]


def test_a_library_that_was_told_to_be_quiet_is_heard_and_stays_quiet(library):
    library.setLevel(logging.ERROR)  # TRANSFORMERS_VERBOSITY=error
    with listening() as heard:
        library.warning("other numbers")
        library.error("an error")
    assert [said.text for said in heard] == ["other numbers", "an error"]
    assert library.shown == ["an error"]
    library.warning("later")
    assert library.shown == ["an error"]
    assert library.level == logging.ERROR


def test_afterwards_all_is_as_it_was():
    before = global_state()
    with listening(), listening():
        assert global_state() != before
        with contextlib.suppress(RuntimeError), listening():
            raise RuntimeError("a constructor's")
        assert global_state() != before
    assert global_state() == before


def test_the_inner_of_two_that_listen_hears_first_and_the_outer_what_it_leaves():
    with listening() as outer:
        with listening() as inner:
            note("a remark")
            logging.getLogger("timm").warning("seen to")
            inner[:] = [said for said in inner if said.text != "seen to"]
        logging.getLogger("timm").warning("after")
    assert [said.text for said in inner] == ["a remark"]
    assert [said.text for said in outer] == ["a remark", "after"]
    note("nobody listens")


def test_an_outcome_holds_each_warning_once_in_few_words():
    assert in_short([]) == ()
    said = [Said("a", "\x1b[1mone\x1b[0m\n  line"), Said("b", "one line"), Said("c", "x" * 1000)]
    assert in_short(said) == ("one line", "x" * (MAX_SAID_CHARS - 3) + "...")
    many = in_short([Said("a", str(i)) for i in range(MAX_SAID + 3)])
    assert many == (*map(str, range(MAX_SAID)), "and 3 more, in the worker's log")


def test_what_a_class_of_the_users_is_warned_of_while_it_is_made_is_logged_once_and_in_its_outcomes(workers, settings):
    (worker,) = workers("gpu", env={"REWARDQ_MODULES": "tests.workers.warning_models,tests.reward_models"})
    names = ("tests.workers.warning_models.Warned", "tests.reward_models.TextLength")
    config = {"rewards": [{"name": name.rpartition(".")[2], "reward_model": name} for name in names]}
    with RewardClient.from_dict(config, "warned", settings=settings) as client:
        client.submit([Sample(prompt=prompt, image=image_of(i)) for i, prompt in enumerate(("a cat", "a dog"))])
        batch = client.collect(timeout_s=60)
    recorded = ["Some weights were newly initialized: ['head.weight']", "the moon is full"]
    assert [info["origin"].get("load_warnings") for info in batch.info["Warned"]] == [recorded] * 2
    assert [info["origin"].get("load_warnings") for info in batch.info["TextLength"]] == [None] * 2
    lines = [line.partition("] ")[2] for line in worker.log_text.splitlines() if "load warning" in line]
    assert lines == [
        f"load warning reward={names[0]} from=UserWarning said={recorded[0]}",
        f"load warning reward={names[0]} from=transformers.modeling_utils said={recorded[1]}",
    ]
    assert "Loading weights: 100%" in worker.log_text, "it is shown as ever"


def test_what_the_import_of_a_module_warns_of_is_not_its_models(tmp_path, monkeypatch):
    (tmp_path / "rewards_that_warn.py").write_text(
        "import warnings\nfrom workers import PointwiseRewardModel\n"
        "warnings.warn('of the module', UserWarning)\nclass Mine(PointwiseRewardModel):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    models = ModelCache(load_settings(modules="rewards_that_warn"))
    with (
        warnings.catch_warnings(record=True) as shown,
        models.lend(call_of(reward_model="rewards_that_warn.Mine")) as one,
    ):
        assert one.load_warnings == ()
    assert [str(warning.message) for warning in shown] == ["of the module"]
    assert "rewards_that_warn" in sys.modules
