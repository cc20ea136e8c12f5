"""What a training step sampled lies in the run's folder as it was, whatever the ranks and however often the training was stopped."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import small_models
from support.parallel_variants import STEPS, Coin, Watched, config_of, trainer_of
from support.runs import environment
from support.torchrun import CPU

from swirl_fast.config import Config, ConfigError, load
from swirl_fast.data.samples import Sample, full_from, read_samples, sample_steps, samples_file
from swirl_fast.engines.engine import Completion
from swirl_fast.formats.format import Action
from swirl_fast.formats.tags import parse
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.at_states import SampledAction
from swirl_fast.rollouts.pipeline import RolloutCounts, SampledBatch
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.training.resume import settings_of
from swirl_fast.training.samples import SampleLog, samples_of
from swirl_fast.trajectory import Step, StepView, Trajectory
from swirl_fast.verdict import Judgement, Verdict

ONE = Ranks(0, 1, CPU)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    small_models.build("llama", torch.float32).save_pretrained(folder)
    return folder


def config_in(folder: Path, model: Path, **training: Any) -> Config:
    config = config_of(model, "plain")
    config.run.folder, config.training.checkpoint_every = str(folder), 1
    for name, value in training.items():
        setattr(config.training, name, value)
    config.folder.mkdir(parents=True, exist_ok=True)
    return config


class Grader(Coin):
    """Rewards by degrees, none at times, and reasons that no file format likes."""

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        return [self.of(int(step.action_text.removesuffix("</answer>").removeprefix("<answer>"))) for step in steps]

    def of(self, number: int) -> Judgement:
        if number % 5 == 4:
            return Judgement(Verdict.UNKNOWN, "no reply")
        return Judgement.graded(number % 5 / 3, f'{number}\n\u2028\x85\t\\ud83d \ud83d "é" 日本')


def trained(config: Config, ranks: Ranks = ONE) -> tuple[Watched, list[tuple[SampledBatch, Any]]]:
    """The trainer after its run, and the batch and advantages of each of its steps."""
    trainer = trainer_of(config, ranks, [], Grader())
    steps: list[tuple[SampledBatch, Any]] = []
    made = trainer._advantages

    def advantages(batch: SampledBatch, actions: Any) -> Any:
        steps.append((batch, made(batch, actions)))
        return steps[-1][1]

    trainer._advantages = advantages  # type: ignore[method-assign]
    trainer.restore()
    trainer.run()
    return trainer, steps


def files(config: Config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((config.folder / "samples").glob("*"))}


def test_every_sampled_action_is_there_as_it_was_learned_from(llama: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, llama, updates_per_batch=1)
    trainer, steps = trained(config)
    assert sample_steps(config.folder) == [1, 2, 3] and len(files(config)) == 3
    for step, (batch, (advantage_A, valid_A)) in enumerate(steps, 1):
        samples = list(read_samples(config.folder, step))
        assert len(samples) == len(batch.sampled) == trainer.rows[step - 1]["actions"] > 60
        assert [(s.place, s.state, s.sample) for s in samples] == [
            (t, i, k) for t, one in enumerate(batch.trajectories) for i in range(one.num_steps) for k in range(3)
        ]
        for number, (sample, drawn, judgement) in enumerate(zip(samples, batch.sampled, batch.judgements, strict=True)):
            trajectory = batch.trajectories[drawn.trajectory]
            assert (sample.step, sample.trajectory, sample.question_id) == (step, trajectory.id, trajectory.question_id)
            assert (sample.task, sample.question, sample.observation) == (trajectory.task, trajectory.question, None)
            assert sample.state == len(drawn.view.history) and sample.text == drawn.view.action_text
            assert (sample.kind, sample.argument) == ("answer", drawn.action.argument)
            assert sample.tokens == len(drawn.completion.tokens) and not sample.cut_off and sample.error == ""
            assert (sample.verdict, sample.reward) == (judgement.verdict.value, judgement.reward)
            assert sample.reason == judgement.reason
            if valid_A[number]:
                assert np.float32(sample.advantage) == advantage_A[number].numpy()
            else:
                assert sample.advantage is None
        assert {sample.verdict for sample in samples} == {"GOOD", "BAD", "UNKNOWN"}
        assert any(sample.reward not in (0.0, 1.0, None) for sample in samples)
        assert any(sample.advantage is None for sample in samples)


def test_a_stop_changes_nothing(llama: Path, tmp_path: Path) -> None:
    through, stopped = config_in(tmp_path / "through", llama), config_in(tmp_path / "stopped", llama, steps=1)
    for config, steps in ((through, STEPS), (stopped, 1), (stopped, STEPS)):
        config.training.steps = steps
        trained(config)
    assert files(stopped) == files(through) and len(files(through)) == STEPS


def test_a_batch_that_was_sampled_beside_the_training_is_written_with_the_step_that_learned_from_it(
    llama: Path, tmp_path: Path
) -> None:
    plain = config_in(tmp_path / "plain", llama)
    lagging = config_in(tmp_path / "lagging", llama, lag=1)
    for config in (plain, lagging):
        trained(config)
    assert files(plain) == files(lagging) and len(files(plain)) == STEPS


def test_steps_that_are_repeated_are_rewritten_and_earlier_ones_stay(llama: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, llama, steps=2)
    trained(config)
    before, folder = files(config), config.folder / "samples"
    samples_file(config.folder, 1).write_bytes(before["step_000001.jsonl"] + b"\n")  # to be told from a new one
    (folder / "step_000003.jsonl").write_text("of a run that died after its last checkpoint", encoding="utf-8")
    (folder / "step_000009.jsonl").write_text("the same", encoding="utf-8")
    (folder / "step_000003.jsonl.0af1.tmp").write_text("half", encoding="utf-8")
    (folder / "notes.txt").write_text("of the user", encoding="utf-8")
    config.training.steps = 3
    trained(config)
    after = files(config)
    assert after.keys() == {*before, "step_000003.jsonl", "notes.txt"}
    assert after["step_000001.jsonl"] == before["step_000001.jsonl"] + b"\n"
    assert after["step_000002.jsonl"] == before["step_000002.jsonl"]
    assert len(list(read_samples(config.folder, 3))) > 60


def test_a_full_folder_keeps_what_it_has_and_says_once_what_is_missing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = config_in(tmp_path / "all", llama)
    trained(everything)
    sizes = [len(content) for content in files(everything).values()]
    config = config_in(tmp_path / "some", llama, samples_mb=(sizes[0] + sizes[1] - 1) / 1e6)
    capsys.readouterr()
    trained(config)
    assert sample_steps(config.folder) == [1] and full_from(config.folder) == (2, sizes[1])
    assert files(config)["step_000001.jsonl"] == files(everything)["step_000001.jsonl"]
    said = [line for line in capsys.readouterr().out.splitlines() if "samples" in line]
    assert len(said) == 1 and "the samples of step 2 (" in said[0] and "training.samples_mb=" in said[0]
    exact = config_in(tmp_path / "exact", llama, samples_mb=sum(sizes) / 1e6)
    trained(exact)
    assert files(exact) == files(everything), "the limit itself is allowed"
    assert "samples" not in capsys.readouterr().out


def test_a_full_folder_is_full_until_there_is_room(tmp_path: Path) -> None:
    """Steps of one action each; the second is too large, the third would fit and is not kept either, also after a stop."""

    def write(step: int, text: str, after: int, limit: float = 2e-3) -> list[int]:
        batch = batch_of([text])
        SampleLog(tmp_path, after, ONE, limit).write(step, batch, torch.zeros(1), torch.ones(1, dtype=torch.bool))
        return sample_steps(tmp_path)

    assert write(1, "a", 0) == [1] and full_from(tmp_path) is None
    assert write(2, "b" * 2000, 1) == [1] and full_from(tmp_path)
    assert write(3, "c", 2) == [1], "a stop makes no room"
    assert write(2, "b", 1) == [1, 2] and full_from(tmp_path) is None, "the step that did not fit is repeated"
    assert write(3, "c" * 2000, 2) == [1, 2]
    assert write(4, "d", 3, limit=1.0) == [1, 2, 4] and full_from(tmp_path) is None, "a higher limit makes room"


def test_nothing_is_kept_where_nothing_is_asked_for_or_sampled(llama: Path, tmp_path: Path) -> None:
    off = config_in(tmp_path / "off", llama, samples_mb=0.0)
    trained(off)
    assert not (off.folder / "samples").exists() and sample_steps(off.folder) == []
    imitated = SampledBatch([], [], None, RolloutCounts(), 0.0)
    SampleLog(tmp_path / "sft", 0, ONE, 1.0).write(1, imitated, torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert not (tmp_path / "sft").exists()


def test_the_limit_is_a_setting_that_a_checkpoint_does_not_depend_on() -> None:
    assert load(None, []).training.samples_mb == 64 and load(None, ["training.samples_mb=.inf"])
    with pytest.raises(ConfigError, match=r"training\.samples_mb=.*must be at least 0"):
        load(None, ["training.samples_mb=-1"])
    assert "samples_mb" not in settings_of(load(None, []), "judge")["training"]


def test_a_file_is_readable_by_whom_the_others_of_a_run_are(llama: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path, llama, steps=1)
    trained(config)
    modes = {
        stat.S_IMODE(path.stat().st_mode) for path in (samples_file(config.folder, 1), config.folder / "metrics.jsonl")
    }
    assert len(modes) == 1


# ---- rows by themselves


def batch_of(texts: Sequence[str], whole: bool = False) -> SampledBatch:
    """One trajectory of two steps; every text is sampled at its second state. whole: its own two steps, for each of two questions twice."""
    action = Action("tool", "calculator", "1 + 1")
    steps = [
        Step(2, 3, "<math_exp>1 + 1</math_exp>", action, [-1.0], 0, "1 + 1 -> 2"),
        Step(4, 5, "a", action, [-1.0], 0),
    ]
    completion = Completion(np.array([5, 6, 7], np.int32), [-1.0] * 3, "stop", 4)
    if not whole:
        one = Trajectory("t", "q", "gsm8k", "?", 0, 2, [1, 2, 3, 4, 5], steps)
        view = one.view(1)
        sampled = [
            SampledAction(
                0,
                0,
                completion,
                parse(text, [CALCULATOR], truncated=not k),
                StepView("gsm8k", "?", view.history, text),
            )
            for k, text in enumerate(texts)
        ]
        return SampledBatch([one], sampled, [Judgement(Verdict.BAD, "why")] * len(texts), RolloutCounts(), 0.0)
    fresh = [Trajectory(f"f{n}", f"q{n // 2}", "gsm8k", "?", n, 2, [1, 2, 3, 4, 5], steps) for n in range(4)]
    sampled = [SampledAction(t, 2 * t + i, completion, action, fresh[t].view(i)) for t in range(4) for i in range(2)]
    return SampledBatch(fresh, sampled, [Judgement.graded(0.25, "")] * 8, RolloutCounts(), 0.0, [0, 0, 1, 1])


def test_malformed_and_cut_off_actions_are_called_so() -> None:
    batch = batch_of(["x", "<answer>", "<math_exp>2</math_exp>"])
    cut, open_tag, call = samples_of(7, batch, torch.tensor([-0.1, 0.2, 1 / 3]), torch.tensor([True, True, False]), ONE)
    assert (cut.kind, cut.cut_off) == ("malformed", True) and cut.error.startswith("The turn was too long")
    assert (open_tag.kind, open_tag.cut_off, open_tag.tool) == ("malformed", False, None) and open_tag.error
    assert (call.kind, call.tool, call.argument, call.error) == ("tool", "calculator", "2", "")
    assert [one.advantage for one in (cut, open_tag, call)] == [-0.1, 0.2, None], "the shortest digits of a float32"
    assert {(one.step, one.state, one.tokens, one.policy_version) for one in (cut, open_tag, call)} == {(7, 1, 3, 4)}
    assert [one.sample for one in (cut, open_tag, call)] == [0, 1, 2]


def test_whole_trajectories_have_places_of_their_own_and_what_their_tools_answered() -> None:
    """Of two ranks: questions take turns, the trajectories of a question stay together."""
    batch, zeros, all_ = batch_of([], whole=True), torch.zeros(8), torch.ones(8, dtype=torch.bool)
    of_ranks = [samples_of(1, batch, zeros, all_, Ranks(rank, 2, CPU)) for rank in range(2)]
    assert [[one.place for one in samples] for samples in of_ranks] == [
        [0, 0, 1, 1, 4, 4, 5, 5],
        [2, 2, 3, 3, 6, 6, 7, 7],
    ]
    assert [one.state for one in of_ranks[0]] == [0, 1] * 4 and {one.sample for one in of_ranks[0]} == {0}
    assert [one.observation for one in of_ranks[0]] == ["1 + 1 -> 2", None] * 4
    assert {one.reward for one in of_ranks[0]} == {0.25}


# ---- reading


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    batch = batch_of(["one \u2028 \ud83d", "two\n\\ud83d", "three 日本"])
    SampleLog(tmp_path, 0, ONE, 1.0).write(12, batch, torch.zeros(3), torch.ones(3, dtype=torch.bool))
    return tmp_path


def test_any_text_is_read_back_and_other_readers_see_lines_of_json(kept: Path) -> None:
    text = samples_file(kept, 12).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
    assert [row["text"] for row in rows] == ["one \u2028 \ud83d", "two\n\\ud83d", "three 日本"] and "日本" in text
    assert [vars(sample) for sample in read_samples(kept, 12)] == rows
    (kept / "samples" / "step_x.jsonl").touch()
    (kept / "samples" / "step_000002.jsonl.0af1.tmp").touch()
    assert sample_steps(kept) == [12]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda line: line[: len(line) // 2], "Unterminated string|Expecting|Invalid"),
        (lambda line: b"[1]", "not a JSON object"),
        (lambda line: line.replace(b'"reward"', b'"award"'), "there is no 'reward'"),
        (lambda line: line.replace(b'"state": 1', b'"state": "one"'), "'state' is 'one'"),
        (lambda line: b"\xff" + line, "utf|codec|Expecting"),
    ],
)
def test_a_damaged_line_is_named(kept: Path, damage: Any, said: str) -> None:
    path = samples_file(kept, 12)
    first, second, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage(second), third]))
    samples = read_samples(kept, 12)
    assert isinstance(next(samples), Sample)
    with pytest.raises(ValueError, match=rf"step_000012\.jsonl, line 2: .*({said})"):
        next(samples)


def test_a_number_that_a_tool_rounded_is_a_number_and_what_later_versions_add_is_left_out(kept: Path) -> None:
    path = samples_file(kept, 12)
    path.write_bytes(path.read_bytes().replace(b'"reward": 0.0', b'"colour": "red", "reward": 0'))
    assert [sample.reward for sample in read_samples(kept, 12)] == [0, 0, 0]


def test_a_step_that_is_not_there_is_an_error_that_says_which_are(kept: Path) -> None:
    with pytest.raises(ValueError, match=r"step_000013\.jsonl does not exist: there are those of 1 steps, 12 to 12"):
        list(read_samples(kept, 13))
    with pytest.raises(ValueError, match=r"there are none \(training\.samples_mb"):
        list(read_samples(kept / "elsewhere", 1))


def test_reading_needs_no_torch() -> None:
    code = "import sys, swirl_fast.data.samples; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0
