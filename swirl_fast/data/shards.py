"""runs/NAME/shards/: the kept trajectories as MosaicML (MDS) shards, hashed and verified.

One sample a trajectory, so that no prefix is stored twice:

    tokens     ndarray:int32 (T,)       the whole trunk
    spans      ndarray:int32 (A, 2)     start and end of every action in it
    logprobs   ndarray:float32 (n,)     of the tokens of all actions, one action after the other
    meta       json                     ids, question, texts, actions, observations, verdicts: what a judge needs; and which states are kept

The format (mds.py) protects nothing by itself: flipped bytes are read silently, and nothing tells one folder's shard from another's. Hence
manifest.json with size and xxh64 of every file: it
is written last, into NAME.tmp, which is then renamed, and every shard is compared with it before a sample is read from it.

shard_source.py says where shards are read from (a folder, an object store), stream.py in which order.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from swirl_fast.data.mds import Writer
from swirl_fast.data.shard_index import DISTRUST, INDEX, check_files, check_index
from swirl_fast.files import canonical_json, describe_changes, fsync, hash_file, own
from swirl_fast.formats.format import Action
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Verdict

FORMAT = 4
MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 26  # mosaicml-streaming's default
REMEDY = "run filter again, or copy the folder again"


@dataclass
class StepSample:
    """A trajectory and the process verdict on each of its steps. kept: at which of its states training draws actions, one a step; all of
    them where nothing else is said."""

    trajectory: Trajectory
    verdicts: list[Verdict]
    kept: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept = self.kept or [True] * self.trajectory.num_steps


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds. tokens: of the trunks. states: those that are kept, at most `steps`.

    fingerprint: JSON object that names what the samples were made with. verdicts: verdict -> number of steps.
    longest_state: {"id": trajectory, "tokens": number}, of the last state that is kept. stop_ids: last tokens of the
    well-formed actions, ascending: what ended a turn where the samples were made. longest_path: as longest_state, with the
    action.
    files: name -> {"bytes": size, "xxh64": hex digest}, of every file but the manifest.
    """

    fingerprint: dict[str, Any]
    trajectories: int
    steps: int
    states: int
    tokens: int
    verdicts: dict[str, int]
    longest_state: dict[str, Any]
    longest_path: dict[str, Any]
    stop_ids: list[int]
    files: dict[str, dict[str, Any]]

    @property
    def content_hash(self) -> str:
        """Hex digest of all files: equal on two machines when they hold the same samples in the same order."""
        return _hash_json(self.files)


# ---- writing


def write_shards(
    folder: str | Path,
    samples: Iterable[StepSample],
    *,
    fingerprint: dict[str, Any],
    replace: bool = False,
) -> Manifest:
    """Writes the samples to `folder`, which holds all of them or does not exist, whenever this process is killed.

    samples: read one by one; at most one shard of them is held. fingerprint: JSON object of the settings that made them.
    replace: put the new folder in the place of one with other contents (a reader sees the old one, none, or the new).
    A folder with the same samples and fingerprint is left alone and its manifest returned.

    Raises ValueError when there is no sample, for a sample that cannot be trained on (no step, no action token,
    verdicts that do not match, a trajectory that comes twice), when `folder` holds something else and `replace` is
    False, and when another process is writing there, or reading what would be replaced (shard_source.py: ShardFolder).
    """
    folder = Path(os.path.abspath(folder))
    with _claimed(folder.with_name(folder.name + ".tmp")) as temporary:
        manifest = _write(temporary, samples, fingerprint)
        if not manifest.trajectories:
            raise ValueError(f"no trajectory to write to {folder}")
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed while it replaced the folder
        if not folder.exists() or not any(folder.iterdir()):
            _rename(temporary, folder)
        elif (problem := _difference(folder, manifest)) is not None:
            if not replace:
                raise ValueError(f"{folder} {problem}: write with replace=True, or use another run.name")
            held = own(folder)  # training reads samples by name: those of another collection would be taken for its own
            try:
                _rename(folder, old)
                _rename(temporary, folder)
                shutil.rmtree(old)
            finally:
                if held is not None:
                    os.close(held)
    return manifest


