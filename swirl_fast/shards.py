"""runs/NAME/shards/: the kept trajectories as MosaicML (MDS) shards, verified, and read in a reproducible order.

One sample a trajectory, so that no prefix is stored twice:

    tokens     ndarray:int32 (T,)       the whole trunk
    spans      ndarray:int32 (A, 2)     start and end of every action in it
    logprobs   ndarray:float32 (n,)     of the tokens of all actions, one action after the other
    meta       json                     ids, question, texts, actions, observations, verdicts: what a judge needs

The format protects nothing by itself: flipped bytes are read silently, a missing shard ends the epoch early, an
exception while writing leaves an index that looks complete. Hence manifest.json with size and xxh64 of every file: it
is written last, into NAME.tmp, which is then renamed, and all is checked against it before the first sample is read.

Why the library's LocalDataset and an order of our own, and not StreamingDataset's iterator: that one fills the tail of
an epoch with duplicates, and its batches end with the epoch. Here the order is a function of (seed, epoch) alone and
rank r takes every world_size-th sample of a global batch, so nothing is lost or doubled in an epoch, and resuming on
any number of ranks continues the same sequence of global batches. LocalDataset is StreamingDataset without its
downloads, thus without its shared memory, lock files and collectives: a killed job leaves nothing behind and disturbs
no other. Left out for that: shards in an object store (copy them first: a trajectory of 3,400 tokens took 32 kB).
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from swirl_fast.actions import Action
from swirl_fast.filtering import Selection
from swirl_fast.judges.judge import Verdict
from swirl_fast.trajectory import Finish, Step, Trajectory

FORMAT = 1
MANIFEST = "manifest.json"
COLUMNS = {"tokens": "ndarray:int32", "spans": "ndarray:int32", "logprobs": "ndarray:float32", "meta": "json"}
SHARD_BYTES = 1 << 26  # the library's default

INSTALL = (
    "pip install --no-deps mosaicml-streaming==0.13.0 && "
    'pip install Brotli python-snappy "zstd<2" xxhash pillow "catalogue<3" filelock tqdm'
)


@dataclass
class StepSample:
    """A trajectory and the process verdict on each of its steps."""

    trajectory: Trajectory
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds. tokens: of the trunks; action_tokens: of these, sampled ones.

    fingerprint: JSON object that names what the samples were made with. verdicts: verdict -> number of steps.
    files: name -> {"bytes": size, "xxh64": hex digest}, of every file but the manifest.
    """

    fingerprint: dict[str, Any]
    trajectories: int
    steps: int
    tokens: int
    action_tokens: int
    verdicts: dict[str, int]
    files: dict[str, dict[str, Any]]

    @property
    def content_hash(self) -> str:
        """Hex digest of all files: equal on two machines when they hold the same samples in the same order."""
        return xxhash.xxh64(_canonical(self.files)).hexdigest()


# ---- writing


def write_shards(
    folder: str | Path,
    samples: Iterable[StepSample],
    *,
    fingerprint: dict[str, Any],
    selection: Selection | None = None,
    replace: bool = False,
) -> Manifest:
    """Writes the samples to `folder`, which holds all of them or does not exist, whenever this process is killed.

    fingerprint: JSON object of the settings that made the samples.
    selection: only for the error message when there is no sample.
    replace: put the new folder in the place of one with other contents (a reader sees the old one, none, or the new).
    A folder with the same samples and fingerprint is left alone and its manifest returned.

    Raises ValueError when there is no sample, for a sample that cannot be trained on (no step, no action token,
    verdicts that do not match, a trajectory that comes twice), when `folder` holds something else and `replace` is
    False, and when another process is writing there.
    """
    folder = Path(os.path.abspath(folder))
    with _claimed(folder.with_name(folder.name + ".tmp")) as temporary:
        manifest = _write(temporary, samples, fingerprint)
        if not manifest.trajectories:
            if selection is None:
                raise ValueError(f"no trajectory to write to {folder}")
            raise ValueError(f"nothing is left to train on: {selection.describe()}. {selection.remedy().capitalize()}")
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed while it replaced the folder
        if not folder.exists() or not any(folder.iterdir()):
            _rename(temporary, folder)
        elif (problem := _difference(folder, manifest)) is not None:
            if not replace:
                raise ValueError(f"{folder} {problem}: write with replace=True, or use another run.name")
            _rename(folder, old)
            _rename(temporary, folder)
            shutil.rmtree(old)
    return manifest


