"""Verdicts read as probabilities: of answers that real servers gave (llama.cpp's, with SmolLM2-135M), and of endpoints that give none."""

import json
import math

import pytest
from support.collected import collected
from support.endpoints import completion, serving

from swirl_fast.cli import main
from swirl_fast.config import ConfigError, EndpointConfig, load
from swirl_fast.judges.model import GivenAnswer, model_answer_judge_id, model_step_judge_id
from swirl_fast.judges.model.endpoint import ALTERNATIVES, FEW_ALTERNATIVES
from swirl_fast.judges.model.logprobs import Token, Words, read_probability, read_tokens
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, Verdict

GOOD, BAD, UNKNOWN = Verdict.GOOD, Verdict.BAD, Verdict.UNKNOWN
STEP = StepView("sums", "What is 1 + 2?", (), "<math_exp>1+2</math_exp>")
WORDS = Words("VERDICT:", {"GOOD": 1.0, "BAD": 0.0}, 0.02)
ANSWERS = Words("VERDICT:", {"YES": 1.0, "NO": 0.0}, 0.02)
SCORES = Words("SCORE:", {"1": 0.0, "2": 0.25, "3": 0.5, "4": 0.75, "5": 1.0})

# What xllamacpp 2026.10.11549 gave for the first token behind "VERDICT:", cut to the likeliest; " B" goes on with "AD".
LLAMA = {
    " GOOD": -0.439,
    " B": -2.23,
    " Good": -2.87,
    " GRE": -4.21,
    " NOT": -4.35,
    " WOR": -4.64,
    " Bad": -5.07,
    " A": -5.49,
}
LLAMA_ANSWER = {
    " Y": -0.378,
    " NO": -3.18,
    " No": -3.43,
    " Yes": -3.44,
    "\n": -3.68,
    " ": -4.69,
    " NOT": -4.9,
    " The": -5.29,
}


def p(*logprobs: float) -> float:
    return sum(map(math.exp, logprobs))


def token(text: str, **alternatives: float) -> Token:
    return Token(text, alternatives or {text: -0.001, "?": -7.0})


def said(*tokens: Token | str) -> tuple[Token, ...]:
    return tuple(one if isinstance(one, Token) else token(one) for one in tokens)


def alone(listed: dict[str, float], words: Words = WORDS) -> Judgement:
    first = next(iter(listed))
    return read_probability("VERDICT:" + first, (Token(first, listed),), words, explained=False)


def test_what_llama_cpp_gave_is_read_over_split_words_and_cases():
    expected = p(-0.439, -2.87) / p(-0.439, -2.87, -2.23, -5.07)
    assert alone(LLAMA).reward == pytest.approx(expected) and alone(LLAMA).verdict is GOOD
    answer = alone(LLAMA_ANSWER, ANSWERS)
    assert answer.reward == pytest.approx(p(-0.378, -3.44) / p(-0.378, -3.44, -3.18, -3.43)), "NOT is no NO"


@pytest.mark.parametrize(
    ("listed", "reward"),
    [
        ({" GOOD": math.log(0.6), " BAD": math.log(0.2)}, 0.75),
        ({" good": math.log(0.2), "**BAD**": math.log(0.1), "▁BAD": math.log(0.1), "ĠBad.": math.log(0.1)}, 0.4),
        ({" G": math.log(0.2), " B": math.log(0.6)}, 0.25),
        ({" GOOD": math.log(0.8), " Goods": -4.0, " BADLY": -3.0, "": -4.0, " ": -3.5}, 0.8 / (0.8 + math.exp(-4.0))),
        ({" GOOD": math.log(0.98)}, 0.98),  # nothing else is listed: BAD has at most what is left
        ({" GOOD": math.log(0.3)}, None),  # … or as much as the least that is: nothing is known
        ({" BAD": -0.01, " x": float("-inf")}, 0.0),
        ({" GOOD": math.log(0.495), " BAD": math.log(0.505)}, None),
        ({" The": -0.1, " GOOD": math.log(0.004), " BAD": math.log(0.004)}, None),
        ({" The": -0.1, " A": -3.0}, None),
    ],
)
def test_the_probability_of_good(listed, reward):
    judgement = alone(listed)
    assert judgement.reward == (None if reward is None else pytest.approx(reward))
    assert judgement.verdict is (UNKNOWN if reward is None else GOOD if reward >= 0.5 else BAD)


