"""Shards: exact round trip, every kind of damage found, and the order of batches against one written out by hand."""

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mds_library import streaming
from support.paths import ROOT
from support.stores import FINGERPRINT, ids, make_samples, open_stream, read_samples

from swirl_fast.data import mds, shard_index, shards
from swirl_fast.data.shards import StepSample, decode_sample, encode_sample, verify_shards, write_shards
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.files import own


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory) -> Path:
    """13 samples in several shards."""
    folder = tmp_path_factory.mktemp("run") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 20_000)
        write_shards(folder, make_samples(13), fingerprint=FINGERPRINT)
    assert len(list(folder.glob("*.mds"))) >= 3
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- writing


def test_what_is_written_comes_back(thirteen: Path) -> None:
    samples = make_samples(13)
    assert list(read_samples(thirteen)) == samples
    manifest = verify_shards(thirteen)
    assert manifest.fingerprint == FINGERPRINT
    assert manifest.trajectories == 13
    assert manifest.steps == sum(sample.trajectory.num_steps for sample in samples)
    assert manifest.tokens == sum(len(sample.trajectory.tokens) for sample in samples)
    assert manifest.verdicts == Counter(verdict.value for sample in samples for verdict in sample.verdicts)
    trajectories = [sample.trajectory for sample in samples]
    longest = max(trajectories, key=lambda trajectory: trajectory.steps[-1].start)
    assert manifest.longest_state == {"id": longest.id, "tokens": len(longest.state(longest.num_steps - 1))}
    assert manifest.longest_path["tokens"] == max(t.steps[-1].end for t in trajectories)
    ends = {t.tokens[step.end - 1] for t in trajectories for step in t.steps if step.action.kind != "malformed"}
    assert manifest.stop_ids == sorted(ends) and len(ends) < manifest.steps
    for sample in read_samples(thirteen):
        sample.trajectory.check()
        hashes = [view.content_hash() for view in sample.trajectory.views()]
        original = samples[int(sample.trajectory.question_id[1:])].trajectory
        assert hashes == [view.content_hash() for view in original.views()]