def _write(folder: Path, samples: Iterable[StepSample], fingerprint: dict[str, Any]) -> Manifest:
    writer = Writer(folder, SHARD_BYTES)
    ids: set[str] = set()
    verdicts: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    longest: dict[str, Any] = {"id": "", "tokens": -1}
    longest_path = dict(longest)
    stop_ids: set[int] = set()
    for sample in samples:
        trajectory = sample.trajectory
        encoded = encode_sample(sample)
        if trajectory.id in ids:
            raise ValueError(f"trajectory {trajectory.id!r} comes twice")
        ids.add(trajectory.id)
        verdicts.update(verdict.value for verdict in sample.verdicts)
        totals["steps"] += trajectory.num_steps
        totals["states"] += sum(sample.kept)
        totals["tokens"] += len(trajectory.tokens)
        last = max(i for i, kept in enumerate(sample.kept) if kept)
        if (state := trajectory.steps[last].start) > longest["tokens"]:
            longest = {"id": trajectory.id, "tokens": state}
        if (path := trajectory.steps[last].end) > longest_path["tokens"]:
            longest_path = {"id": trajectory.id, "tokens": path}
        # A well-formed action was not cut off, so it ends with the stop token of the tokenizer that sampled it.
        stop_ids |= {
            int(trajectory.tokens[step.end - 1]) for step in trajectory.steps if step.action.kind != "malformed"
        }
        writer.write(encoded)
    writer.finish()
    names = sorted(path.name for path in folder.iterdir())
    manifest = Manifest(
        fingerprint=json.loads(canonical_json(fingerprint)),
        trajectories=len(ids),
        steps=totals["steps"],
        states=totals["states"],
        tokens=totals["tokens"],
        verdicts={verdict.value: verdicts[verdict.value] for verdict in Verdict},
        longest_state=longest,
        longest_path=longest_path,
        stop_ids=sorted(stop_ids),
        files={name: {"bytes": (folder / name).stat().st_size, "xxh64": hash_file(folder / name)} for name in names},
    )
    body = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**body, "xxh64": _hash_json(body)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for written in (*(folder / name for name in names), folder / MANIFEST, folder):
        fsync(written)
    return manifest


def encode_sample(sample: StepSample) -> dict[str, Any]:
    """The columns of one sample. Raises ValueError for one that cannot be trained on."""
    trajectory = sample.trajectory
    trajectory.check()
    steps = trajectory.steps
    logprobs = [logprob for step in steps for logprob in step.logprobs]
    if not logprobs:
        raise ValueError(f"trajectory {trajectory.id!r} has {len(steps)} steps without a single token: filter it out")
    if len(sample.verdicts) != len(steps):
        raise ValueError(f"trajectory {trajectory.id!r} has {len(steps)} steps and {len(sample.verdicts)} verdicts")
    if len(sample.kept) != len(steps) or not any(sample.kept):
        raise ValueError(
            f"trajectory {trajectory.id!r} has {len(steps)} steps and {len(sample.kept)} marks, {sum(sample.kept)} of states that are "
            "kept: filter it out where there is none"
        )
    meta = {
        "id": trajectory.id,
        "question_id": trajectory.question_id,
        "task": trajectory.task,
        "question": trajectory.question,
        "seed": trajectory.seed,
        "prompt_length": trajectory.prompt_length,
        "finish": trajectory.finish,
        **({"other_answers": Counter(trajectory.other_answers)} if trajectory.other_answers else {}),
        "steps": [
            {
                "text": step.text,
                "action": asdict(step.action),
                "observation": step.observation,
                "policy_version": step.policy_version,
                "verdict": verdict,
                "kept": bool(kept),
            }
            for step, verdict, kept in zip(steps, sample.verdicts, sample.kept, strict=True)
        ],
    }
    return {
        "tokens": trajectory.tokens,
        "spans": np.asarray([(step.start, step.end) for step in steps], np.int32),
        "logprobs": np.asarray(logprobs, np.float32),
        "meta": meta,
    }


