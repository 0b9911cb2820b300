"""A judge that thinks before it answers: the thought is no answer, however a server hands it over."""

from __future__ import annotations

import json
import math

import pytest

from tests.judges.scripted import Answer
from workers import Unscored
from workers.judges.thought import without_thought

LOUD = "Yes. Verdict: first. Score: 1. "
"""What a thought may say, and the answer does not."""

AROUND = {
    "<think>": ("<think>", "</think>"),
    "<thinking>": ("<thinking>", "</thinking>"),
    "<thought>": ("<thought>\n", "\n</thought>"),
    "<reasoning>": ("<reasoning>", "</reasoning>"),
    "<seed:think>": ("<seed:think>", "</seed:think>"),
    "capitals and attributes": ('<THINK effort="2">', "</Think >"),
    "[THINK]": ("[THINK]", "[/THINK]"),
    "kimi": ("◁think▷", "◁/think▷"),
    "harmony": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "harmony without specials": ("analysis", "assistantfinal"),
    "gemma": ("<|channel>thought\n", "<channel|>"),
    "medgemma": ("<unused94>thought\n", "<unused95>"),
    "command": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "openthinker": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "granite": ("Here is my thought process:\n", "\nHere is my response:\n"),
}
SAYS_ITS_END_ALONE = [name for name in AROUND if name not in ("harmony without specials", "granite")]
"""Marks that mean something without the opening one, which may be part of the prompt."""


@pytest.mark.parametrize("name", AROUND)
def test_what_stands_between_the_marks_of_a_thought_is_cut(name):
    opens, closes = AROUND[name]
    assert without_thought(f"{opens}{LOUD}{closes}No.") == "No."
    assert without_thought(f"{opens}{LOUD}") == ""


@pytest.mark.parametrize("name", SAYS_ITS_END_ALONE)
def test_a_thought_may_begin_in_the_prompt(name):
    _, closes = AROUND[name]
    assert without_thought(f"{LOUD}{closes}\n\nNo.") == "No."


@pytest.mark.parametrize(
    "text",
    [
        "No.",
        "I think the sign says <b>THINK</b>. Here is my response: No.",
        "Score: 3\nanalysis of colours: fine\nassistantfinal is a word in the picture",
        "a < think and b > thought",
        "Thinking aloud: [1] and [2]",
    ],
)
def test_a_text_without_a_thought_stays_as_it_is(text):
    assert without_thought(f"  {text}\n") == text


def completion(message, tokens=(), finish_reason="stop") -> Answer:
    """A completion whose tokens are `(text, {candidate: probability})`."""
    content = []
    for text, candidates in tokens:
        top = [{"token": t, "logprob": math.log(p)} for t, p in candidates.items()]
        content.append({"token": text, "logprob": -0.1, "top_logprobs": top})
    logprobs = {"content": content} if content else None
    choice = {"message": {"role": "assistant", **message}, "finish_reason": finish_reason, "logprobs": logprobs}
    return Answer(body=json.dumps({"choices": [choice]}).encode())


TRAP = {"Yes": 0.9, "No": 0.05}
"""Candidates within the thought."""
SURE = {"No": 0.8, "Yes": 0.2}
"""Candidates of the answer."""
THOUGHT = [("<think>", TRAP), ("Yes", TRAP), (",", TRAP), (" No", TRAP), ("</think>", TRAP)]
ENDS = [("\n\n", TRAP), ("No", SURE), ("<|im_end|>", TRAP)]
WHOLE = "<think>Yes, No</think>\n\nNo"
R1 = [*THOUGHT[1:], *ENDS]
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Yes"}]}, {"type": "text", "text": "No"}]


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        ({"content": WHOLE}, [*THOUGHT, *ENDS]),
        ({"content": WHOLE.removeprefix("<think>")}, R1),
        ({"content": "No", "reasoning": "Yes, No"}, [*THOUGHT, *ENDS]),
        ({"content": "\n\nNo", "reasoning_content": "Yes, No"}, R1),
        ({"content": "No", "reasoning": "Yes, No"}, [("No", SURE)]),
        ({"content": "No"}, [*THOUGHT, *ENDS]),  # the server keeps the thought to itself
        ({"content": "No", "reasoning": "Yes"}, [("▁Yes", TRAP), ("</think>", TRAP), ("▁No", SURE), ("</s>", TRAP)]),
        ({"content": "No", "reasoning": "Yes"}, [("ĠYes", TRAP), ("</think>", TRAP), ("Ċ", TRAP), ("ĠNo", SURE)]),
        ({"content": "**No**", "reasoning": "Yes"}, [*R1[:4], ("**", TRAP), ("No", SURE), ("**", TRAP)]),
        ({"content": PARTS}, [("Yes", TRAP), ("[/THINK]", TRAP), ("No", SURE)]),
        ({"content": "No", "reasoning_details": PARTS[:1]}, [("Yes", TRAP), ("No", SURE)]),
        ({"content": "N\ufffdo", "reasoning": "Yes"}, [("Yes", TRAP), ("</think>", TRAP), ("No", SURE)]),
    ],
)  # fmt: skip
def test_a_yes_or_no_behind_a_thought_is_read_from_its_own_token(judge_server, make_judge, picture, message, tokens):
    server = judge_server(lambda _: completion(message, tokens))
    judge = make_judge("vllm_evaluate", server, extra_body={"max_tokens": 64})
    output = judge(["a cat"], image=[picture()])
    assert output.rewards == [pytest.approx(0.2)], output.rewards
    assert output.extra_info["judge"][0]["p_no"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("message", "tokens", "words"),
    [
        ({"content": "<think>"}, [("<think>", {"<think>": 0.3, "Yes": 0.5, "No": 0.2})], "is all thought"),
        ({"content": None, "reasoning": "Yes"}, [("Yes", TRAP)], "is all thought"),
        ({"content": "", "reasoning_content": "Yes"}, [("Yes", TRAP)], "is all thought"),
        ({"content": None, "thinking_blocks": [{"type": "thinking", "thinking": "Yes"}]}, [("Yes", TRAP)], "is all"),
        ({"content": "<think>Yes, No"}, THOUGHT[:-1], "is all thought"),
        ({"content": "<think>Yes, No</think>"}, THOUGHT, "is all thought"),
        ({"content": "No", "reasoning": "Yes"}, [("Yes", TRAP)], "logprobs of the thought but not of the answer"),
        (
            {"content": "Yes", "reasoning": "I say\nYes"},
            [("I say ", {}), ("Yes", TRAP)],
            "thought but not of the answer",
        ),
        ({"content": WHOLE}, THOUGHT, "logprobs of the thought but not of the answer"),
        ({"content": None, "reasoning": "Yes"}, [], "is all thought, and the server gave no logprobs"),
    ],
)
def test_a_yes_within_a_thought_is_no_answer(judge_server, make_judge, picture, message, tokens, words):
    server = judge_server(lambda _: completion(message, tokens, "length"))
    (found,) = make_judge("vllm_evaluate", server)(["a cat"], image=[picture()]).rewards
    assert isinstance(found, Unscored), found
    assert found.kind == "unparsable"
    assert words in found.message
    assert "chat_template_kwargs: {enable_thinking: false}" in found.message


