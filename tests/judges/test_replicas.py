"""Several endpoints of one model, as real HTTP servers on this machine: which is asked, and what happens when some are dead."""

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from support.endpoints import completion, prompt_of, serving

from swirl_fast.config import ConfigError, EndpointConfig, load
from swirl_fast.judges.judge import Refusal
from swirl_fast.judges.model import GivenAnswer, ModelJudge, model_answer_judge_id, model_step_judge_id
from swirl_fast.judges.model.replicas import MAX_REST, REST
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Verdict

WAIT = 60  # seconds until what a server waits for is taken to come never; no test that passes takes so long
GOOD, UNKNOWN = Verdict.GOOD, Verdict.UNKNOWN
DOWN = (503, b"down")


def steps(count: int, question: str = "What is 1 + 2?") -> list[StepView]:
    return [StepView("sums", question, (), f"<math_exp>{i}+1</math_exp>") for i in range(count)]


def good(*_: object) -> tuple[int, bytes]:
    return completion("VERDICT: GOOD")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def replicas(*respond: Callable, clock: Clock | None = None, **settings: Any) -> Iterator[tuple[Any, ...]]:
    """(servers …, judge)"""
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(one))[0] for one in respond]
        config = EndpointConfig(
            **{
                "url": servers[0].url,
                "replicas": [one.url for one in servers[1:]],
                "model": "judge-1",
                "retries": 0,
                "timeout": 5.0,
                "concurrency": 1,
                **settings,
            }
        )
        judge = ModelJudge(config, clock=clock or Clock())
        stack.callback(judge.close)
        yield *servers, judge


def dead_url() -> str:
    """Where nobody listens."""
    with serving(good) as (endpoint, _):
        return endpoint.url


def verdicts(judge: ModelJudge, asked: list[StepView]) -> set[Verdict]:
    return {judgement.verdict for judgement in judge.judge(asked)}


def test_both_are_used_each_for_its_share() -> None:
    together = threading.Barrier(4)

    def respond(*_: object) -> tuple[int, bytes]:
        together.wait(WAIT)
        return good()

    with replicas(respond, respond, concurrency=4, timeout=WAIT) as (one, two, judge):
        assert verdicts(judge, steps(8)) == {GOOD}
    assert (one.most_at_once, two.most_at_once) == (2, 2)
    assert len(one.requests) + len(two.requests) == 8


def test_prompts_of_a_question_stay_where_their_beginning_is_known() -> None:
    asked = [step for i in range(4) for step in steps(5, f"Question {i}?")]
    with replicas(good, good) as (one, two, judge):
        assert verdicts(judge, asked) == {GOOD}
        answers = [GivenAnswer(f"Question {i}?", ("3",), str(k)) for i in range(4) for k in range(3)]
        judge.judge_answers(answers)
    for server in (one, two):
        questions = [re.findall(r"Question \d", prompt_of(request))[0] for request in server.requests]
        assert len(questions) == 2 * 5 + 2 * 3 and len(set(questions[:10])) == len(set(questions[10:])) == 2


def test_one_that_is_dead_from_the_start_costs_no_verdict_and_is_named() -> None:
    dead = dead_url()
    with replicas(good, replicas=[dead]) as (one, judge):
        with pytest.warns(UserWarning, match=rf"{dead}/chat/completions fails: ConnectError.*left out") as seen:
            assert verdicts(judge, steps(6) + steps(6, "And 2 + 2?")) == {GOOD}
        assert len(seen) == 1, "once, not for every request"
    assert len(one.requests) == 12


