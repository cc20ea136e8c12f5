"""Checkpoints: DCP for model and optimizer, JSON for the loop's own state, a manifest of hashes over all of it.

A checkpoint is written under a temporary name and renamed when everything lies on disk, so that a folder `step_000010` is
whole or damaged later. DCP loads flipped bytes silently, hence the hashes: a damaged checkpoint is skipped with a warning in
favour of the one before.

    training   ── step ── copy to CPU ── step ── step ── step ──
    its thread                └ write, hash, manifest, fsync, rename, remove old ones

The thread of each rank talks to those of the others over a process group of its own, so that nothing it sends mixes with what the
training sends.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from swirl_fast.files import fsync, hash_file, lock
from swirl_fast.models.policy import Policy
from swirl_fast.ranks import TIMEOUT, Ranks
from swirl_fast.training.checkpoint_reader import load

# Of the metrics that training.keep_best may name; of the others a larger mean is better.
SMALLER_IS_BETTER = ("malformed",)
BEST = "best"  # a link to the checkpoint that `keep_best` keeps
_MANIFEST, _STATE, _TEMPORARY = "manifest.json", "state.json", ".tmp"
_NAME = re.compile(r"step_\d+")


class Checkpoints:
    """The checkpoints of one training, in `folder`, which all ranks must see. At most one is being written.

    keep: so many of the newest stay. best: name of a metric (training.keep_best) or "": the checkpoint with the best mean of it over
    the steps since the one before stays too, and `folder/best` links to it. Every method is collective.

    Raises ValueError when another training writes there, or not all ranks see the folder.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, best: str = "", asynchronous: bool = True) -> None:
        self.folder, self.step, self.seconds = folder, -1, 0.0  # the newest one's step; how long the last write took
        self._ranks, self._keep, self._best, self._asynchronous = ranks, keep, best, asynchronous
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if ranks.distributed else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[float] | None = None
        self._window: list[float] = []  # the metric `best` since the last scheduled checkpoint
        # DCP's; in one process as it should be
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._lock, problem = -1, ""
        if ranks.main:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = lock(folder)
            except ValueError as error:
                problem = str(error)
        if problem := ranks.gather(problem)[0]:
            raise ValueError(problem)
        if ranks.main:
            for left in folder.glob(f"*{_TEMPORARY}"):  # of a process that was killed while it wrote or removed one
                _remove(left)
            self._link_best()  # the process may have been killed before it did
        ranks.barrier()
        if not all(ranks.gather(folder.is_dir())):
            raise ValueError(f"{folder} is not there on every rank: run.folder must be shared by all machines")

    def measure(self, metrics: dict[str, float]) -> None:
        """A step's metrics, for `best`; a step that measured nothing does not count."""
        if self._best and math.isfinite(metrics[self._best]):
            self._window.append(metrics[self._best])

    def save(
        self,
        step: int,
        policy: Policy | torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        scheduled: bool = True,
    ) -> None:
        """Begins to write `folder/step_N`: when this returns, the training may go on and change every tensor.

        state: JSON-able, the same on every rank. scheduled: False for one between two regular ones, which cannot be the best.
        Raises RuntimeError when the write before this one failed.
        """
        self.wait()
        mean = sum(self._window) / len(self._window) if scheduled and self._window else None
        if scheduled:
            self._window = []
        state = state | {BEST: {"metric": self._best, "mean": mean, "window": self._window}}
        writing = self.folder / f"step_{step:06d}{_TEMPORARY}"
        if self._ranks.main:
            _remove(writing)
            writing.mkdir()
        self._ranks.barrier()
        start = time.monotonic()
        begun = bool(optimizer.state)
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        if not begun:
            # It makes the missing moments by a step with learning rate 0, which would count: the first real one is not the second.
            for moments in optimizer.state.values():
                moments["step"].zero_()
            model_state, optimizer_state = get_state_dict(policy, optimizer)
        model_state = _without_frozen(policy, model_state)
        written = dcp.async_save(  # copies before it returns
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=writing,
            process_group=self._group,
            no_dist=self._group is None,
        )
        assert isinstance(written, Future), "a stager that copies at once gives the future of the write"
        self._writing = self._thread.submit(self._finish, written, writing, json.dumps(state), start)
        self.step = step
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises RuntimeError on every rank when the write failed on one."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.seconds = writing.result()

    def load_latest(
        self,
        policy: Policy | torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        check: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> dict[str, Any] | None:
        """Restores the newest whole checkpoint and returns its state, None when there is none at all.

        check: gets the state before anything is restored, and raises when it must not be. Damaged ones are warned about and set
        aside as `step_N.damaged`. Raises ValueError when all are damaged, or the newest whole one names code to run.
        """
        source = self._latest()
        if source is None:
            return None
        state = json.loads((source / _STATE).read_text(encoding="utf-8"))
        check(state)
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        model_state = _without_frozen(policy, model_state)
        try:
            load(source, {"model": model_state, "optimizer": optimizer_state})
        except CheckpointException as error:
            raise RuntimeError(f"checkpoint {source} cannot be loaded into this model: {error}") from error
        options = StateDictOptions(strict=not _frozen(policy))
        set_state_dict(
            policy, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options
        )
        self.step = _step(source)
        if state.get(BEST, {}).get("metric") == self._best:
            self._window = state[BEST]["window"]
        return state

    def _latest(self) -> Path | None:
        """The newest checkpoint whose files match their hashes. Each rank reads a share of the files."""
        names = self._ranks.gather([path.name for path in checkpoints(self.folder)])[0]
        for name in reversed(names):
            path = self.folder / name
            problems = self._ranks.gather(damage(path, self._ranks.rank, self._ranks.size))
            problem = next((one for one in problems if one is not None), None)
            if problem is None:
                if self._ranks.main:
                    self._remove_old(self._link_best())
                self._ranks.barrier()
                return path
            if self._ranks.main:
                aside = path.with_name(f"{name}.damaged")
                warnings.warn(
                    f"checkpoint {path} is damaged ({problem}); it is kept as {aside.name}, using the one before it",
                    stacklevel=3,
                )
                _remove(aside)
                path.rename(aside)
            self._ranks.barrier()
        if names:
            raise ValueError(
                f"{self.folder} holds no whole checkpoint, {len(names)} are damaged: repair one and rename it back, or remove the "
                "folder to train from the start"
            )
        return None

    def _finish(self, written: Future[Any], writing: Path, state: str, start: float) -> float:
        """On this rank's thread: makes a checkpoint of what DCP has written. Returns the seconds since the copy began."""
        target = writing.with_name(writing.name.removesuffix(_TEMPORARY))
        failed = f"checkpoint {target} could not be written; those before it are intact"
        try:
            written.result()  # fails on every rank when it fails on one
        except (CheckpointException, OSError) as error:
            raise RuntimeError(f"{failed}: {error}") from error
        own: dict[str, str] | str
        try:
            own = {file.name: hash_file(file) for file in writing.glob(f"__{self._ranks.rank}_*")}
        except OSError as error:
            own = str(error)
        of_ranks = self._gather(own)
        problem = "; ".join(one for one in of_ranks if isinstance(one, str))
        if not problem and self._ranks.main:
            try:
                hashes = {name: found for one in of_ranks for name, found in one.items()}
                self._publish(writing, target, hashes, state)
            except OSError as error:
                problem = str(error)
        problem = self._gather(problem)[0]
        if problem:
            raise RuntimeError(f"{failed}: {problem}")
        return time.monotonic() - start

    def _publish(self, writing: Path, target: Path, hashes: dict[str, str], state: str) -> None:
        """On rank 0: completes the folder, gives it its name, and removes what is not kept. DCP has synced its own files."""
        for name in hashes:
            if not (writing / name).is_file():
                raise OSError(
                    f"{name}, written by another rank, is not there: {self.folder} must be shared by all machines"
                )
        (writing / _STATE).write_text(state, encoding="utf-8")
        hashes |= {name: hash_file(writing / name) for name in (".metadata", _STATE)}
        (writing / _MANIFEST).write_text(json.dumps(hashes, indent=1, sort_keys=True), encoding="utf-8")
        for path in (writing / _STATE, writing / _MANIFEST, writing):
            fsync(path)
        writing.rename(target)
        fsync(self.folder)
        self._remove_old(self._link_best())

    def _link_best(self) -> Path | None:
        """On rank 0: `best` names the best checkpoint there is. Returns it."""
        best, link = best_of(checkpoints(self.folder), self._best), self.folder / BEST
        if best is not None and not (link.is_symlink() and os.readlink(link) == best.name):
            new = link.with_name(f"{BEST}{_TEMPORARY}")
            _remove(new)
            new.symlink_to(best.name)
            new.replace(link)
            fsync(self.folder)
        elif best is None and link.is_symlink() and not link.exists():
            link.unlink()
        return best

    def _remove_old(self, best: Path | None) -> None:
        """On rank 0, when the newest checkpoint is known to be whole."""
        for old in checkpoints(self.folder)[: -self._keep]:
            if old != best:
                _remove(old)

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._ranks.size
        dist.all_gather_object(values, value, self._group)
        return values

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except RuntimeError as late:
            if error is None:
                raise
            warnings.warn(str(late), stacklevel=2)  # and not in the place of the error that ends the training
        finally:
            self._thread.shutdown()
            if self._lock >= 0:
                os.close(self._lock)


def checkpoints(folder: Path) -> list[Path]:
    """Those that were finished, whole or not, in the order of their steps. A copy, such as step_000010_backup, is none of them."""
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def best_of(paths: list[Path], metric: str) -> Path | None:
    """The checkpoint with the best mean of the metric, of equals the newest; None when none has it. One whose state cannot be read
    has none."""
    means: dict[Path, float] = {}
    for path in paths if metric else ():
        try:
            mark = json.loads((path / _STATE).read_text(encoding="utf-8"))[BEST]
            if mark["metric"] == metric and mark["mean"] is not None:
                means[path] = -mark["mean"] if metric in SMALLER_IS_BETTER else mark["mean"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(means, key=lambda path: (means[path], _step(path)), default=None)


def named(folder: Path, name: str) -> Path:
    """The checkpoint `name` of a folder. `best` is looked for among all of them, by the metric that the newest one was written with: the
    link may be out of date, or missing, after a process was killed between the write of a checkpoint and that of the link."""
    if name == BEST:
        for path in reversed(checkpoints(folder)):
            try:
                metric = json.loads((path / _STATE).read_text(encoding="utf-8"))[BEST]["metric"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            return best_of(checkpoints(folder), metric) or folder / name
    return folder / name


def recorded_state(path: Path) -> dict[str, Any]:
    """The state in one checkpoint. Raises ValueError when it is not there or damaged."""
    if not path.is_dir():
        there = ", ".join(one.name for one in checkpoints(path.parent)) or "none"
        raise ValueError(f"{path} is not a checkpoint; those in {path.parent}: {there}")
    if (problem := damage(path)) is not None:
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return state


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The state in the newest checkpoint; None where there is none, or it cannot be read. Whether it is whole is not looked at."""
    try:
        state: dict[str, Any] = json.loads((checkpoints(folder)[-1] / _STATE).read_text(encoding="utf-8"))
        return state if isinstance(state["settings"], dict) and isinstance(state["step"], int) else None
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None


def load_weights(path: Path, policy: Policy | torch.nn.Module) -> None:
    """Restores only the model from a checkpoint. Collective."""
    weights = _without_frozen(policy, get_model_state_dict(policy))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP's; as it should be
        load(path, {"model": weights})
    set_model_state_dict(policy, weights, options=StateDictOptions(strict=not _frozen(policy)))


def _frozen(policy: torch.nn.Module) -> set[str]:
    """The parameters that training leaves as model.path has them, tied ones by all their names."""
    named = policy.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _without_frozen(policy: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """DCP's own option for it leaves the second name of a tied weight."""
    frozen = _frozen(policy)
    return {name: value for name, value in state.items() if name not in frozen}


def damage(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, or with every `parts`-th of its files from number `part` on; None when it is whole."""
    try:
        hashes: dict[str, str] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        there = {entry.name for entry in path.iterdir()}
        if unknown := {_STATE, ".metadata", *(name for name in there if name.endswith(".distcp"))} - hashes.keys():
            return f"{_MANIFEST} does not name {' and '.join(sorted(unknown))}"
        for name in sorted(hashes)[part::parts]:
            if name not in there:
                return f"{name!r:.80} is missing"
            if hash_file(path / name) != hashes[name]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _remove(path: Path) -> None:
    """A file, a link or a folder, which first gets a temporary name: half a checkpoint must not look like one."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        doomed = path if path.suffix == _TEMPORARY else path.rename(path.with_name(path.name + _TEMPORARY))
        shutil.rmtree(doomed)