def _write(folder: Path, samples: Iterable[StepSample], fingerprint: dict[str, Any]) -> Manifest:
    writer = _streaming().MDSWriter(columns=COLUMNS, out=str(folder), size_limit=SHARD_BYTES)
    ids: set[str] = set()
    verdicts: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    try:
        for sample in samples:
            trajectory = sample.trajectory
            encoded = _encode(sample)
            if trajectory.id in ids:
                raise ValueError(f"trajectory {trajectory.id!r} comes twice")
            ids.add(trajectory.id)
            verdicts.update(verdict.value for verdict in sample.verdicts)
            totals["steps"] += trajectory.num_steps
            totals["tokens"] += len(trajectory.tokens)
            totals["action_tokens"] += len(encoded["logprobs"])
            writer.write(encoded)
    except BaseException:
        writer.cancel_future_jobs()  # `finish`, which leaving the writer's own context would call, writes an index
        raise
    writer.finish()
    names = sorted(path.name for path in folder.iterdir())
    manifest = Manifest(
        fingerprint=json.loads(_canonical(fingerprint)),
        trajectories=len(ids),
        steps=totals["steps"],
        tokens=totals["tokens"],
        action_tokens=totals["action_tokens"],
        verdicts={verdict.value: verdicts[verdict.value] for verdict in Verdict},
        files={name: {"bytes": (folder / name).stat().st_size, "xxh64": _digest(folder / name)} for name in names},
    )
    body = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**body, "xxh64": xxhash.xxh64(_canonical(body)).hexdigest()}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for path in (*(folder / name for name in names), folder / MANIFEST, folder):
        _fsync(path)
    return manifest


def _encode(sample: StepSample) -> dict[str, Any]:
    trajectory = sample.trajectory
    trajectory.check()
    steps = trajectory.steps
    logprobs = [logprob for step in steps for logprob in step.logprobs]
    if not logprobs:
        raise ValueError(f"trajectory {trajectory.id!r} has {len(steps)} steps without a single token: filter it out")
    if len(sample.verdicts) != len(steps):
        raise ValueError(f"trajectory {trajectory.id!r} has {len(steps)} steps and {len(sample.verdicts)} verdicts")
    meta = {
        "id": trajectory.id,
        "question_id": trajectory.question_id,
        "task": trajectory.task,
        "question": trajectory.question,
        "seed": trajectory.seed,
        "prompt_length": trajectory.prompt_length,
        "finish": trajectory.finish,
        "steps": [
            {
                "text": step.text,
                "action": asdict(step.action),
                "observation": step.observation,
                "policy_version": step.policy_version,
                "verdict": verdict,
            }
            for step, verdict in zip(steps, sample.verdicts, strict=True)
        ],
    }
    return {
        "tokens": np.asarray(trajectory.tokens, np.int32),
        "spans": np.asarray([(step.start, step.end) for step in steps], np.int32),
        "logprobs": np.asarray(logprobs, np.float32),
        "meta": meta,
    }


def _decode(encoded: dict[str, Any]) -> StepSample:
    meta, logprobs = encoded["meta"], encoded["logprobs"].tolist()
    steps, at = [], 0
    for (start, end), step in zip(encoded["spans"].tolist(), meta["steps"], strict=True):
        own, at = logprobs[at : at + end - start], at + end - start
        action = Action(**step["action"])
        steps.append(Step(start, end, step["text"], action, own, step["policy_version"], step["observation"]))
    trajectory = Trajectory(
        id=meta["id"],
        question_id=meta["question_id"],
        task=meta["task"],
        question=meta["question"],
        seed=meta["seed"],
        prompt_length=meta["prompt_length"],
        tokens=encoded["tokens"].tolist(),
        steps=steps,
        finish=Finish(meta["finish"]) if meta["finish"] else None,
    )
    return StepSample(trajectory, [Verdict(step["verdict"]) for step in meta["steps"]])


@contextmanager
def _claimed(folder: Path) -> Iterator[Path]:
    """An empty folder of our own, cleared of what a killed writer left; removed afterwards unless it was renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the kernel when this process ends
            ours = os.path.samestat(os.fstat(lock), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise ValueError(f"another process is writing to {folder}: wait until it ends")
        for path in folder.iterdir():
            path.unlink()
        try:
            yield folder
        finally:
            if folder.exists() and os.path.samestat(os.fstat(lock), os.stat(folder)):
                shutil.rmtree(folder)
    finally:
        os.close(lock)


def _difference(folder: Path, manifest: Manifest) -> str | None:
    """What keeps the existing folder from being used in the place of a new one, None when nothing does."""
    try:
        existing = verify_shards(folder)
    except ValueError as error:
        return f"is there and damaged ({error})"
    if existing.fingerprint != manifest.fingerprint:
        old, new = existing.fingerprint, manifest.fingerprint
        names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        changes = "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r} now" for name in names)
        return f"was written with other settings ({changes})"
    if existing.files != manifest.files:
        return f"holds {existing.trajectories} other trajectories (the new ones are {manifest.trajectories})"
    return None


def _written(folder: Path) -> tuple[int, int] | None:
    """Tells one writing of a folder from another; None where there is no manifest."""
    try:
        status = (folder / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


# ---- reading


def verify_shards(folder: str | Path) -> Manifest:
    """Reads every byte once and compares it with the manifest (several GB/s from the page cache).

    Raises ValueError naming the file that is missing, too many, of another size or of other contents.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    remedy = "run filter again, or copy the folder anew"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is no complete shard folder, {remedy}")
    try:
        body = json.loads(path.read_bytes())
        written = body.pop("xxh64")
        intact = xxhash.xxh64(_canonical(body)).hexdigest() == written
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: {remedy}")
    if (version := body.pop("format", None)) != FORMAT:
        raise ValueError(f"{path} has format {version}, this swirl-fast reads format {FORMAT}: run filter again")
    manifest = Manifest(**body)
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: {remedy}")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise ValueError(f"{file} has {size} bytes instead of {expected['bytes']}: {remedy}")
        if (digest := _digest(file)) != expected["xxh64"]:
            raise ValueError(f"{file} is damaged (xxh64 {digest} instead of {expected['xxh64']}): {remedy}")
    for file in sorted(folder.glob("*.mds")):
        if file.name not in manifest.files:
            raise ValueError(f"{file} is not in {MANIFEST}: {folder} has been mixed with another, {remedy}")
    return manifest