def test_a_folder_is_used_again_refused_or_replaced_but_never_mixed_into(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    first = write_shards(folder, make_samples(5), fingerprint=FINGERPRINT)
    before, inode = contents(folder), folder.stat().st_ino
    assert write_shards(folder, make_samples(5), fingerprint=FINGERPRINT) == first
    assert folder.stat().st_ino == inode, "the same samples and settings: the folder stays"

    other = {**FINGERPRINT, "model": "other"}
    with pytest.raises(ValueError, match="other settings .model was 'tiny', is 'other' now"):
        write_shards(folder, make_samples(5), fingerprint=other)
    with pytest.raises(ValueError, match="5 other trajectories"):
        write_shards(folder, make_samples(6), fingerprint=FINGERPRINT)
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["shards"]

    second = write_shards(folder, make_samples(6), fingerprint=other, replace=True)
    assert second.content_hash != first.content_hash
    assert verify_shards(folder) == second
    assert list(read_samples(folder)) == make_samples(6)
    assert os.listdir(tmp_path) == ["shards"]

    (folder / "shard.00000.mds").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged .*shard.00000.mds has 0 bytes"):
        write_shards(folder, make_samples(6), fingerprint=other)
    write_shards(folder, make_samples(6), fingerprint=other, replace=True)
    verify_shards(folder)


def test_nothing_to_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no trajectory to write to {tmp_path / 'shards'}"):
        write_shards(tmp_path / "shards", [], fingerprint=FINGERPRINT)
    assert os.listdir(tmp_path) == []


def test_a_sample_that_cannot_be_trained_on_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    def refused(match: str, *samples: StepSample) -> None:
        with pytest.raises(ValueError, match=match):
            write_shards(tmp_path / "shards", [*make_samples(1), *samples], fingerprint=FINGERPRINT)
        assert os.listdir(tmp_path) == []

    sample = make_samples(2)[1]
    refused("'q0-0' comes twice", *make_samples(1))
    refused("'q1-1' has 2 steps and 1 verdicts", StepSample(sample.trajectory, sample.verdicts[:1]))
    empty = copy.deepcopy(sample)
    empty.trajectory.steps, empty.verdicts = [], []
    refused("'q1-1' has 0 steps without a single token", empty)
    broken = copy.deepcopy(sample)
    broken.trajectory.steps[0].logprobs.pop()
    refused("q1-1: step 0 has .* log-probs", broken)


def interrupted(folder: Path, count: int) -> subprocess.Popen[str]:
    """A process that writes `count` samples to many shards, says so, and then waits for its next sample for ever."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
        "from support.stores import FINGERPRINT, make_samples\n"
        "from swirl_fast.data import shards\n"
        "shards.SHARD_BYTES = 10_000\n"
        "def samples():\n"
        f"    yield from make_samples({count})\n"
        "    print('written', flush=True)\n"
        "    sys.stdin.read()\n"
        f"shards.write_shards({str(folder)!r}, samples(), fingerprint=FINGERPRINT)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder.parent
    )


def test_a_writer_killed_in_the_middle_leaves_no_folder_and_disturbs_no_rerun(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    writer = interrupted(folder, 60)
    assert writer.stdout is not None and writer.stdin is not None
    assert writer.stdout.readline() == "written\n"
    with pytest.raises(ValueError, match="another process is writing to .*shards.tmp"):
        write_shards(folder, make_samples(3), fingerprint=FINGERPRINT)
    assert len(list((tmp_path / "shards.tmp").glob("*.mds"))) > 3
    os.kill(writer.pid, signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    writer.stdin.close()
    writer.stdout.close()
    with pytest.raises(ValueError, match="manifest.json does not exist"):
        TrajectoryStream(folder, global_batch=1, rank=0, world_size=1, seed=0)
    write_shards(folder, make_samples(3), fingerprint=FINGERPRINT)
    assert list(read_samples(folder)) == make_samples(3)
    assert os.listdir(tmp_path) == ["shards"]


# ---- verifying


@pytest.mark.parametrize("name", ["shard.00000.mds", "shard.00002.mds", "index.json", "manifest.json"])
def test_damage_is_found_and_the_file_named(thirteen: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "shards"
    original = (thirteen / name).read_bytes()

    def damaged(contents: bytes | None, match: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(thirteen, folder)
        verify_shards(folder)
        if contents is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(contents)
        for use in (
            lambda: verify_shards(folder),
            lambda: next(read_samples(folder)),
            lambda: TrajectoryStream(folder, global_batch=2, rank=1, world_size=2, seed=0),
        ):
            with pytest.raises(ValueError, match=f"{name} {match}"):
                use()

    damaged(None, "is missing|does not exist")
    damaged(original[: len(original) // 2], "has .* bytes instead of|is damaged")
    damaged(original + b"x", "has .* bytes instead of|is damaged")
    for at in (0, len(original) // 3, len(original) - 2):
        damaged(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :], "is damaged")


def test_foreign_shards_and_formats_are_named(thirteen: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(thirteen, folder)
    shutil.copy(folder / "shard.00000.mds", folder / "shard.00099.mds")
    with pytest.raises(ValueError, match="shard.00099.mds is not in manifest.json"):
        verify_shards(folder)
    (folder / "shard.00099.mds").unlink()
    body = json.loads((folder / "manifest.json").read_text())
    body["steps"] += 1
    (folder / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        verify_shards(folder)
    body["format"] = 7
    del body["xxh64"]
    body["xxh64"] = xxhash.xxh64(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match="format 7, this swirl-fast reads format 4"):
        verify_shards(folder)


# ---- the order


def global_batches(folder: Path, batch: int, world: int, count: int, state: dict | None = None) -> list[list[str]]:
    """The shares of all ranks, dealt back into global batches; the ranks' states must agree."""
    streams = [open_stream(folder, batch, rank, world) for rank in range(world)]
    batches = []
    for stream in streams:
        if state is not None:
            stream.load_state_dict(state)
    for _ in range(count):
        shares = [ids(stream.next_batch()) for stream in streams]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        whole: list[str] = [""] * batch
        for rank, share in enumerate(shares):
            whole[rank::world] = share
        batches.append(whole)
        assert all(stream.state_dict() == streams[0].state_dict() for stream in streams)
    return batches


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 30), world=st.integers(1, 4), count=st.integers(1, 8), at=st.integers(0, 8))
def test_order_does_not_depend_on_the_world_nor_on_interruptions(
    thirteen: Path, batch: int, world: int, count: int, at: int
) -> None:
    batch = max(batch, world)
    alone = global_batches(thirteen, batch, 1, count)
    assert global_batches(thirteen, batch, world, count) == alone
    drawn = [id_ for one in alone for id_ in one]
    everything = sorted(ids(list(islice(read_samples(thirteen), 13))))
    for begin in range(0, len(drawn), 13):
        epoch = drawn[begin : begin + 13]
        assert len(set(epoch)) == len(epoch), "doubled within an epoch"
        if len(epoch) == 13:
            assert sorted(epoch) == everything, "lost in an epoch"
    # Stopped after some batches on one rank, resumed on `world` ranks; the state goes through JSON as in a checkpoint.
    at = min(at, count)
    stream = open_stream(thirteen, batch)
    for _ in range(at):
        stream.next_batch()
    state = json.loads(json.dumps(stream.state_dict()))
    assert global_batches(thirteen, batch, world, count - at, state) == alone[at:]


