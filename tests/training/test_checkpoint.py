"""Checkpoints of a small module in one process: what is kept, what is refused, and that training goes on while one is written."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from swirl_fast.ranks import Ranks
from swirl_fast.training import checkpoint
from swirl_fast.training.checkpoint import Checkpoints

ALONE = Ranks(0, 1, torch.device("cpu"))
Training = tuple[torch.nn.Module, torch.optim.Optimizer]


def new_training(seed: int = 0) -> Training:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def advance(training: Training) -> None:
    model, optimizer = training
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors(training: Training) -> list[torch.Tensor]:
    model, optimizer = training
    of_optimizer = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *of_optimizer)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[int, list[torch.Tensor]]]:
    """A folder with checkpoints 1, 2 and 3, and the tensors at each."""
    training, at = new_training(), {}
    with Checkpoints(tmp_path, ALONE, keep=3) as checkpoints:
        for step in (1, 2, 3):
            advance(training)
            at[step] = tensors(training)
            checkpoints.save(step, *training, {"step": step})
    return tmp_path, at


def load(folder: Path) -> tuple[int | None, list[torch.Tensor]]:
    training = new_training(seed=1)
    with Checkpoints(folder, ALONE, keep=3) as checkpoints:
        state = checkpoints.load_latest(*training)
    return state and state["step"], tensors(training)


def test_the_newest_comes_back_bit_for_bit_and_training_goes_on_as_if_never_stopped(
    written: tuple[Path, dict[int, list[torch.Tensor]]],
) -> None:
    folder, at = written
    step, found = load(folder)
    assert step == 3 and same(found, at[3])
    shutil.rmtree(folder / "step_000003")
    training = new_training(seed=1)
    with Checkpoints(folder, ALONE, keep=3) as checkpoints:
        checkpoints.load_latest(*training)
    advance(training)
    assert same(tensors(training), at[3])


def test_a_checkpoint_before_the_first_update_changes_nothing(tmp_path: Path) -> None:
    """torch makes the moments that it saves by a step of its own."""
    undisturbed, saved, loaded = new_training(), new_training(), new_training(seed=1)
    with Checkpoints(tmp_path, ALONE, keep=3) as checkpoints:
        checkpoints.save(0, *saved, {"step": 0})
    with Checkpoints(tmp_path, ALONE, keep=3) as checkpoints:
        checkpoints.load_latest(*loaded)
    for training in (undisturbed, saved, loaded):
        advance(training)
    assert same(tensors(saved), tensors(undisturbed)) and same(tensors(loaded), tensors(undisturbed))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let, begun, real = threading.Event(), threading.Event(), checkpoint.hash_file

    def slow(file: Path) -> str:
        begun.set()
        assert let.wait(60)
        return real(file)

    monkeypatch.setattr(checkpoint, "hash_file", slow)
    training = new_training()
    with Checkpoints(tmp_path, ALONE, keep=2) as checkpoints:
        advance(training)
        wanted = tensors(training)
        checkpoints.save(1, *training, {"step": 1})
        assert begun.wait(60)
        advance(training)  # while it is being written
        assert names(tmp_path) == ["step_000001.tmp"]
        second = threading.Thread(target=checkpoints.save, args=(2, *training, {"step": 2}))
        second.start()
        second.join(0.2)
        assert second.is_alive() and names(tmp_path) == ["step_000001.tmp"], "two were written at the same time"
        let.set()
        second.join(60)
    assert names(tmp_path) == ["step_000001", "step_000002"]
    shutil.rmtree(tmp_path / "step_000002")
    assert same(load(tmp_path)[1], wanted), "the optimizer's next step got into the checkpoint"


def test_synchronous_checkpoints_are_there_when_save_returns(tmp_path: Path) -> None:
    training = new_training()
    advance(training)
    with Checkpoints(tmp_path, ALONE, keep=2, asynchronous=False) as checkpoints:
        checkpoints.save(1, *training, {"step": 1})
        assert names(tmp_path) == ["step_000001"] and checkpoint.damage(tmp_path / "step_000001") is None


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda file: file.write_bytes(b"{}")], ids=["flip", "lost", "cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    written: tuple[Path, dict[int, list[torch.Tensor]]], name: str, harm: Callable[[Path], object]
) -> None:
    folder, at = written
    harm(folder / "step_000003" / name)
    with pytest.warns(UserWarning, match=r"step_000003 is damaged .*step_000003\.damaged, using the one before it"):
        step, found = load(folder)
    assert step == 2 and same(found, at[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(folder)[0] == 2  # it is set aside, and neither read nor counted again


def test_a_damaged_newer_checkpoint_does_not_push_out_whole_ones(
    written: tuple[Path, dict[int, list[torch.Tensor]]],
) -> None:
    folder, _ = written
    flip(folder / "step_000003" / "state.json")
    training = new_training()
    with Checkpoints(folder, ALONE, keep=1) as checkpoints:
        with pytest.warns(UserWarning, match="damaged"):
            checkpoints.load_latest(*training)
        checkpoints.save(3, *training, {"step": 3})
    assert names(folder) == ["step_000003", "step_000003.damaged"] and load(folder)[0] == 3


def test_no_fresh_start_when_every_checkpoint_is_damaged(
    written: tuple[Path, dict[int, list[torch.Tensor]]],
) -> None:
    folder, _ = written
    for path in checkpoint.checkpoints(folder):
        flip(path / "state.json")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no whole checkpoint, 3 are damaged"):
        load(folder)


@pytest.mark.parametrize(
    "copy", ["step_000001_2", "step_000001_backup", "step_000001-copy", "step_000001 (copy)", "step_9_9", "step_"]
)
def test_a_copy_that_somebody_made_is_no_checkpoint(
    written: tuple[Path, dict[int, list[torch.Tensor]]], copy: str
) -> None:
    """Of `step_000001_2` the step would be read as 12, and training would go on from step 1 in place of 3."""
    folder, at = written
    shutil.copytree(folder / "step_000001", folder / copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step, found = load(folder)
    assert step == 3 and same(found, at[3])
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step_000001", "step_000002", "step_000003"]
    assert (folder / copy).is_dir()


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    training = new_training()
    with Checkpoints(tmp_path / "checkpoints", ALONE, keep=2) as checkpoints:
        assert checkpoints.load_latest(*training) is None


def test_a_refused_state_restores_nothing(written: tuple[Path, dict[int, list[torch.Tensor]]]) -> None:
    def refuse(state: dict[str, object]) -> None:
        raise ValueError(f"step {state['step']}")

    training = new_training(seed=1)
    before = tensors(training)
    with Checkpoints(written[0], ALONE, keep=3) as checkpoints, pytest.raises(ValueError, match="step 3"):
        checkpoints.load_latest(*training, refuse)
    assert same(tensors(training), before)


def test_the_remains_of_dead_writes_are_removed(written: tuple[Path, dict[int, list[torch.Tensor]]]) -> None:
    folder, _ = written
    shutil.copytree(folder / "step_000003", folder / "step_000004.tmp")
    (folder / "best.tmp").symlink_to("step_000001")
    assert load(folder)[0] == 3
    assert names(folder) == ["step_000001", "step_000002", "step_000003"]


def test_the_last_n_and_the_best_are_kept(tmp_path: Path) -> None:
    """Two steps a checkpoint; the best mean is that of steps 3 and 4, the best single step is 1."""
    labels = [0.9, 0.1, 0.6, 0.8, 0.5, float("nan"), 0.95, 0.4, 0.3, 0.3]

    def save_on(steps: Iterator[int], checkpoints: Checkpoints) -> None:
        for step in steps:
            checkpoints.measure({"process_label": labels[step - 1], "reward": 1.0 - step / 100})
            if step % 2 == 0:
                checkpoints.save(step, *new_training(), {"step": step})

    with Checkpoints(tmp_path, ALONE, keep=2, best="process_label") as checkpoints:
        save_on(iter(range(1, 8)), checkpoints)
        checkpoints.save(7, *new_training(), {"step": 7}, scheduled=False)  # told to stop
    assert names(tmp_path) == ["best", "step_000004", "step_000006", "step_000007"]
    assert (tmp_path / "best").resolve().name == "step_000004"
    mark = json.loads((tmp_path / "step_000004" / "state.json").read_text(encoding="utf-8"))["best"]
    assert mark == {"metric": "process_label", "mean": pytest.approx(0.7), "window": []}
    assert json.loads((tmp_path / "step_000006" / "state.json").read_text(encoding="utf-8"))["best"][
        "mean"
    ] == pytest.approx(0.5)
    with Checkpoints(tmp_path, ALONE, keep=2, best="process_label") as checkpoints:
        checkpoints.load_latest(*new_training())
        save_on(iter(range(8, 11)), checkpoints)
    assert names(tmp_path) == ["best", "step_000004", "step_000008", "step_000010"]
    # of steps 7 and 8, although the training was stopped between them
    assert json.loads((tmp_path / "step_000008" / "state.json").read_text(encoding="utf-8"))["best"][
        "mean"
    ] == pytest.approx(0.675)


@pytest.mark.parametrize("best", ["", "reward"])
@pytest.mark.parametrize(
    "harm", [flip, Path.unlink, lambda file: file.write_bytes(b"\xff[]")], ids=["flip", "lost", "cut"]
)
def test_an_older_one_that_is_damaged_stops_nothing(tmp_path: Path, harm: Callable[[Path], object], best: str) -> None:
    with Checkpoints(tmp_path, ALONE, keep=2, best=best) as checkpoints:
        for step, value in enumerate((0.9, 0.5, 0.7), 1):
            checkpoints.measure({"reward": value})
            checkpoints.save(step, *new_training(), {"step": step})
            checkpoints.wait()
            if step == 1:
                harm(tmp_path / "step_000001" / "state.json")
    assert names(tmp_path)[-2:] == ["step_000002", "step_000003"]


def test_a_kill_before_the_link_is_mended_when_the_folder_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, target: str) -> None:
        raise OSError("killed")

    checkpoints = Checkpoints(tmp_path, ALONE, keep=1, best="reward")
    for step, value in enumerate((0.1, 0.2, 0.9), 1):
        checkpoints.measure({"reward": value})
        if step == 3:
            checkpoints.wait()
            monkeypatch.setattr(Path, "symlink_to", killed)
        checkpoints.save(step, *new_training(), {"step": step})
    with pytest.raises(RuntimeError, match="killed"), checkpoints:
        pass
    monkeypatch.undo()
    assert names(tmp_path) == ["best", "step_000002", "step_000003"]
    with Checkpoints(tmp_path, ALONE, keep=1, best="reward") as checkpoints:
        assert (tmp_path / "best").resolve().name == "step_000003"
        checkpoints.load_latest(*new_training())
        assert names(tmp_path) == ["best", "step_000003"]


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, ALONE, keep=1) as checkpoints:
        (folder / "step_000001.tmp").mkdir()  # as if it were being written
        with pytest.raises(ValueError, match=r"checkpoints is being written by process \d+ on .*another run.name"):
            Checkpoints(folder, ALONE, keep=1)
        assert (folder / "step_000001.tmp").is_dir()
        checkpoints.save(1, *new_training(), {"step": 1})
    assert load(folder)[0] == 1


def test_of_a_metric_to_be_small_the_smallest_is_the_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, ALONE, keep=1, best="malformed") as checkpoints:
        for step, value in enumerate((0.5, 0.1, 0.3), 1):
            checkpoints.measure({"malformed": value})
            checkpoints.save(step, *new_training(), {"step": step})
    assert names(tmp_path) == ["best", "step_000002", "step_000003"]


def test_a_write_that_fails_stops_training_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, real = new_training(), checkpoint.hash_file

    def full(file: Path) -> str:
        if "step_000002" in str(file):
            raise OSError(28, "No space left on device")
        return real(file)

    monkeypatch.setattr(checkpoint, "hash_file", full)
    with Checkpoints(tmp_path, ALONE, keep=1) as checkpoints:
        checkpoints.save(1, *training, {"step": 1})
        checkpoints.save(2, *training, {"step": 2})
        with pytest.raises(RuntimeError, match=r"step_000002 could not be written.*intact.*No space left"):
            checkpoints.save(3, *training, {"step": 3})
    assert load(tmp_path)[0] == 1
    with pytest.raises(RuntimeError, match="could not be written"), Checkpoints(tmp_path, ALONE, keep=1) as checkpoints:
        checkpoints.save(2, *training, {"step": 2})  # the last one of a training
    with (
        pytest.warns(UserWarning, match="could not be written"),
        pytest.raises(KeyboardInterrupt),
        Checkpoints(tmp_path, ALONE, keep=1) as checkpoints,
    ):
        checkpoints.save(2, *training, {"step": 2})
        raise KeyboardInterrupt