def decode_sample(encoded: dict[str, Any]) -> StepSample:
    meta, logprobs = encoded["meta"], encoded["logprobs"].tolist()
    steps, at = [], 0
    for (start, end), step in zip(encoded["spans"].tolist(), meta["steps"], strict=True):
        of_step, at = logprobs[at : at + end - start], at + end - start
        action = Action.of_table(step["action"])
        steps.append(Step(start, end, step["text"], action, of_step, step["policy_version"], step["observation"]))
    trajectory = Trajectory(
        id=meta["id"],
        question_id=meta["question_id"],
        task=meta["task"],
        question=meta["question"],
        seed=meta["seed"],
        prompt_length=meta["prompt_length"],
        tokens=encoded["tokens"],
        steps=steps,
        finish=Finish(meta["finish"]) if meta["finish"] else None,
        other_answers=tuple(sorted(Counter(meta.get("other_answers")).elements())),
    )
    verdicts, kept = ([step[key] for step in meta["steps"]] for key in ("verdict", "kept"))
    if any(type(one) is not bool for one in kept) or not any(kept):
        raise ValueError(f"trajectory {trajectory.id!r}: kept is {kept!r:.80}, not true or false a step: {DISTRUST}")
    return StepSample(trajectory, [Verdict(one) for one in verdicts], kept)


@contextmanager
def _claimed(folder: Path) -> Iterator[Path]:
    """An empty folder that no other process writes to, cleared of what a killed writer left; removed afterwards unless it was renamed."""
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
        changes = describe_changes(existing.fingerprint, manifest.fingerprint)
        return f"was written with other settings ({changes})"
    if existing.files != manifest.files:
        return f"holds {existing.trajectories} other trajectories (the new ones are {manifest.trajectories})"
    return None


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)
    fsync(target.parent)


def _hash_json(value: Any) -> str:
    return xxhash.xxh64(canonical_json(value).encode()).hexdigest()


# ---- reading


def verify_shards(folder: str | Path) -> Manifest:
    """Reads every byte once and compares it with the manifest (several GB/s from the page cache).

    Raises ValueError naming the file that is missing, too many, of another size or of other contents.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in manifest.files:
        if (problem := find_damage(folder, name, manifest)) is not None:
            raise ValueError(f"{folder / name} {problem}: {REMEDY}")
    check_index((folder / INDEX).read_bytes(), manifest.files, manifest.trajectories, str(folder / INDEX))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises ValueError for a folder without an intact manifest, and for one with shards that are not in it."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is not a complete shard folder, {REMEDY}")
    manifest = parse_manifest(path.read_bytes(), str(path))
    for file in sorted(folder.glob("*.mds")):
        if file.name not in manifest.files:
            raise ValueError(f"{file} is not in {MANIFEST}: {folder} has been mixed with another, {REMEDY}")
    return manifest


def parse_manifest(text: bytes, shown: str) -> Manifest:
    """shown: what error messages call it. Raises ValueError when it is not intact, of another format, or not
    what write_shards writes."""
    try:
        body = json.loads(text)
        written = body.pop("xxh64")
        intact = _hash_json(body) == written
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{shown} is damaged: {REMEDY}")
    if (version := body.pop("format", None)) != FORMAT:
        raise ValueError(f"{shown} has format {version}, this swirl-fast reads format {FORMAT}: run filter again")
    if body.keys() != {field.name for field in fields(Manifest)} or not _whole_numbers(body):
        raise ValueError(f"{shown} does not say what a manifest of format {FORMAT} says: {DISTRUST}")
    check_files(body["files"], shown)
    return Manifest(**body)


def _whole_numbers(body: dict[str, Any]) -> bool:
    """Whether the fields of a manifest, its files aside, are of the kinds that they should be."""
    longest = (body["longest_state"], body["longest_path"])
    if not isinstance(body["stop_ids"], list) or not all(
        isinstance(value, dict) for value in (body["fingerprint"], body["verdicts"], *longest)
    ):
        return False
    if any(value.keys() != {"id", "tokens"} or not isinstance(value["id"], str) for value in longest):
        return False
    numbers = [body[name] for name in ("trajectories", "steps", "states", "tokens")]
    numbers += [*body["stop_ids"], *body["verdicts"].values()]
    numbers += [value["tokens"] for value in longest]
    return body["verdicts"].keys() == {verdict.value for verdict in Verdict} and all(
        type(number) is int and 0 <= number < 1 << 63 for number in numbers
    )


def find_damage(folder: Path, name: str, manifest: Manifest) -> str | None:
    """What is wrong with a file of the manifest, in words that follow its name; None when it is whole."""
    expected = manifest.files[name]
    try:
        if (size := (folder / name).stat().st_size) != expected["bytes"]:
            return f"has {size} bytes instead of {expected['bytes']}"
        if (found := hash_file(folder / name)) != expected["xxh64"]:
            return f"is damaged (xxh64 {found} instead of {expected['xxh64']})"
    except FileNotFoundError:
        return "is missing"
    return None
