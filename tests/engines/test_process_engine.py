"""The local engine in a process of its own: same results, same errors, and an end that is told."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import pytest
import torch
from support import forks
from support.local_engines import build, engine_of, make, mixed_requests
from support.processes import runs
from support.runs import environment
from torch import Tensor

from swirl_fast.engines import process
from swirl_fast.engines.engine import Completion, EngineError
from swirl_fast.engines.local.engine import LocalEngine
from swirl_fast.engines.process import ProcessEngine


def build_under_signals() -> LocalEngine:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return build()


def build_short_of_memory() -> LocalEngine:
    """There the second tensor that is handed over cannot be copied, the first time."""
    engine = build()
    real, count = Tensor.clone, 0

    def clone(tensor: Tensor, *arguments: object, **named: object) -> Tensor:
        nonlocal count
        count += tensor.is_shared()
        if tensor.is_shared() and count == 2:
            raise torch.OutOfMemoryError("no room for a second copy")
        return real(tensor, *arguments, **named)

    Tensor.clone = clone  # type: ignore[method-assign,assignment]
    return engine


def tokens(results: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[completion.tokens.tolist() for completion in one] for one in results]


@pytest.fixture(scope="module")
def engine():
    one = ProcessEngine(build, threads=1)
    yield one
    one.close()


def test_it_gives_what_the_engine_gives_here(engine):
    here = build()
    for round_ in range(2):
        requests = mixed_requests(round_)
        found, wanted = engine.generate(requests), here.generate(requests)
        assert tokens(found) == tokens(wanted)
    assert engine.max_context == here.max_context
    assert engine.stats().cached_tokens == here.stats().cached_tokens > 0


def test_weights_arrive_in_pieces_and_stay_the_trainers_own(engine, monkeypatch):
    monkeypatch.setattr(process, "BUCKET_BYTES", 4096)
    model = make(seed=1)
    engine.update_weights(model.named_parameters(), 7)
    requests = mixed_requests(0)
    found, wanted = engine.generate(requests), engine_of(model).generate(requests)
    assert tokens(found) == tokens(wanted)
    assert {c.policy_version for one in found for c in one} == {7}
    assert not any(parameter.is_shared() for parameter in model.parameters())


def test_a_refused_update_changes_nothing_and_leaves_it_usable(engine, monkeypatch):
    monkeypatch.setattr(process, "BUCKET_BYTES", 4096)
    requests = mixed_requests(0)
    before = engine.generate(requests)
    weights = dict(make(seed=2).named_parameters())
    first = next(iter(weights))
    with pytest.raises(KeyError, match="missing"):
        engine.update_weights(list(weights.items())[1:], 8)
    with pytest.raises(KeyError, match="unknown.weight"):
        engine.update_weights({"unknown.weight": torch.zeros(1), **weights}.items(), 8)
    with pytest.raises(ValueError, match="shape"):
        engine.update_weights({**weights, first: torch.zeros(1)}.items(), 8)

    def broken():
        yield first, weights[first]
        raise RuntimeError("the gather failed")

    def broken_late():
        yield from weights.items()
        raise RuntimeError("a rank was lost")

    for tensors, reason in ((broken(), "the gather failed"), (broken_late(), "a rank was lost")):
        with pytest.raises(RuntimeError, match=reason):
            engine.update_weights(tensors, 8)
    with pytest.raises(ValueError, match="empty prompt"):
        engine.generate([type(requests[0])([], requests[0].sampling)])
    after = engine.generate(requests)
    assert tokens(after) == tokens(before)


def test_an_update_that_the_process_has_no_memory_for_says_so_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(process, "BUCKET_BYTES", 4096)
    one = ProcessEngine(build_short_of_memory, threads=1)
    try:
        requests = mixed_requests(0)
        before = one.generate(requests)
        with pytest.raises(torch.OutOfMemoryError, match="no room for a second copy"):
            one.update_weights(make(seed=1).named_parameters(), 7)
        assert tokens(one.generate(requests)) == tokens(before)
        model = make(seed=1)
        one.update_weights(model.named_parameters(), 7)
        assert tokens(one.generate(requests)) == tokens(engine_of(model).generate(requests)) != tokens(before)
    finally:
        one.close()
    assert not runs(one.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_it_outlives_signals_that_tell_the_trainer_to_stop(engine, number):
    """They come to the whole process group; the trainer's last step and its checkpoint come after them."""
    requests = mixed_requests(0)
    before = engine.generate(requests)
    os.kill(engine.pid, number)
    time.sleep(0.2)
    assert tokens(engine.generate(requests)) == tokens(before)


def test_it_outlives_them_also_while_it_starts_and_a_killed_process_is_told():
    one = ProcessEngine(build_under_signals, threads=1)
    assert one.generate(mixed_requests(0))
    os.kill(one.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="code -9"):
        one.generate(mixed_requests(0))
    one.close()
    one.close()


PROGRAM = """
import sys
from support import forks
from support.local_engines import build, mixed_requests
from swirl_fast.engines.process import ProcessEngine
if __name__ == "__main__":
    engine = ProcessEngine(build, threads=1)
    engine.generate(mixed_requests(0))
    print(engine.pid, flush=True)
    {end}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL)]
)
def test_it_ends_with_a_parent_that_does_not_close_it(tmp_path, end, code):
    (tmp_path / "program.py").write_text(PROGRAM.format(end=end))
    done = forks.run([str(tmp_path / "program.py")], environment(), timeout=100)
    assert done.returncode == code
    deadline = time.monotonic() + 60
    while runs(int(done.stdout)):
        assert time.monotonic() < deadline, "its process is still there"
        time.sleep(0.05)


def test_what_building_it_raises_is_raised_here():
    with pytest.raises(ValueError, match="no such model"):
        ProcessEngine(int, "no such model")  # a module of its own would import more there