@pytest.mark.parametrize("drawn", [1e-6, 1e-3, 0.03, 0.0])
@pytest.mark.parametrize("listed", [True, False], ids=["among the alternatives", "beside them"])
def test_a_token_that_was_drawn_from_outside_the_alternatives_makes_nothing_certain(drawn, listed):
    """BAD has at most the .04 of the least alternative; vLLM lists what was drawn in the place of one."""
    tops = {" GOOD": 0.5, " The": 0.2, " It": 0.1, " So": 0.05, " A": 0.04}
    entries = [{"token": text, "logprob": math.log(p)} for text, p in tops.items()]
    own = {"token": " Fine", "logprob": math.log(drawn) if drawn else -9999.0}
    content = [own | {"top_logprobs": [own, *entries] if listed else entries}]
    tokens = (*said("x", "\n", "VERDICT", ":"), *read_tokens({"logprobs": {"content": content}}))
    reward = read_probability("x\nVERDICT: Fine", tokens, WORDS, explained=True).reward
    assert reward == pytest.approx(0.5 / 0.54)


def test_a_token_that_begins_two_words_counts_for_neither():
    words = Words("VERDICT:", {"GOOD": 1.0, "GONE": 0.0})
    assert alone({" GO": -0.5, " GOOD": -2.0, " GON": -2.0}, words).reward == pytest.approx(0.5)


PLACE = Token(" BAD", {" BAD": math.log(0.6), " GOOD": math.log(0.2)})


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (said("It", " helps", ".", "\n", "VER", "D", "ICT", ":", PLACE, "<|im_end|>"), True),
        (said("VERDICT: GOOD", "\n", "No", ".", "\n", "VERDICT", ":", PLACE, "\n", "\n"), True),
        (said("<think>", "VERDICT: GOOD", "</think>", "Well", "\n", "**", "VERDICT", ":", " ", PLACE, "**"), True),
        (said("Verdict", ":**", PLACE), True),
        (said("So", "\n", "VERDICT", ":", PLACE, "AD", " or", " VERDICT", ":", " GOOD"), False),
        (said("\n", "VERDICT", ":", PLACE, "\n", "That", " is", " it"), False),
        (said(PLACE), False),
        (said("VERDICT", ":"), False),
    ],
)
def test_the_place_after_an_explanation(tokens, found):
    text = "".join(one.text for one in tokens).removesuffix("<|im_end|>").rpartition("</think>")[2]
    judgement = read_probability(text, tokens, WORDS, explained=True)
    assert judgement.reward == (pytest.approx(0.25) if found else None)
    assert found or "does not end with VERDICT: and one word" in judgement.reason
    assert not found or judgement.reason == text.rstrip().rpartition("\n")[0].strip()


def test_tokens_without_their_blanks_and_tokens_that_do_not_spell_the_reply():
    stripped = said("It", "helps", "VERDICT", ":", Token("BAD", {"BAD": math.log(0.6), "GOOD": math.log(0.2)}))
    assert read_probability("It helps\nVERDICT: BAD", stripped, WORDS, True).reward == pytest.approx(0.25)
    numbers = said("token_id:5", "token_id:7")
    assert read_probability("VERDICT: BAD", numbers, WORDS, True).verdict is UNKNOWN
    assert read_probability("VERDICT: BAD", numbers, WORDS, False).verdict is UNKNOWN


