"""A run's folder as one object: trajectories, steps, metrics, samples, evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from swirl_fast.config import Config, ConfigError, load
from swirl_fast.data import samples
from swirl_fast.data.store import Store
from swirl_fast.files import is_folder
from swirl_fast.outputs.folder import RunFolder, by_question
from swirl_fast.outputs.readings import Reading, Readings
from swirl_fast.outputs.text import clean
from swirl_fast.tasks.task import Question

if TYPE_CHECKING:
    from swirl_fast.outputs.progress import Status

COLLECTED = "collected"  # in the place of an evaluation's name: what `collect` left


class OpenRun:
    """A run to read, also while a stage writes it: every call reads what is there at that moment, and nothing is ever written.

    folder: all that the run left. Use as a context manager, or call `close`. One thread.

    Raises ValueError where there is no such folder. What a method reads may be missing or damaged: then it raises ValueError, which names
    the file and the remedy.

        with OpenRun("runs/quickstart") as run:
            for one in run.trajectories():
                print(one.trajectory.question, one.verdicts, one.matches)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not is_folder(self.folder):
            raise ValueError(f"{self.folder} is not a folder: check run.folder and run.name, or start a run first")
        self._stores: dict[str, Store] = {}
        self._closed = False

    def close(self) -> None:
        """Closes the databases; nothing can be read of them from then on."""
        self._closed = True
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OpenRun({str(self.folder)!r})"

    @property
    def files(self) -> RunFolder:
        """The small files of the run, read now; damaged ones are named in `files.problems`, not raised."""
        return RunFolder.read(self.folder)

    @property
    def config(self) -> Config:
        """The settings that the run was made with, from its config.yaml.

        Raises ConfigError where that is missing, damaged, or has settings that this version does not know.
        """
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise ConfigError(f"{path} is not there: the first stage of a run writes it")
        return load(path, files=False)

    def status(self) -> Status:
        """Which stages are done, what comes next, and the numbers so far; `print(run.status())` shows it as text."""
        from swirl_fast.outputs.progress import status

        return status(self)

    def store(self, of: str = COLLECTED) -> Store:
        """The database of the collected trajectories, or of an evaluation, for reading. It is closed with the run."""
        if self._closed:
            raise ValueError(f"{self!r} is closed: open the run again")
        if of not in self._stores:
            path = self.files.store if of == COLLECTED else self.folder / "evaluations" / f"{of}.db"
            if of != COLLECTED and not path.is_file():
                names = ", ".join([COLLECTED, *self.evaluation_names()])
                raise ValueError(f"{path} does not exist: the trajectories of this run are {names}")
            self._stores[of] = Store(path, writable=False)
        return self._stores[of]

    def evaluation_names(self) -> list[str]:
        """Those whose trajectories are there, finished or not; base and trained first."""
        names = {path.stem for path in (self.folder / "evaluations").glob("*.db")}
        return sorted(names, key=lambda name: (name != "base", name != "trained", name))

    def questions(self, of: str = COLLECTED) -> list[Question]:
        """The questions with their gold answers, in the order in which they were asked. of: `collected`, or an evaluation's name."""
        return self.store(of).questions()

    def trajectories(
        self, of: str = COLLECTED, ids: Sequence[str] | None = None, judge: str | None = None
    ) -> Iterator[Reading]:
        """Trajectories with their gold answers and one judgement a step, a batch of them in memory at a time; unfinished ones too.

        of: `collected`, or an evaluation's name. ids: which and in which order; None: all. judge: whose judgements, by its id; None: the
        one that the run was filtered or evaluated by, or else the one with most verdicts.
        """
        store = self.store(of)
        yield from self.readings(of, judge).of(store.ids() if ids is None else ids)

    def readings(self, of: str = COLLECTED, judge: str | None = None) -> Readings:
        """As `trajectories`, to be asked for ids later."""
        files = self.files
        evaluation = files.evaluations.get(of, {}) if of != COLLECTED else {}
        judge_id = judge or (files.judge_id if of == COLLECTED else evaluation.get("judge"))
        return Readings(self.store(of), judge_id, by_question(evaluation, "accuracy"))

    def steps(self, of: str = COLLECTED, judge: str | None = None) -> Iterator[dict[str, Any]]:
        """The steps of all trajectories as flat rows, fit for `pandas.DataFrame(run.steps())`. Arguments as of `trajectories`.

        step: 0-based. kind: tool, answer or malformed. tokens: their number. logprob: sum over the action's tokens, in nats. verdict,
        reward, reason: None for a step that was not judged; reward: None for UNKNOWN as well. finish, right: of the whole trajectory;
        right: whether its answer is a gold answer, None without an answer. Lone surrogates in texts, which pandas refuses, become U+FFFD.
        """
        for reading in self.trajectories(of, judge=judge):
            for i in range(reading.trajectory.num_steps):
                yield clean(_step_row(reading, i))

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, one a training step, NaN where a number is missing; docs/metrics.md explains them. Empty before
        training. A last line that is still being written is left out."""
        files = self.files
        problem = next((each for each in files.problems if each.startswith("`metrics.jsonl`")), None)
        if problem:
            raise ValueError(f"{self.folder}: {problem}")
        return files.metrics

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Name -> numbers of the finished evaluations, base and trained first. Unreadable ones are left out (see `files.problems`)."""
        return self.files.evaluations

    def sample_steps(self) -> list[int]:
        """The training steps whose sampled actions are there."""
        return samples.sample_steps(self.folder)

    def samples(self, step: int) -> list[dict[str, Any]]:
        """The actions that a training step sampled, with verdict, reward and advantage (see data/samples.py)."""
        return [clean(vars(sample)) for sample in samples.read_samples(self.folder, step)]