def read_trajectories(folder: str | Path) -> Iterator[StepSample]:
    """Every sample, in the order written, after the folder was verified (`verify_shards`)."""
    verify_shards(folder)
    reader = _streaming().LocalDataset(str(folder))
    for i in range(len(reader)):
        yield _decode(reader[i])


class TrajectoryStream:
    """Global batches of trajectories, over epochs without end; every rank gets its share of each.

    global_batch: trajectories in a batch, over all ranks; at least world_size. It need not divide anything: a batch
    runs over the border of an epoch, and shares differ by at most one.
    shuffle: a new order every epoch, a function of (seed, epoch); otherwise the order written.

    With the same folder, seed and global_batch the global batches are the same at every world size. No process group is
    needed or used; ranks on several machines should compare `manifest.content_hash` before their first collective.

    Raises ValueError for impossible numbers and for a folder that does not pass `verify_shards`, ImportError with the
    line to install it when mosaicml-streaming is missing.
    """

    def __init__(
        self, folder: str | Path, *, global_batch: int, rank: int, world_size: int, seed: int, shuffle: bool = True
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if global_batch < world_size:
            raise ValueError(
                f"a batch of {global_batch} trajectories leaves some of {world_size} ranks without one: "
                f"set training.trajectories_per_step to {world_size} or more"
            )
        self.folder = Path(folder)
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self._written = _written(self.folder)
        self.manifest = verify_shards(folder)
        self.position = 0  # trajectories handed out so far, over all ranks and epochs
        self._reader = _streaming().LocalDataset(str(folder))
        self._epoch, self._order = -1, list[int]()
        if len(self._reader) != self.manifest.trajectories:
            raise ValueError(f"{folder}: {len(self._reader)} samples, the manifest says {self.manifest.trajectories}")

    @property
    def epoch(self) -> float:
        """Epochs handed out so far, e.g. 1.5."""
        return self.position / self.manifest.trajectories

    def next_batch(self) -> list[StepSample]:
        """This rank's share of the next global batch: its samples rank, rank + world_size, …

        Raises ValueError when the folder was replaced since it was verified: samples are read from it by name.
        """
        batch = range(self.position, self.position + self.global_batch)
        self._check_unchanged()
        share = [_decode(self._reader[self._index(position)]) for position in batch[self.rank :: self.world_size]]
        self._check_unchanged()
        self.position += self.global_batch
        return share

    def _check_unchanged(self) -> None:
        if _written(self.folder) != self._written:
            raise ValueError(f"{self.folder} was replaced while it was being read: start the training anew")

    def _index(self, position: int) -> int:
        epoch, at = divmod(position, self.manifest.trajectories)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return self._order[at]

    def _permutation(self, epoch: int) -> list[int]:
        """Sorting by a hash: unlike NumPy's generators, the same in every version of every library."""
        order = range(self.manifest.trajectories)
        if not self.shuffle:
            return list(order)
        return sorted(order, key=lambda i: (xxhash.xxh64_intdigest(f"{self.seed}/{epoch}/{i}".encode()), i))

    def state_dict(self) -> dict[str, Any]:
        """JSON values, equal on all ranks: everything that says which batch comes next."""
        return {
            "position": self.position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "content_hash": self.manifest.content_hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the last batch of the stream that gave the state; world size and global_batch may be others.

        Raises ValueError when seed, shuffle or the shards are not those of the state: the order would be another.
        """
        own = self.state_dict()
        for key in ("seed", "shuffle", "content_hash"):
            if state[key] != own[key]:
                raise ValueError(
                    f"{self.folder}: the checkpoint's {key} is {state[key]!r}, here it is {own[key]!r}: "
                    "resume with the settings and shards it was trained on, or start another run.name"
                )
        self.position = int(state["position"])


def _streaming() -> Any:
    """`streaming.base` of mosaicml-streaming: the only place where the library comes in (MDSWriter and LocalDataset).

    The package's own `__init__` imports vision data sets and so torchvision, which nothing here needs: an empty package
    stands in for it during the import.
    """
    if "streaming.base" in sys.modules:
        return sys.modules["streaming.base"]
    spec = importlib.util.find_spec("streaming")
    if spec is None:
        raise ImportError(f"mosaicml-streaming is not installed: {INSTALL}")
    sys.modules["streaming"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module("streaming.base")
    except ImportError as error:
        raise ImportError(f"mosaicml-streaming cannot be imported ({error}): {INSTALL}") from error
    finally:
        del sys.modules["streaming"]