@pytest.mark.parametrize("before", [(), ("VER", "DICT", ":"), ("\n",), ("**", "Verdict", ":", " "), ("\n\n", "**")])
def test_the_place_of_a_verdict_alone(before):
    tokens = said(*before, PLACE, "\n", "VERDICT", ":", " GOOD")
    assert read_probability("", tokens, WORDS, explained=False).reward == pytest.approx(0.25)


def test_a_score_is_the_mean_of_the_scores_by_their_probability():
    listed = {"4": math.log(0.5), "5": math.log(0.25), "2": math.log(0.125), " ": -3.0, "3": -20.0, "1": -20.0}
    expected = (0.5 * 0.75 + 0.25 + 0.125 * 0.25) / 0.875
    tokens = said("Fine", "\n", "SCORE", ":", " ", Token("4", listed))
    assert read_probability("Fine\nSCORE: 4", tokens, SCORES, True).reward == pytest.approx(expected, abs=1e-6)
    assert read_probability("Fine\nSCORE: 4.5", tokens, SCORES, True).verdict is UNKNOWN


def answer(text: str, *entries: dict, finish: str = "stop") -> tuple[int, bytes]:
    body = json.loads(completion(text, finish)[1])
    body["choices"][0]["logprobs"] = {"content": list(entries)}
    return 200, json.dumps(body).encode()


def entry(listed: dict[str, float]) -> dict:
    tops = [{"token": text, "logprob": logprob, "bytes": list(text.encode())} for text, logprob in listed.items()]
    return tops[0] | {"top_logprobs": tops}


ALONE = {"read": "logprobs", "explain": False}


def test_the_endpoint_is_asked_to_go_on_with_the_verdict():
    with serving(lambda *_: answer("VERDICT: GOOD", entry(LLAMA), finish="length"), **ALONE) as (endpoint, judge):
        judge.check()
        (judgement,) = judge.judge([STEP])
        (right,) = judge.judge_answers([GivenAnswer("How much?", ("3",), "3")])
    assert judgement == alone(LLAMA) and right.verdict is UNKNOWN, "of an answer the words are YES and NO"
    check, request, _ = endpoint.requests
    assert request["logprobs"] is True and request["top_logprobs"] == check["top_logprobs"] == ALTERNATIVES
    assert request["max_tokens"] == 8 and request["continue_final_message"] and not request["add_generation_prompt"]
    user, begun = request["messages"]
    assert user["content"].endswith(
        "\nWrite the verdict and nothing else, exactly one of\n\nVERDICT: GOOD\nVERDICT: BAD\n"
    )
    assert begun == {"role": "assistant", "content": "VERDICT:"} and len(check["messages"]) == 1


def test_an_endpoint_that_takes_no_beginning_and_few_alternatives_is_asked_without():
    def respond(request, _):
        if len(request["messages"]) > 1:
            return 400, b'{"error": "Expected last role User or Tool"}'
        if request["top_logprobs"] > FEW_ALTERNATIVES:
            return 422, b'{"error": "top_logprobs must be at most 5"}'
        return answer("VERDICT: GOOD", *[entry({part: -0.1}) for part in ("VER", "DICT", ":")], entry(LLAMA))

    with serving(respond, **ALONE) as (endpoint, judge):
        judge.check()
        assert [one.reward for one in judge.judge([STEP])] == [alone(LLAMA).reward]
        judge.judge([STEP])
    assert [(len(request["messages"]), request["top_logprobs"]) for request in endpoint.requests] == [
        (1, 20), (1, 5), (2, 5), (1, 5), (1, 5),
    ]  # fmt: skip