def _step_row(reading: Reading, i: int) -> dict[str, Any]:
    whole, step, judgement = reading.trajectory, reading.trajectory.steps[i], reading.judgements[i]
    return {
        "trajectory": whole.id,
        "question_id": whole.question_id,
        "task": whole.task,
        "question": whole.question,
        "step": i,
        "kind": step.action.kind,
        "tool": step.action.tool,
        "argument": step.action.argument,
        "error": step.action.error,
        "text": step.text,
        "observation": step.observation,
        "tokens": step.end - step.start,
        "logprob": sum(step.logprobs),
        "policy_version": step.policy_version,
        "verdict": judgement and judgement.verdict.value,
        "reward": judgement and judgement.reward,
        "reason": judgement and judgement.reason,
        "finish": whole.finish and whole.finish.value,
        "right": reading.matches,
    }


def find_run(name: str | None, config: Config) -> Path:
    """The folder of a run. name: a folder, or the name of a run under run.folder; None: the run that the config names.

    Raises ConfigError where there is none, with the runs that run.folder holds.
    """
    above = Path(config.run.folder).expanduser()
    tried = [config.folder] if name is None else list(dict.fromkeys([Path(name).expanduser(), above / name]))
    folder = next((folder for folder in tried if is_folder(folder)), None)
    if folder is not None and (not (inside := _runs(folder)) or _is_run(folder)):
        return folder
    if folder is not None:
        raise ConfigError(f"{folder} is not a run; it holds {_named(inside)}: name one of them")
    runs = _runs(above)
    raise ConfigError(
        f"there is no run {' or '.join(map(str, tried))}; {above} holds {_named(runs) if runs else 'no run'}; name a run's folder, or give "
        "its settings with --config FILE"
    )


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "trajectories.db", "evaluations"))


def _runs(folder: Path) -> list[str]:
    """The names of the runs in a folder of runs."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_run(path)) if folder.is_dir() else []


def _named(runs: Sequence[str]) -> str:
    return ", ".join(runs[:10]) + (f" and {len(runs) - 10} more" if len(runs) > 10 else "")
