"""What makes every run of the tests the same, and a small real model for the tests of whole stages: made here, nothing is downloaded."""

from __future__ import annotations

import os
import random
import threading
import zlib
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

# Sums in one order whatever the machine; and two workers with two threads each would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Scripts of support/ that tests start find their neighbours here.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from support.interpreter import patch_once_a_launch

# Loaded before any test module is imported: a test's own @settings takes the rest from the profile of that moment. Examples may take as
# long as a busy machine needs. `make fuzz` chooses "fuzz"; its failures stay in .hypothesis/ and are tried first the next time.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("fixed", derandomize=True, database=None, max_examples=50, **PATIENT)
settings.register_profile("fuzz", max_examples=300, **PATIENT)
settings.load_profile("fixed")

# The kernels before the stages: one worker makes `tiny_model` while the other is not waiting for it yet.
LONGEST = ("kernels", "stages", "training", "engines", "benchmarks", "experiments", "models", "data")


@pytest.hookimpl(trylast=True)  # when Hypothesis has read --hypothesis-profile
def pytest_configure() -> None:
    if settings.get_current_profile_name() == "fixed":
        # Hypothesis also draws constants of the modules that happen to be imported, and those depend on the tests that ran before.
        providers._get_local_constants = Constants


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers the longest files come first, so that none is left alone with one of them at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(
            key=lambda item: next(
                (i for i, name in enumerate(LONGEST) if item.nodeid.startswith(f"tests/{name}/")), len(LONGEST)
            )
        )


def pytest_collection_finish() -> None:
    if "TRITON_INTERPRET" in os.environ:
        patch_once_a_launch()


def _seed(name: str) -> None:
    """For what draws without a seed of its own: the same numbers in any order of tests and on any worker."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.nodeid)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a two-layer Llama that has been taught the tags, so that its actions are sometimes good.

    Made once; with pytest-xdist the other workers wait for the first and take its model. It is read, never written.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "taught"
    with FileLock(shared / "taught.lock"):
        if not folder.exists():
            unfinished = tmp_path_factory.mktemp("tiny_model")
            _teach(unfinished)
            unfinished.rename(folder)
    return folder


def _teach(folder: Path) -> None:
    """Plain next-token training on rendered conversations for some seconds; what the model writes inside the tags is mostly wrong."""
    from support.small_models import SHAPE, train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from swirl_fast.config import TasksConfig
    from swirl_fast.rendering import Renderer, conversation
    from swirl_fast.tasks import load_task
    from swirl_fast.tools.calculator import Calculator
    from swirl_fast.tools.tool import CALCULATOR

    torch.manual_seed(0)
    task = load_task(
        TasksConfig(limit=80, eval_limit=1, options={"min_terms": 2, "max_terms": 2, "max_digits": 1}), seed=1
    )
    calculator = Calculator()
    messages = [conversation(q.text, [CALCULATOR], 3, task.examples[:1]) for q in task.questions("train")]
    tokenizer = train_tokenizer([m["content"] for one in messages[:20] for m in one])
    renderer = Renderer(tokenizer)
    draw = random.Random(0)
    rows = []
    for question, one in zip(task.questions("train"), messages, strict=True):
        expression = question.text.split(":")[-1].strip(" =?.")
        result = calculator.call(expression)
        first = f"<math_exp>{draw.choice([expression, expression, '1 + 1'])}</math_exp>"
        second = f"<answer>{draw.choice([result, result, '7'])}</answer>"
        parts = [
            (renderer.prompt(one), False),
            ([*tokenizer.encode(first), renderer.stop_id], True),
            (renderer.observation(f"{expression} -> {result}", stopped=True), False),
            ([*tokenizer.encode(second), renderer.stop_id], True),
        ]
        tokens = [token for part, _ in parts for token in part]
        rows.append((torch.tensor(tokens), torch.tensor([t if own else -100 for part, own in parts for t in part])))
    calculator.close()
    model = LlamaForCausalLM(
        LlamaConfig(
            **{**SHAPE, "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128},
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        tokens, labels = zip(*draw.sample(rows, 8), strict=True)
        tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def judged() -> Iterator[str]:
    """The overrides that make the server the judge."""
    from support.endpoints import JudgeServer

    server = ThreadingHTTPServer(("127.0.0.1", 0), JudgeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"judge={{kind: model, model: {{url: 'http://127.0.0.1:{server.server_port}/v1'}}}}"
    server.shutdown()
    server.server_close()