def test_epochs_and_seeds_have_orders_of_their_own(thirteen: Path) -> None:
    stream = open_stream(thirteen, 13)
    orders = [ids(stream.next_batch()) for _ in range(50)]
    assert stream.position == 50 * 13
    assert len({tuple(order) for order in orders}) == 50
    # Fixed for good: a checkpoint of today must go on in the same order under a later version.
    assert [int(id_.split("-")[1]) for id_ in orders[0]] == [10, 5, 12, 6, 11, 8, 3, 9, 4, 7, 2, 0, 1]
    firsts = Counter(order[0] for order in orders)
    assert len(firsts) > 9, "every sample comes first now and then"
    assert ids(open_stream(thirteen, 13, seed=6).next_batch()) != orders[0]


def test_a_state_of_other_shards_or_settings_is_refused(thirteen: Path, tmp_path: Path) -> None:
    state = open_stream(thirteen, 4).state_dict()
    write_shards(tmp_path / "shards", make_samples(13, seed=1), fingerprint=FINGERPRINT)
    for stream, key in (
        (open_stream(thirteen, 4, seed=6), "seed"),
        (open_stream(thirteen, 4, shuffle_shards=2), "shuffle_shards"),
        (open_stream(tmp_path / "shards", 4), "content_hash"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint's {key} is"):
            stream.load_state_dict(state)
    other_batch = open_stream(thirteen, 5, 1, 3)
    other_batch.load_state_dict(state)


def test_a_folder_replaced_under_a_reader_is_an_error_and_not_other_samples(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, make_samples(13), fingerprint=FINGERPRINT)
    stream = open_stream(folder, 4)
    stream.next_batch()
    write_shards(folder, make_samples(13), fingerprint=FINGERPRINT, replace=True)
    stream.next_batch()  # the same contents: nothing was replaced
    write_shards(tmp_path / "other", make_samples(13, seed=1), fingerprint=FINGERPRINT)
    shutil.rmtree(folder)
    (tmp_path / "other").rename(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match="was replaced while it was being read"):
            stream.next_batch()
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="was replaced while it was being read"):
        stream.next_batch()


# Reads a shard folder until it is told to end.
READER = """
import sys
sys.path[:0] = {paths!r}
from support.stores import open_stream
from pathlib import Path
stream = open_stream(Path(sys.argv[1]), 4)
print(stream.next_batch()[0].trajectory.id, flush=True)
sys.stdin.readline()
stream.next_batch()
stream.close()
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("mode", [0o755, 0o555])
def test_shards_that_another_process_reads_are_not_replaced(tmp_path: Path, mode: int) -> None:
    """Also where the reader may not write to the folder."""
    folder = tmp_path / "shards"
    write_shards(folder, make_samples(13), fingerprint=FINGERPRINT)
    before = contents(folder)
    folder.chmod(mode)
    code = READER.format(paths=[str(ROOT), str(ROOT / "tests")])
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=pipe, stdout=pipe, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline()
        write_shards(folder, make_samples(13), fingerprint=FINGERPRINT, replace=True)  # the same: nothing to replace
        with pytest.raises(ValueError, match=rf"shards is being read by process {reader.pid}: wait until it ends"):
            write_shards(folder, make_samples(6), fingerprint=FINGERPRINT, replace=True)
        assert contents(folder) == before
        print(file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "closed\n"
        folder.chmod(0o755)
        write_shards(folder, make_samples(6), fingerprint=FINGERPRINT, replace=True)
        assert list(read_samples(folder)) == make_samples(6)
        print(file=reader.stdin, flush=True)


def test_shards_are_not_opened_while_they_are_being_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, make_samples(13), fingerprint=FINGERPRINT)
    held = own(folder)
    assert held is not None
    with pytest.raises(ValueError, match="shards is just being replaced by another process: start again"):
        open_stream(folder, 4)
    os.close(held)
    open_stream(folder, 4).close()


def test_impossible_numbers_are_refused(thirteen: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 3 trajectories leaves some of 4 ranks without one"):
        open_stream(thirteen, 3, 0, 4)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        open_stream(thirteen, 2, 2, 2)


# ---- the library


TWO_RANKS = """
import json, sys
sys.path[:0] = {paths!r}
import torch.distributed as dist
from swirl_fast.data.stream import TrajectoryStream
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
stream = TrajectoryStream({folder!r}, global_batch=5, rank=rank, world_size=world, seed=5)
shares = [None] * world
dist.all_gather_object(shares, [[s.trajectory.id for s in stream.next_batch()] for _ in range(4)])
if rank == 0:
    print(json.dumps(shares))
dist.destroy_process_group()
"""


def test_two_ranks_of_a_process_group_draw_the_batches_of_one(thirteen: Path, tmp_path: Path) -> None:
    """Two processes on gloo, with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = TWO_RANKS.format(paths=[str(ROOT)], folder=str(thirteen))
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **world, "TMPDIR": str(tmp_path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    first, second = json.loads(outputs[0].splitlines()[-1])
    alone = open_stream(thirteen, 5)
    for one, two in zip(first, second, strict=True):
        expected = ids(alone.next_batch())
        assert (one, two) == (expected[0::2], expected[1::2])
    assert not list(tmp_path.glob("*lock*")), (
        "StreamingDataset leaves lock files there, which this stream does not need"
    )


def test_the_shards_are_ordinary_mds_for_other_readers(thirteen: Path, tmp_path: Path) -> None:
    """The library's own StreamingDataset, in a process and with a folder for its lock files of its own."""
    code = (
        f"import sys, json; sys.path[:0] = {[str(ROOT / 'tests')]!r}\n"
        "from support.mds_library import streaming\n"
        f"dataset = streaming().StreamingDataset(local={str(thirteen)!r}, batch_size=1, shuffle=False)\n"
        "print(json.dumps([[s['meta']['id'], s['tokens'].tolist()] for s in dataset]))\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [[sample.trajectory.id, sample.trajectory.tokens.tolist()] for sample in make_samples(13)]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("limit", [1 << 26, 9_000])
def test_the_library_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """One shard, and several; so that what either wrote is read by the other."""
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    samples = make_samples(7)
    write_shards(tmp_path / "ours", samples, fingerprint=FINGERPRINT)
    columns, theirs = shard_index.COLUMNS, tmp_path / "theirs"
    with streaming().MDSWriter(columns=columns, out=str(theirs), size_limit=limit) as writer:
        for sample in samples:
            writer.write(encode_sample(sample))
    written = {path.name: path.read_bytes() for path in theirs.iterdir()}
    assert len(written) == {1 << 26: 2, 9_000: 6}[limit]
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir() if path.name in written}
    reader = mds.Reader(theirs)
    assert [decode_sample(reader[place]) for place in range(len(reader))] == samples
    with pytest.raises(IndexError, match="place 7 of 7 samples"):
        reader[7]
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)  # less than a sample, where the library begins with a shard of none
    write_shards(tmp_path / "tiny", samples, fingerprint=FINGERPRINT)
    assert mds.Reader(tmp_path / "tiny").samples == [1] * 7


# ---- the states that are kept, and further trajectories


def test_marks_of_states_come_back_and_say_what_is_longest(tmp_path: Path) -> None:
    samples = make_samples(8)
    for number, sample in enumerate(samples):
        sample.kept = [
            (number + i) % 2 == 0 or sample.trajectory.num_steps == 1 for i in range(sample.trajectory.num_steps)
        ]
    manifest = write_shards(tmp_path / "shards", samples, fingerprint=FINGERPRINT)
    assert list(read_samples(tmp_path / "shards")) == samples
    assert manifest.states == sum(sum(sample.kept) for sample in samples) < manifest.steps
    kept = [step for sample in samples for step, one in zip(sample.trajectory.steps, sample.kept, strict=True) if one]
    assert manifest.longest_state["tokens"] == max(step.start for step in kept)
    assert manifest.longest_path["tokens"] == max(step.end for step in kept)


@pytest.mark.parametrize("kept", [[False, False], [True], [True, True, True]])
def test_a_sample_without_a_state_or_with_other_marks_is_refused(tmp_path: Path, kept: list[bool]) -> None:
    sample = make_samples(2)[1]
    sample.kept = kept
    with pytest.raises(ValueError, match="'q1-1' has 2 steps and . marks"):
        write_shards(tmp_path / "shards", [sample], fingerprint=FINGERPRINT)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("marks", [[0, 1], ["true", "false"], [None, True], [False, False]])
def test_marks_that_are_no_marks_are_refused(marks: list[object]) -> None:
    encoded = shards.encode_sample(make_samples(2)[1])
    for step, mark in zip(encoded["meta"]["steps"], marks, strict=True):
        step["kept"] = mark
    with pytest.raises(ValueError, match="'q1-1': kept is .* filter did not write this"):
        shards.decode_sample(encoded)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_is_read_further_is_passed_over_by_all_ranks(thirteen: Path, prefetch: int) -> None:
    """Batches of 4 on two ranks, which read 3 and 1 trajectories further; the order is that of one rank."""
    whole = open_stream(thirteen, 26)
    order = ids(whole.next_batch()) + ids(whole.next_batch())
    ranks = [open_stream(thirteen, 4, rank, 2, prefetch=prefetch) for rank in range(2)]
    for rank, (stream, count) in enumerate(zip(ranks, (3, 1), strict=True)):
        assert ids(stream.next_batch()) == order[rank:4:2]
        found, position = [], stream.position
        for _ in range(count):
            more, position = stream.further(position, 1)
            found += ids(more)
        assert found == order[4 + rank : 4 + 2 * count : 2] and position == 4 + 2 * count
        assert stream.position == 4, "nothing is handed out by that"
        stream.pass_over(3)
        assert stream.position == 10 and ids(stream.next_batch()) == order[10 + rank : 14 : 2]
        again = open_stream(thirteen, 4, rank, 2, prefetch=prefetch)
        again.load_state_dict({**stream.state_dict(), "position": 10})
        assert ids(again.next_batch()) == order[10 + rank : 14 : 2]
        again.pass_over(0)
        assert ids(again.next_batch()) == order[14 + rank : 18 : 2]
        for one in (stream, again):
            one.close()
    whole.close()