RUBRIC = "\n".join(
    f"{n}. {title}:\n## Score: {{score}}"
    for n, title in enumerate(("Text Faithfulness", "Physical and Visual Quality", "Text Rendering"), 1)
)


def handed_over(thought: str, answer: str):
    yield {"content": f"<think>{thought}</think>{answer}"}
    yield {"content": f"{thought}</think>{answer}"}
    yield {"content": f"[THINK]{thought}[/THINK]{answer}"}
    yield {"content": answer, "reasoning": thought}
    yield {"content": [{"type": "reasoning", "text": thought}, {"type": "text", "text": answer}]}
    yield {"content": [{"type": "thinking", "thinking": thought}, answer]}


@pytest.mark.parametrize("i", range(6))
def test_a_rubrics_scores_are_those_behind_the_thought(judge_server, make_judge, picture, i):
    message = list(handed_over(RUBRIC.format(score=1), RUBRIC.format(score=4)))[i]
    judge = make_judge("rational_rewards_t2i", judge_server(lambda _: completion(message)))
    assert judge(["a cat"], image=[picture()]).rewards == [pytest.approx(1.0)]


@pytest.mark.parametrize("i", range(6))
def test_a_verdict_is_the_one_behind_the_thought(judge_server, make_judge, picture, i):
    def script(question):
        is_swapped = question.number % 2 == 1
        right, wrong = ("second", "first") if is_swapped else ("first", "second")
        return completion(list(handed_over(f"\nVerdict: {wrong}\n", f"\nVerdict: {right}"))[i])

    judge = make_judge("pairwise_judge", judge_server(script))
    assert judge(["a cat"], image=[[picture(1), picture(2)]]).rewards == [1.0]


@pytest.mark.parametrize("model", ["rational_rewards_t2i", "pairwise_judge"])
@pytest.mark.parametrize(
    ("message", "finish_reason", "words"),
    [
        ({"content": None, "reasoning": "Score: 4\nVerdict: first"}, "stop", "is all thought, with no"),
        ({"content": "<think>Score: 4\nVerdict: first"}, "stop", "is all thought, with no"),
        ({"content": "<think>Score: 4\nVerdict: first"}, "length", "cut at max_tokens within its thought"),
        ({"content": None, "reasoning": "Score: 4"}, "length", "cut at max_tokens within its thought"),
    ],
)
def test_a_reply_that_is_all_thought_says_so(judge_server, make_judge, picture, model, message, finish_reason, words):
    judge = make_judge(model, judge_server(lambda _: completion(message, finish_reason=finish_reason)))
    image = [[picture(1), picture(2)]] if model == "pairwise_judge" else [picture()]
    (found,) = judge(["a cat"], image=image).rewards
    assert found.kind == "unparsable"
    assert words in found.message
    assert "enable_thinking" in found.message


def test_a_refusal_is_told_in_the_judges_words(judge_server, make_judge, picture):
    message = {"content": None, "refusal": "I cannot look at people."}
    for model in ("vllm_evaluate", "rational_rewards_t2i"):
        judge = make_judge(model, judge_server(lambda _: completion(message)))
        (found,) = judge(["a cat"], image=[picture()]).rewards
        assert found.message == "the judge refuses: 'I cannot look at people.'"
