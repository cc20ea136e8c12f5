"""Stages on several ranks whose machines share no disk: what comes out is what one process gives, also after a kill and on other ranks.

The ranks are forks with the environment that torchrun gives its processes; a machine is a folder (tests/multinode has networks too).
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import forks
from support.runs import environment, free_port, overrides, start
from support.stores import assert_same_store, rows

from swirl_fast.config import ConfigError
from swirl_fast.data.store import Store
from swirl_fast.outputs.run import OpenRun
from swirl_fast.stages import parts as parts_module
from swirl_fast.stages.parts import agree, receive_file, send_file

# Commands in the folder of a node, in one group; rank DIES kills itself after so many rounds of actions as AFTER says.
PROGRAM = """
import json, os, signal, sys
os.chdir(os.environ["NODE"])
from swirl_fast import cli, ranks
from swirl_fast.rollouts.collector import Collector
left, real = int(os.environ["AFTER"]), Collector._round
def dying(self, active):
    global left
    if left == 0 and os.environ["RANK"] == os.environ["DIES"]:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return real(self, active)
Collector._round = dying
with ranks.joined():
    for stage in sys.argv[1:]:
        if code := cli.main(json.loads(stage)):
            sys.exit(code)
"""
NODES = (0, 0, 1, 1)  # rank -> its machine


def on_nodes(
    base: Path, stages: list[list[str]], nodes: tuple[int, ...] = NODES, dies: int = -1, after: int = 0
) -> subprocess.CompletedProcess[str]:
    """nodes: of every rank."""
    envs = forks.ranks_of(len(nodes), environment(), free_port())
    for rank, (env, node) in enumerate(zip(envs, nodes, strict=True)):
        folder = base / f"node{node}"
        folder.mkdir(exist_ok=True)
        env |= {"NODE": str(folder), "GROUP_RANK": str(node), "LOCAL_RANK": str(nodes[:rank].count(node))}
        env |= {"LOCAL_WORLD_SIZE": str(nodes.count(node)), "DIES": str(dies), "AFTER": str(after)}
    return forks.run_all(["-c", PROGRAM, *map(json.dumps, stages)], envs, timeout=600)


def stages(folder: Path, model: Path, judged: str, *more: str) -> list[list[str]]:
    settings = overrides(folder, model, judged, "filter.kind=outcome", "filter.outcome=judge", *more)
    return [["collect", *settings], ["judge", *settings], ["evaluate", *settings, "--of", "base"]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, judged: str) -> Path:
    """What one process makes."""
    base = tmp_path_factory.mktemp("one")
    for stage in stages(base, tiny_model, judged):
        start(stage)
    return base / "r"


def parts(base: Path) -> list[Path]:
    return sorted(base.glob("node*/r/**/*.parts"))


def test_four_ranks_on_two_disks_make_what_one_process_makes(
    one: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    done = on_nodes(tmp_path, stages(Path(), tiny_model, judged))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("collect: 18 trajectories of 6 questions") == 1, "one rank speaks"
    found = tmp_path / "node0" / "r"
    for name in ("trajectories.db", "evaluations/base.db"):
        assert_same_store(found / name, one / name)
    ours, theirs = (
        json.loads((folder / "evaluations" / "base.json").read_text(encoding="utf-8")) for folder in (found, one)
    )
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    assert parts(tmp_path) == [] and not [path for path in (tmp_path / "node1").rglob("*") if path.is_file()]


def test_a_rank_dies_and_other_ranks_go_on(one: Path, tiny_model: Path, judged: str, tmp_path: Path) -> None:
    """Four ranks on two machines, then three with another one on the second, then one process: nothing is drawn twice."""
    collect = stages(Path(), tiny_model, judged, "collect.batch=2")[:1]

    def count(*files: Path) -> int:
        """Tokens that were sampled, those of a step that lies in several files once."""
        found = {}
        for file in files:
            ids = {row[0]: row[1] for row in rows(file, "trajectories")}
            found |= {(ids[row[0]], row[1]): len(row[-2]) // 4 for row in rows(file, "steps")}
        return sum(found.values())

    # It has two questions, so that the second time there is one for each of two ranks, however far the others came.
    assert on_nodes(tmp_path, collect, (0, 1, 1, 0), dies=1, after=1).returncode != 0
    left = sorted(tmp_path.glob("node*/r/trajectories.parts/*.db"))
    assert [file.parents[2].name for file in left] == ["node0", "node0", "node1", "node1"]
    kept = count(*left)
    assert count(left[2]) > 0 and left[2].stem.endswith("rank-1"), "of the rank that died"

    assert on_nodes(tmp_path, collect, (0, 1, 1), dies=1, after=1).returncode != 0
    main = tmp_path / "node0" / "r" / "trajectories.db"
    assert count(main) == kept, "all parts were merged"
    kept = count(main, *tmp_path.glob("node*/r/trajectories.parts/*.db"))

    done = on_nodes(tmp_path, collect, (0, 1))
    assert done.returncode == 0, done.stderr
    total = count(one / "trajectories.db")
    drawn = int(re.search(r"collect: (\d+) tokens generated", done.stdout)[1])  # type: ignore[index]
    assert drawn == total - kept > 0
    assert parts(tmp_path) == []
    with Store(main, writable=False) as ours, Store(one / "trajectories.db", writable=False) as theirs:
        for found, wanted in zip(ours.trajectories(), theirs.trajectories(), strict=True):
            assert (found.id, found.finish, found.tokens.tolist()) == (wanted.id, wanted.finish, wanted.tokens.tolist())
            assert [(s.text, s.observation) for s in found.steps] == [(s.text, s.observation) for s in wanted.steps]


def test_one_process_goes_on_with_parts_on_its_disk(one: Path, tiny_model: Path, judged: str, tmp_path: Path) -> None:
    """And a whole run on two ranks of one machine; settings that differ are named."""
    whole = ["run", *overrides(Path(), tiny_model, judged, "training.steps=1")]
    killed = on_nodes(tmp_path, [["collect", *whole[1:]]], (0, 0), dies=1, after=1)
    assert killed.returncode != 0 and parts(tmp_path)
    start(["collect", *overrides(tmp_path / "node0", tiny_model, judged)])
    assert parts(tmp_path) == []
    with Store(tmp_path / "node0/r/trajectories.db", writable=False) as ours:
        with Store(one / "trajectories.db", writable=False) as theirs:
            assert [t.tokens.tolist() for t in ours.trajectories()] == [
                t.tokens.tolist() for t in theirs.trajectories()
            ]
    done = on_nodes(tmp_path, [whole], (0, 0))
    assert done.returncode == 0, done.stderr
    with OpenRun(tmp_path / "node0" / "r") as run:
        assert {stage.name: stage.state for stage in run.status().stages}["report"] == "done"


def test_ranks_that_do_not_agree_are_told_what_differs() -> None:
    def second(settings: dict[str, Any]) -> Any:
        return SimpleNamespace(gather=lambda mine: [mine, ("host-b", {**mine[1], **settings})])

    mine = {"run": {"folder": "a"}, "collect": {"batch": 8, "top_p": 1.0}, "tools": []}
    agree(second({"run.folder": "b"}), mine)
    with pytest.raises(
        ConfigError, match="rank 1, on host-b, .* collect.batch is 8 on rank 0 and 4 on rank 1. Give all"
    ):
        agree(second({"collect.batch": 4}), mine)


@given(st.binary(max_size=100))
def test_a_file_travels_in_pieces(data: bytes) -> None:
    pieces: list[bytes] = []
    ranks: Any = SimpleNamespace(send=lambda piece, to: pieces.append(piece), receive=lambda source: pieces.pop(0))
    with TemporaryDirectory() as folder, patch.object(parts_module, "PIECE", 7):
        sent, received = Path(folder) / "sent.db", Path(folder) / "deep" / "received.db"
        sent.write_bytes(data)
        send_file(ranks, 1, sent)
        assert max(map(len, pieces)) <= 7
        receive_file(ranks, 0, received)
        assert received.read_bytes() == data and not pieces and len(list(received.parent.iterdir())) == 1