def test_after_an_explanation_the_request_is_as_ever_but_for_the_log_probs():
    parts = [entry({part: -0.1}) for part in ("Fine", "\n", "VERDICT", ":")]
    with serving(lambda *_: answer("Fine\nVERDICT: GOOD", *parts, entry(LLAMA)), read="logprobs") as (endpoint, judge):
        (judgement,) = judge.judge([STEP])
    assert judgement == Judgement.graded(alone(LLAMA).reward, "Fine")
    (request,) = endpoint.requests
    assert "Explain your judgement" in request["messages"][0]["content"] and len(request["messages"]) == 1
    assert request["max_tokens"] == 512 and "continue_final_message" not in request


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (completion("VERDICT: GOOD"), "answers without log-probs"),
        ((400, b"logprobs is not supported with this model"), "HTTP 400: logprobs is not supported"),
    ],
)
def test_an_endpoint_without_log_probs_is_refused(response, said):
    with serving(lambda *_: response, read="logprobs") as (endpoint, judge):
        for call in (judge.check, lambda: judge.judge([STEP])):
            with pytest.raises(
                ConfigError, match=rf"{endpoint.url}.*{said}.*judge.model.read=logprobs.*Remedy: .*read=text"
            ):
                call()


def test_one_of_two_endpoints_without_log_probs_is_named():
    with serving(lambda *_: answer("x", entry(LLAMA))) as (good, _), serving(lambda *_: completion("x")) as (other, _):
        with serving(lambda *_: None, url=good.url, replicas=[other.url], read="logprobs") as (_, judge):
            with pytest.raises(ConfigError, match=rf"{other.url}/chat/completions answers without log-probs"):
                judge.check()


@pytest.mark.parametrize(
    "listed", [{"token": 5, "logprob": 0}, {"token": "x"}, {"token": "x", "logprob": float("nan")}, 7]
)
def test_log_probs_that_are_none_are_a_failure(listed):
    with serving(lambda *_: answer("VERDICT: GOOD", listed), **ALONE, retries=0) as (_, judge):
        (judgement,) = judge.judge([STEP])
    assert judgement.verdict is UNKNOWN and "not a chat completion" in judgement.reason


def test_another_reading_is_another_judge():
    def ids(**settings: object) -> tuple[str, str]:
        config = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", **settings)
        return model_step_judge_id(config), model_answer_judge_id(config)

    found = [ids(), ids(explain=False), ids(read="logprobs"), ids(read="logprobs", margin=0.1), ids(**ALONE)]
    assert found[0] == ids(margin=0.3) == ("model-m-v2", "outcome-m-v1"), "the margin is of log-probs alone"
    assert found[4] == ("model-m-v2-unexplained-logprobs.v2-0.02", "outcome-m-v1-unexplained-logprobs.v2-0.02")
    assert len({one for pair in found for one in pair}) == 10


def test_a_judge_that_keeps_to_no_form_is_told_what_helps(tmp_path, capsys):
    said = "can be read by the probability of its verdict word: judge.model.read=logprobs"
    for reply, helped in (("Hard to say.", True), ("VERDICT: GOOD", False)):
        with serving(lambda *_, reply=reply: completion(reply)) as (endpoint, _):
            run = collected(tmp_path / reply[:4])
            assert main(["judge", *run, "judge.kind=model", f"judge.model.url={endpoint.url}"]) == 0
        assert (said in capsys.readouterr().out) == helped


def test_settings_that_cannot_work_together_are_refused():
    url = "judge.model.url=http://127.0.0.1:9/v1"
    with pytest.raises(ConfigError, match="judge.model.scale.*scores of one digit; use a scale up to 9, or read=text"):
        load(None, ["judge.kind=model", url, "judge.model.read=logprobs", "judge.model.scale=10"])
    with pytest.raises(ConfigError, match=r"judge.model.scale=10.*read=text"):
        model_step_judge_id(EndpointConfig(url="http://127.0.0.1:9/v1", read="logprobs", scale=10))
    for value in ("0.5", "-0.1"):
        with pytest.raises(ConfigError, match=r"judge.model.margin.*\[0, 0.5\)"):
            load(None, [f"judge.model.margin={value}"])