def test_the_check_asks_all_and_warns_of_a_dead_one() -> None:
    with replicas(good, lambda *_: DOWN, retries=3) as (one, two, judge):
        with pytest.warns(UserWarning, match=f"{two.url}/chat/completions fails: HTTP 503: down") as seen:
            judge.check()
        assert (len(one.requests), len(two.requests), len(seen)) == (1, 1, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it was said already
            assert verdicts(judge, steps(3)) == {GOOD}
        assert (len(one.requests), len(two.requests)) == (4, 1), "the dead one is left out from the beginning"


def test_the_check_passes_in_silence_where_all_answer() -> None:
    with replicas(good, good) as (one, two, judge), warnings.catch_warnings():
        warnings.simplefilter("error")
        judge.check()
    assert (len(one.requests), len(two.requests)) == (1, 1)


def test_the_check_is_an_error_where_all_are_dead() -> None:
    dead = dead_url()
    with replicas(lambda *_: DOWN, replicas=[dead], retries=1) as (one, judge):
        with pytest.raises(ConfigError) as error:
            judge.check()
    assert len(one.requests) == 2
    said = str(error.value)
    assert re.search(rf"none of .*{one.url}/chat/completions does not answer: .* 2 tries.*HTTP 503: down; {dead}", said)
    assert "ConnectError" in said and "judge.model.replicas" in said and "judge.model.timeout (5 s)" in said


def test_the_check_waits_for_servers_that_are_just_starting() -> None:
    with replicas(lambda _, n: DOWN if n == 0 else good(), lambda *_: DOWN, retries=2) as (one, two, judge):
        with pytest.warns(UserWarning, match=f"{two.url}.* fails"):
            judge.check()
    assert (len(one.requests), len(two.requests)) == (2, 2)


@pytest.mark.parametrize("failure", ["cut", DOWN, (429, b"busy"), (200, b"<html>")])
@pytest.mark.filterwarnings("ignore:the judge's endpoint")
def test_one_that_dies_midway_loses_nothing_and_takes_no_tries(failure: Any) -> None:
    with replicas(lambda _, n: good() if n < 3 else failure, good) as (one, two, judge):
        assert verdicts(judge, steps(12)) == {GOOD}, "with retries=0"
    assert len(one.requests) == 4 and len(two.requests) == 9


@pytest.mark.filterwarnings("ignore:the judge's endpoint")
def test_what_hangs_at_a_dead_one_goes_to_the_other() -> None:
    with replicas(lambda *_: "hang", good, timeout=0.5, concurrency=4) as (one, two, judge):
        assert verdicts(judge, steps(10)) == {GOOD}
    assert len(one.requests) == 2, "its share, and nothing after it was found dead"


def test_one_that_comes_back_is_used_again() -> None:
    """Tried after 30 s, then after 60 s more, at which it is well."""
    clock, well = Clock(), threading.Event()
    with replicas(lambda *_: good() if well.is_set() else DOWN, good, clock=clock) as (one, _, judge):

        def asked_by_now() -> int:
            assert verdicts(judge, steps(4)) == {GOOD}
            return len(one.requests)

        with pytest.warns(UserWarning, match=one.url) as seen:
            assert asked_by_now() == 1
            clock.now = REST - 1
            assert asked_by_now() == 1
            clock.now = REST
            assert asked_by_now() == 2
            clock.now += 2 * REST - 1
            well.set()
            assert asked_by_now() == 2
            clock.now += 1
            assert asked_by_now() > 3, "all of the question, once it has answered"
            assert len(seen) == 1
        well.clear()
        with pytest.warns(UserWarning, match=one.url):  # said again, for it was well in between
            judge.judge(steps(4) + steps(4, "And 2 + 2?"))


@pytest.mark.filterwarnings("ignore:the judge's endpoint")
def test_the_time_of_being_left_out_doubles_up_to_a_limit() -> None:
    clock = Clock()
    with replicas(lambda *_: DOWN, good, clock=clock) as (one, _, judge):
        tried = []
        for second in range(0, 1000, 30):
            clock.now = second
            assert verdicts(judge, steps(1)) == {GOOD}
            if len(one.requests) > len(tried):
                tried.append(second)
    assert [b - a for a, b in zip(tried, tried[1:], strict=False)] == [REST, 60, 120, 240, MAX_REST]


@pytest.mark.filterwarnings("ignore:the judge's endpoint")
def test_one_that_says_how_long_it_is_busy_is_left_out_for_that_time() -> None:
    clock = Clock()
    busy = (429, b"slow down", {"Retry-After": "5"})
    with replicas(lambda _, n: busy if n == 0 else good(), good, clock=clock) as (one, _, judge):
        assert verdicts(judge, steps(4)) == {GOOD}
        clock.now = 4.9
        assert verdicts(judge, steps(4)) == {GOOD} and len(one.requests) == 1
        clock.now = 5.0
        assert verdicts(judge, steps(4)) == {GOOD} and len(one.requests) > 1


@pytest.mark.filterwarnings("ignore:the judge's endpoint")
def test_one_request_finds_out_whether_it_is_back() -> None:
    """Not all that are under way, which a server that hangs would hold for a time-out."""
    clock, rest = Clock(), threading.Event()
    answered: list[int] = []

    def first(_: object, number: int) -> Any:
        if number == 0:
            return DOWN
        rest.wait(WAIT)
        return good()

    def second(*_: object) -> tuple[int, bytes]:
        answered.append(1)
        if len(answered) == 1 + 7:
            rest.set()
        return good()

    with replicas(first, second, clock=clock, concurrency=4, timeout=WAIT) as (one, _, judge):
        assert verdicts(judge, steps(1)) == {GOOD}
        clock.now = REST
        assert verdicts(judge, steps(8)) == {GOOD}
    assert len(one.requests) == 2


@pytest.mark.filterwarnings("ignore:the judge's endpoint")
def test_both_dead_is_unknown_after_the_retries_as_with_one() -> None:
    with replicas(lambda *_: DOWN, lambda *_: DOWN, retries=2) as (one, two, judge):
        (judgement,) = judge.judge(steps(1))
        assert judgement.verdict is UNKNOWN
        assert re.match(r"no reply in 4 tries, the last: http://.*/chat/completions: HTTP 503: down", judgement.reason)
        assert len(one.requests) == len(two.requests) == 2, "each at once, and then by turns, with the retries"
        judged = judge.judge(steps(30))
    assert {one.verdict for one in judged} == {UNKNOWN} and sum("given up" in one.reason for one in judged) >= 25


@pytest.mark.filterwarnings("ignore:the judge's endpoint")
def test_a_request_waits_for_the_first_that_answers_again() -> None:
    """Both are left out, and nobody waits 30 s for them."""
    with replicas(lambda _, n: DOWN if n < 2 else good(), lambda *_: DOWN, retries=4) as (one, two, judge):
        assert verdicts(judge, steps(6)) == {GOOD}
    assert len(two.requests) <= 2


@pytest.mark.filterwarnings("ignore:the judge's endpoint")
def test_a_prompt_that_every_server_fails_at_leaves_none_of_them_out() -> None:
    """The next answer of a server shows that it is well."""

    def respond(request: dict, _: int) -> tuple[int, bytes]:
        return (500, b"assertion") if "<math_exp>0+1" in prompt_of(request) else good()

    with replicas(respond, respond, retries=1) as (one, two, judge):
        judged = judge.judge(steps(1) + steps(6, "And 2 + 2?") + steps(6, "And 3 + 2?"))
        assert [judgement.verdict for judgement in judged].count(UNKNOWN) == 3
        assert sum(judgement.verdict is GOOD for judgement in judged) == 10


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_one_stops_and_names_it(status: int) -> None:
    with replicas(good, lambda *_: (status, b"no such thing")) as (one, two, judge):
        wanted = rf"(?s)^the judge's endpoint {two.url}/chat/completions refuses: HTTP {status}: no such thing"
        with pytest.raises(ConfigError, match=wanted):
            judge.check()
        with pytest.raises(Refusal, match=wanted) as error:
            judge.judge(steps(3) + steps(3, "And 2 + 2?"))
    assert ("judge.model.replicas" in str(error.value)) == (status == 404)
    assert sum(one is not None for one in error.value.answered) >= 3


def test_a_prompt_that_one_refuses_is_unknown_and_it_stays_in() -> None:
    def respond(request: dict, _: int) -> tuple[int, bytes]:
        return (400, b"too long") if "<math_exp>0+1" in prompt_of(request) else good()

    with replicas(respond, respond) as (one, two, judge):
        assert [judgement.verdict for judgement in judge.judge(steps(3))] == [UNKNOWN, GOOD, GOOD]
        assert len(one.requests) + len(two.requests) == 3


def test_servers_that_say_to_serve_different_models_are_warned_about() -> None:
    def serve(model: str) -> Callable:
        body = completion("VERDICT: GOOD")[1]
        return lambda *_: (200, body.replace(b"{", b'{"model": "%s", ' % model.encode(), 1))

    with replicas(serve("org/a-7b"), serve("org/b-7b")) as (one, two, judge):
        with pytest.warns(UserWarning, match=rf"{one.url}.* says org/a-7b; {two.url}.* says org/b-7b"):
            judge.check()


def test_tokens_are_counted_over_all() -> None:
    body = completion("VERDICT: GOOD")[1].replace(b"{", b'{"usage": {"prompt_tokens": 7}, ', 1)
    with replicas(lambda *_: (200, body), lambda *_: (200, body)) as (one, two, judge):
        judge.judge(steps(2) + steps(2, "And 2 + 2?"))
        assert one.requests and two.requests and judge.stats().prompt_tokens == 4 * 7


@pytest.mark.parametrize("model", ["default", "judge-1"])
def test_replicas_are_no_part_of_the_id(model: str) -> None:
    """They serve the model of judge.model.url: adding one loses no verdict."""
    alone = EndpointConfig(url="http://127.0.0.1:9/v1", model=model)
    more = EndpointConfig(url="http://127.0.0.1:9/v1", model=model, replicas=["http://127.0.0.1:8/v1"])
    other = EndpointConfig(url="http://127.0.0.1:8/v1", model=model)
    assert model_step_judge_id(alone) == model_step_judge_id(more)
    assert model_answer_judge_id(alone) == model_answer_judge_id(more)
    assert (model_step_judge_id(other) == model_step_judge_id(alone)) == (model == "judge-1")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1/"])
def test_an_address_that_is_named_twice_is_refused(url: str) -> None:
    one, two = "http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1"
    for written in ([url], [two, url, two + "/"], [two, two + "/"]):
        with pytest.raises(ConfigError, match="judge.model.replicas=.* twice"):
            ModelJudge(EndpointConfig(url=one, replicas=written))
        with pytest.raises(ConfigError, match="judge.model.replicas=.* names an endpoint twice"):
            load(None, [f"judge.model.url={one}", f"judge.model.replicas=[{', '.join(written)}]"])


@pytest.mark.parametrize("url", ["127.0.0.1:30000/v1", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"judge.model.replicas is {url!r}")):
        ModelJudge(EndpointConfig(url="http://127.0.0.1:9/v1", replicas=[url]))
    if not url.startswith("http"):
        with pytest.raises(ConfigError, match=rf"judge.model.replicas=.*{url}' is not the URL of an OpenAI-compatible"):
            load(None, ["judge.model.url=http://127.0.0.1:9/v1", f"judge.model.replicas=[{url!r}]"])


def test_the_settings_take_a_list() -> None:
    config = load(None, ["judge.model.url=http://a/v1", "judge.model.replicas=[http://b/v1, https://c:8/v1]"])
    assert config.judge.model.replicas == ["http://b/v1", "https://c:8/v1"]
