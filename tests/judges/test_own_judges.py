"""Options of a judge of the user's own, made of a built-in: the trainer cannot check them, so the worker does."""

from __future__ import annotations

import pytest

from tasks.errors import ModelLoadError
from workers import Accelerator, RewardArguments
from workers.judges.rational import RationalT2I
from workers.judges.yes_no import YesNoJudge
from workers.remote.models import RemotePointwiseRewardModel


class Sure(YesNoJudge):
    """A judge with an option of its own."""

    def read(self, reply):
        reward, info = super().read(reply)
        return reward * self.options.get("gain", 1.0), info


class OneAspect(RationalT2I):
    """As the built-in."""


class MyServers(RemotePointwiseRewardModel):
    """As the built-in."""


def made(cls, **options):
    config = RewardArguments(reward_model=f"mine.{cls.__name__}", timeout_s=20, extra_kwargs=options)
    return cls(config, Accelerator())


def test_options_have_the_built_ins_defaults_and_a_class_may_have_more(judge_server, picture):
    server = judge_server()
    judge = made(Sure, api_base_url=server.url, vlm_model="scripted", gain=2.0, min_answer_mass="1e-1")
    assert judge(["a cat"], image=[picture()]).rewards == [pytest.approx(1.5)]
    assert server.questions[0].body["top_logprobs"] == 20
    assert judge.options["min_answer_mass"] == 0.1


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (Sure, {"canonicalize": "false"}, "Sure: option canonicalize: .*valid boolean"),
        (Sure, {"min_answer_mass": 3}, "option min_answer_mass: .*less than or equal to 1"),
        (Sure, {"max_concurrent": "4"}, "option max_concurrent: .*valid integer"),
        (Sure, {"api_base_url": []}, "option api_base_url"),
        (Sure, {"temprature": 0.5}, "'temprature' is no option; did you mean 'temperature'"),
        (Sure, {"api_key": "sk-secret"}, "an API key does not belong into a config"),
        (OneAspect, {"missing_aspects": "Skip"}, "option missing_aspects: .*'unparsable' or 'skip'"),
        (OneAspect, {"aspect_weights": {"beauty": 1.0}}, "no aspect 'beauty'"),
        (MyServers, {"server_url": "http://host:1", "retry_attempts": "3"}, "MyServers: option retry_attempts"),
        (MyServers, {"server_url": "http://host:1", "retry_atempts": 3}, "did you mean 'retry_attempts'"),
    ],
)
def test_a_wrong_option_is_refused_as_a_built_ins_is(cls, options, words):
    given = options if cls is MyServers else {"api_base_url": "http://127.0.0.1:1/v1", **options}
    with pytest.raises(ModelLoadError, match=words) as caught:
        made(cls, **given)
    assert "secret" not in str(caught.value)


def test_one_aspect_may_be_written_without_a_list():
    judge = made(OneAspect, api_base_url="http://127.0.0.1:1/v1", aspects="text_faithfulness")
    assert judge.aspects == ("text_faithfulness",)
