"""Requests and answers: against `fake_sglang.py`, which misbehaves in every listed way, each has the promised outcome."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_sglang import FIELDS
from support.sglang_cases import (
    MANY,
    STOP,
    ask,
    assert_from,
    free_port,
    of,
    original,
    prompt,
    request,
)
from transformers import AutoModelForCausalLM

from swirl_fast.config import EngineConfig
from swirl_fast.engines.engine import EngineError, Request, Sampling
from swirl_fast.engines.sglang.client import AnswerError, Client
from swirl_fast.engines.sglang.servers import Servers

# --- one request ---


def test_a_request_asks_for_what_was_meant(serve, attach, model: Path) -> None:
    server = serve()
    engine = attach(server)
    sampling = Sampling(5, temperature=0.7, top_p=0.9, top_k=3)
    asked = Request(prompt(1, 12), sampling, n=3, stop_ids=(STOP, 9), seed=5)
    (completions,) = engine.generate([asked])
    assert [(c.tokens.tolist(), c.logprobs) for c in completions] == of(original(model), asked)
    body = server.fake.of("/generate")[-1]["body"]
    assert body["input_ids"] == list(asked.tokens) and body["return_logprob"] and body["extra_key"] == "swirl:0"
    wanted = {"n": 3, "max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "stop_token_ids": [STOP, 9]}
    assert wanted.items() <= body["sampling_params"].items()
    assert body["sampling_params"]["ignore_eos"] is False and "sampling_seed" not in body["sampling_params"]
    engine.generate([Request([1, 2], Sampling(3))])
    parameters = server.fake.of("/generate")[-1]["body"]["sampling_params"]
    assert parameters["ignore_eos"] is True and parameters["top_k"] == -1


def test_seeds_where_the_server_takes_them(serve, attach, model: Path) -> None:
    server = serve(deterministic=True)
    engine = attach(server)
    one, other = (Request(prompt(1, 12), Sampling(5), n=4, seed=seed) for seed in (1, 2))
    ((a,), (b,), (c,)) = (engine.generate([r]) for r in (one, other, one))
    assert len({tuple(completion.tokens) for completion in a}) == 4, "the samples of one request differ"
    assert [x.tokens.tolist() for x in a] == [x.tokens.tolist() for x in c] != [x.tokens.tolist() for x in b]


@pytest.mark.parametrize("how", FIELDS)
def test_a_wrong_field_is_an_error_that_names_it(serve, attach, model: Path, how: str) -> None:
    server = serve()
    engine = attach(server)
    asked = next(r for r in (request(i) for i in range(50)) if len(of(original(model), r)[0][0]) == 6)
    server.fake.misbehave("/generate", how)
    with pytest.raises(AnswerError) as error:
        engine.generate([asked])
    assert FIELDS[how][0] in str(error.value) and server.url in str(error.value)
    assert len(server.fake.of("/generate")) == 1, "asking again cannot mend it"
    assert_from(engine.generate([asked]), [asked], original(model), 0)


@pytest.mark.parametrize("how", ["no-json", "list", "one too few"])
def test_an_answer_of_another_kind_is_an_error(serve, attach, model: Path, how: str) -> None:
    server = serve()
    engine = attach(server)
    server.fake.misbehave("/generate", how)
    with pytest.raises(AnswerError, match="not JSON" if how == "no-json" else "completions instead of 2"):
        engine.generate([request()])
    assert_from(engine.generate([request()]), [request()], original(model), 0)


@pytest.mark.parametrize("how", ["500", "503", "429", "cut", "drop", "abort", "hang", "drip"])
@pytest.mark.parametrize("servers", [1, 2])
def test_one_failure_is_tried_again(serve, attach, model: Path, how: str, servers: int) -> None:
    """Elsewhere where there is another; the server is not dropped, for it is healthy."""
    fakes = [serve() for _ in range(servers)]
    engine = attach(*fakes, timeout=1.0)
    fakes[0].fake.misbehave("/generate", how)
    assert_from(engine.generate([request(0)]), [request(0)], original(model), 0)
    assert [len(fake.fake.of("/generate")) for fake in fakes] == ([2] if servers == 1 else [1, 1])
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert all(len(fake.fake.of("/generate")) > 2 for fake in fakes)


@pytest.mark.parametrize("how", ["500", "abort", "cut"])
def test_a_lasting_failure_is_an_error_with_the_number_of_tries(serve, attach, how: str) -> None:
    server = serve()
    engine = attach(server, retries=2)
    server.fake.misbehave("/generate", how, -1)
    with pytest.raises(EngineError, match=r"failed 3 times \(engine.retries=2\)") as error:
        engine.generate([request()])
    assert str(error.value).count(server.url) == 3 and "goes on from what is stored" in str(error.value)
    assert len(server.fake.of("/generate")) == 3
    server.fake.behave()
    assert engine.generate([request()])


def test_a_failing_server_does_not_end_the_others_work(serve, attach, model: Path) -> None:
    bad, good = serve(), serve()
    engine = attach(bad, good)
    bad.fake.misbehave("/generate", "500", -1)
    assert_from(engine.generate(MANY), MANY, original(model), 0)


@pytest.mark.parametrize(("how", "error", "match"), [("400", ValueError, "HTTP 400"), ("404", EngineError, "HTTP 404")])
def test_a_refused_request_is_not_tried_again(serve, attach, how: str, error: type, match: str) -> None:
    server = serve()
    engine = attach(server)
    server.fake.misbehave("/generate", how)
    with pytest.raises(error, match=match):
        engine.generate([request()])
    assert len(server.fake.of("/generate")) == 1


def test_impossible_requests_are_refused_here(serve, attach) -> None:
    server = serve(context=64)
    engine = attach(server)
    assert engine.max_context == 58, "the server's own limit counts"
    for bad in (
        Request([], Sampling(3)),
        Request([1], Sampling(58)),
        Request([1], Sampling(0)),
        Request([1], Sampling(3), n=0),
        Request([1], Sampling(3, temperature=-1)),
        Request([1], Sampling(3, top_p=0)),
    ):
        with pytest.raises(ValueError, match="request 1"):
            engine.generate([request(), bad])
    assert not server.fake.of("/generate")
    assert engine.generate([Request([1], Sampling(57))])


def test_the_key(serve, attach, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(api_key="secret")
    with pytest.raises(EngineError, match=r"refuses the key .* engine.api_key_env") as error:
        attach(server)
    monkeypatch.setenv("SGLANG_API_KEY", "wrong")
    with pytest.raises(EngineError, match="engine.api_key_env") as error:
        attach(server)
    assert "wrong" not in str(error.value) and "secret" not in str(error.value)
    monkeypatch.setenv("OTHER", "secret")
    engine = attach(server, api_key_env="OTHER")
    assert engine.generate([request()])
    server.fake.misbehave("/generate", "401")
    with pytest.raises(EngineError, match="engine.api_key_env"):
        engine.generate([request()])


def test_a_proxy_of_the_environment_is_for_servers_elsewhere(serve, attach, model: Path, monkeypatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    assert_from(attach(serve()).generate(MANY), MANY, original(model), 0)
    elsewhere = "http://10.0.0.2:30000"
    assert not Client(elsewhere, "", 1.0)._http.direct
    assert Client(elsewhere, "", 1.0, direct=True)._http.direct
    for attached in (True, False):
        config = EngineConfig(urls=[elsewhere] if attached else [])
        servers = Servers(config, Path("unused"), "", "", 0, leader=False, urls=[elsewhere])
        assert servers.all[0].client._http.direct != attached, "what a command of ours started is asked directly"


@pytest.mark.parametrize("path", ["/model_info", "/server_info", "/v1/models"])
@pytest.mark.parametrize("how", ["list", "no-json", "404"])
def test_what_is_no_sglang_server_is_named(serve, attach, path: str, how: str) -> None:
    server = serve()
    server.fake.misbehave(path, how)
    with pytest.raises(EngineError, match="SGLang|not JSON") as error:
        attach(server)
    assert server.url in str(error.value)


def test_no_server_there(attach) -> None:
    with pytest.raises(EngineError, match=r"engine.urls: http://127.0.0.1:\d+/model_info.*running there"):
        attach(f"http://127.0.0.1:{free_port()}")


# --- attached servers that fail ---


@pytest.mark.parametrize("how", ["hang", "drop", "503"])
def test_a_server_without_a_sign_of_life_is_dropped(serve, attach, model: Path, how: str) -> None:
    dead, good = serve(), serve()
    engine = attach(dead, good, timeout=1.0)
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    dead.fake.misbehave("*", how, -1)
    with pytest.warns(UserWarning, match=f"{dead.url} is dropped"):
        assert_from(engine.generate(MANY), MANY, original(model), 0)
    before = len(dead.fake.requests)
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert len(dead.fake.requests) == before
    good.fake.misbehave("*", how, -1)
    with pytest.raises(EngineError) as error:
        engine.generate(MANY)
    assert (
        dead.url in str(error.value) and good.url in str(error.value) and "no SGLang server is left" in str(error.value)
    )


@pytest.mark.parametrize("how", ["stale", "stale span"])
def test_stale_weights_are_never_returned(serve, attach, model: Path, how: str) -> None:
    stale, good = serve(), serve()
    engine = attach(stale, good)
    stale.fake.misbehave("/generate", how, -1)
    with pytest.warns(UserWarning, match=f"{stale.url} is dropped.*somebody:7"):
        assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert engine.generate(MANY) and len(stale.fake.of("/generate")) <= len(MANY)
    good.fake.misbehave("/generate", how, -1)
    with pytest.raises(EngineError) as error:
        engine.generate(MANY)
    assert all(part in str(error.value) for part in (stale.url, good.url, "somebody:7"))


def test_somebody_else_updates_a_server(serve, attach, model: Path, tmp_path: Path) -> None:
    """Also when the weights' names differ in nothing but the run's label."""
    theirs, ours = serve(), serve()
    engine = attach(theirs, ours)
    AutoModelForCausalLM.from_pretrained(model).half().save_pretrained(tmp_path / "other")
    body = {"model_path": str(tmp_path / "other"), "weight_version": "other:0"}
    ask(theirs.url, "/update_weights_from_disk", body)
    with pytest.warns(UserWarning, match=f"{theirs.url} is dropped.*other:0"):
        assert_from(engine.generate(MANY), MANY, original(model), 0)
