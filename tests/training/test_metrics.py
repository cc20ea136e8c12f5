"""What a training step reports: MFU from the work that was really done, and the same numbers in every place, NaN or not."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import small_models
from support.html_page import page
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step_training.measure import PeakMemory
from benchmarks.step_training.ways import Shape
from benchmarks.train_throughput.setup import MODELS, llama, make_batch, make_trainer
from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.config import ConfigError, TrainingConfig, load
from swirl_fast.metrics import console_line, read_metrics
from swirl_fast.models.policy import DeviceComb, Policy, model_size
from swirl_fast.objective import Actions, advantages
from swirl_fast.ranks import Ranks
from swirl_fast.report.curves import curves
from swirl_fast.training import utilization
from swirl_fast.training.build import settings_of
from swirl_fast.training.metrics_log import MetricsLog, check_wandb
from swirl_fast.training.step_metrics import StepSums
from swirl_fast.training.trainer import Trainer

CPU = torch.device("cpu")
NAN = {"reward": math.nan, "grad_norm": math.inf, "loss": -math.inf}


def row(step: int, **changes: float) -> dict[str, float]:
    names = (
        *("reward", "process_label", "malformed", "unknown", "kl", "entropy", "grad_norm", "loss", "engine_gap_mean"),
        *("cache_hit_rate", "tokens_computed_per_second", "tokens_effective_per_second", "memory_gib", "seconds"),
    )
    return {"step": step} | {name: step + i / 100 for i, name in enumerate(names)} | changes


def strict(text: str) -> list[dict[str, Any]]:
    """By a parser that knows no NaN, as those of other languages."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# ---- where the numbers go


class Wandb(ModuleType):
    """In place of the package: keeps what it gets."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished: list[int] = []

    def init(self, **named: Any) -> SimpleNamespace:
        self.started.append(named)
        return SimpleNamespace(log=self.log, finish=lambda exit_code: self.finished.append(exit_code))

    def log(self, data: dict[str, float], step: int) -> None:
        self.logged.append((step, data))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_all_places_get_the_same_numbers_and_json_no_nan(
    tmp_path: Path, wandb: Wandb, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(1), row(2, **NAN), row(3)]
    training = TrainingConfig(steps=3, wandb="project")
    with MetricsLog(tmp_path, 0, True, training, {"seed": 5}) as log:
        for one in rows:
            log.write(one)
    finite = [{name: value for name, value in one.items() if math.isfinite(value)} for one in rows]
    assert finite[1].keys() == rows[1].keys() - NAN.keys()
    written = strict((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"))
    assert written == [rows[0], rows[1] | dict.fromkeys(NAN), rows[2]]
    for one, back in zip(rows, read_metrics(tmp_path), strict=True):
        assert back == pytest.approx(one | ({name: math.nan for name in NAN} if one["step"] == 2 else {}), nan_ok=True)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    for name in rows[0]:
        shown = {event.step: event.value for event in board.Scalars(name)}
        assert shown == pytest.approx({int(one["step"]): one[name] for one in finite if name in one}, rel=1e-6), name
    assert wandb.logged == [(int(one["step"]), one) for one in finite]
    one, two, three = capsys.readouterr().out.splitlines()
    assert "  reward 1.000  " in one and "reward" not in two and "  reward 3.000  " in three


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path: Path, wandb: Wandb) -> None:
    folder = tmp_path / "name"
    folder.mkdir()
    training = TrainingConfig(steps=4, wandb="project", tensorboard=False)
    with pytest.raises(KeyboardInterrupt), MetricsLog(folder, 0, True, training, {"seed": 5}) as log:
        log.write(row(1))
        raise KeyboardInterrupt
    with MetricsLog(folder, 1, True, training, {"seed": 5}) as log:
        log.write(row(2))
    first, second = wandb.started
    assert first == second and wandb.finished == [1, 0]
    id_ = (folder / "wandb_id").read_text(encoding="utf-8")
    assert first == {
        **{"project": "project", "id": id_, "resume": "allow", "name": "name", "dir": str(folder)},
        "config": {"seed": 5},
    }
    assert [step for step, _ in wandb.logged] == [1, 2]
    other = tmp_path / "other"
    other.mkdir()
    with MetricsLog(other, 0, True, training):
        pass
    assert wandb.started[2]["id"] != id_
    with MetricsLog(tmp_path, 0, False, training) as log:  # not rank 0
        log.write(row(1))
    with MetricsLog(tmp_path, 0, True, TrainingConfig(tensorboard=False)) as log:
        log.write(row(1))
    assert len(wandb.started) == 3 and len(wandb.logged) == 2


def test_weights_and_biases_without_the_package_is_refused(
    monkeypatch: pytest.MonkeyPatch, wandb: Wandb, tmp_path: Path
) -> None:
    training = TrainingConfig(wandb="project")
    check_wandb(training)
    (tmp_path / "wandb").mkdir()  # as a run in this folder leaves it
    monkeypatch.syspath_prepend(tmp_path)
    for there in (None, ModuleType("wandb")):
        monkeypatch.setitem(sys.modules, "wandb", there)
        with pytest.raises(ConfigError, match=r"training\.wandb=project: .* pip install wandb"):
            check_wandb(training)
        check_wandb(TrainingConfig())


def test_rows_after_the_checkpoint_are_dropped_and_older_nan_is_mended(tmp_path: Path) -> None:
    old = json.dumps(row(1, reward=math.nan)) + "\n" + json.dumps(row(2)) + "\n" + json.dumps(row(3))[:50]
    assert "NaN" in old
    (tmp_path / "metrics.jsonl").write_text(old, encoding="utf-8")
    with MetricsLog(tmp_path, 1, True, TrainingConfig(steps=2, tensorboard=False)) as log:
        log.write(row(2, loss=7.0))
    assert strict((tmp_path / "metrics.jsonl").read_text(encoding="utf-8")) == [
        row(1) | {"reward": None},
        row(2, loss=7.0),
    ]


def test_the_report_leaves_out_what_is_not_a_number(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, True, TrainingConfig(steps=3, tensorboard=False)) as log:
        for one in (row(1, mfu=0.4, mfu_step=0.3), row(2, **NAN, mfu=0.4, mfu_step=0.3), row(3, mfu=0.2, mfu_step=0.1)):
            log.write(one)
    html = curves(read_metrics(tmp_path))
    assert "nan" not in html.lower() and ">inf" not in html
    root = page(html)
    figures = {figure.one("h3").children[0].strip(): figure for figure in root.all("figure")}
    values = json.loads(figures["Gradient norm"].attributes["data-chart"])["values"]
    assert values == [["1.06", "–", "3.06"]]
    assert json.loads(figures["Model FLOPs utilization"].attributes["data-chart"])["values"] == [
        ["40.0%", "40.0%", "20.0%"],
        ["30.0%", "30.0%", "10.0%"],
    ]
    table = root.one("table")
    keys = [th.text for th in table.one("thead").all("th")]
    second = dict(zip(keys, (td.text for td in table.one("tbody").all("tr")[1].all("td")), strict=True))
    assert second["reward"] == second["grad norm"] == second["loss"] == "–" and second["kl"] == "2.04"
    plain = {figure.one("h3").children[0].strip() for figure in page(curves([row(1)])).all("figure")}
    assert "Model FLOPs utilization" not in plain


def test_sampling_beside_the_training_takes_no_time_of_the_step() -> None:
    one = row(1) | {"seconds": 10.0, "seconds_rollout": 7.0, "seconds_forward_backward": 6.0, "seconds_hidden": 0.0}
    for hidden, wanted in ((0.0, ["6.00", "7.00"]), (6.5, ["4.00", "6.00"])):
        html = curves([one | {"seconds_hidden": hidden}])
        figures = {figure.one("h3").children[0].strip(): figure for figure in page(html).all("figure")}
        values = json.loads(figures["Time by phase"].attributes["data-chart"])["values"]
        assert sorted(float(text) for (text,) in values if float(text)) == [float(text) for text in wanted]


# ---- utilization


def trainer(*settings: str) -> Trainer:
    """Over three trajectories of 2 states with 3 actions of 8 tokens at each."""
    ranks = Ranks(0, 1, CPU)
    config = load(None, ["training.max_engine_gap=0", *settings])
    batch = make_batch(Shape(20, 8, 12), 2, 3, 3, MODELS["tiny"].vocab, ranks, 0, rows=False)
    return make_trainer(config, ranks, llama(MODELS["tiny"], 128), [batch])[0]


@pytest.mark.parametrize(
    "settings",
    [
        ("algorithm.kl_coef=0.1", "training.token_budget=64"),
        ("algorithm.name=ppo", "algorithm.updates_per_batch=2", "training.activation_checkpointing=full"),
    ],
)
def test_mfu_counts_the_work_of_every_update_and_nothing_done_again(settings: tuple[str, ...]) -> None:
    """Against the packed rows themselves; neither the reference, nor old log-probs, nor checkpointing count."""
    made = trainer(*settings, "training.peak_tflops=0.002")
    rows = []
    whole = made._update
    made._update = lambda batches, *rest, **named: (
        rows.append([b.row for b in batches]),
        whole(batches, *rest, **named),
    )[1]
    found = made.train_step()
    linear, width, output = 0, 4 * 8, 256 * 32
    for name, parameter in made.policy.model.named_parameters():
        if name.endswith("proj.weight"):
            linear += parameter.numel()
    work = sum(
        6 * linear * r.tokens_1T.numel() + 12 * 2 * width * int((r.depth_1T + 1).sum()) + 6 * output * len(r.rows_E)
        for update in rows
        for r in update
    )
    assert len(rows) == made.config.algorithm.updates_per_batch and work > 1e7
    busy = found["seconds_forward_backward"]
    assert found["tflops"] == pytest.approx(work / busy / 1e12)
    assert found["mfu"] == pytest.approx(work / busy / 2e9)
    assert found["mfu_step"] == pytest.approx(work / found["seconds"] / 2e9) and found["mfu_step"] < found["mfu"]
    assert 0.1 < found["memory_gib"] < 64
    assert f"mfu {found['mfu']:.1%} ({found['mfu_step']:.1%} of the step)" in console_line(found, 3)


def test_an_unknown_device_has_no_mfu() -> None:
    found = trainer("algorithm.kl_coef=0").train_step()
    assert "mfu" not in found and "mfu_step" not in found and "mfu" not in console_line(found, 3)
    assert found["tflops"] > 0


def test_flops_are_those_that_torch_counts() -> None:
    """All matrix products but attention's, which torch counts as if every pair were visible. The logits are kept for the
    backward, which would make them again where memory is short."""
    model = small_models.build("llama", torch.float32)
    policy = Policy(model)
    draw = np.random.default_rng(0)
    actions = tuple(draw.integers(1, 97, 9).astype(np.int32) for _ in range(4))
    comb = pack([Trunk(draw.integers(1, 97, 30).astype(np.int32), (SampledState(20, actions, (0, 1, 2, 3)),))])
    row, size = DeviceComb.of(comb), model_size(model)
    attention = 12 * sum(width * comb.visible_pairs(window) for width, window in size.attention)
    output = 6 * size.output * len(comb.rows_E)
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(row.tokens_1T, position_ids=row.depth_1T, use_cache=False, packed=row)
        hidden.last_hidden_state.sum().backward()
    assert _products(counter) == comb.flops(size) - attention - output > 1e6
    with FlopCounterMode(display=False) as counter:
        policy(row)[0].sum().backward()
    assert _products(counter) == comb.flops(size) - attention


def _products(counter: FlopCounterMode) -> int:
    counted = ("aten.mm", "swirl_kernels.linear_logprob", "swirl_kernels.linear_logprob_backward")
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if str(op) in counted)


def test_peaks_are_known_by_name_and_never_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = torch.bfloat16, torch.float32
    known = {
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835.5e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
    }
    for name, peak in known.items():
        assert utilization.table_peak(name, half) == pytest.approx(peak), name
    assert utilization.table_peak("NVIDIA A100-SXM4-80GB", single) == 19.5e12
    unknown = (
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA L400",
        "NVIDIA RTX H200",
        "Tesla T4",
        "AMD Instinct MI300X",
    )
    assert [utilization.table_peak(name, half) for name in unknown] == [None] * len(unknown)
    assert utilization.table_peak("NVIDIA B200", single) is None
    assert utilization.table_peak("NVIDIA H200", torch.float16) is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # TF32
    assert utilization.table_peak("NVIDIA A100-SXM4-80GB", single) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cuda = torch.device("cuda")
    assert utilization.peak_flops(0, cuda, half) == 989.4e12 and utilization.peak_flops(3, cuda, half) == 3e12
    assert utilization.peak_flops(0, CPU, half) is None and utilization.peak_flops(0.5, CPU, half) == 5e11


def test_utilization_is_of_all_ranks() -> None:
    assert utilization.utilization(6.0, 2.0, 4.0, 0.5, 3) == {"mfu": 2.0, "mfu_step": 1.0}
    assert utilization.utilization(0.0, 0.0, 4.0, 0.5, 3) == {"mfu": 0.0, "mfu_step": 0.0}
    assert utilization.utilization(6.0, 2.0, 4.0, None, 3) == {}


def test_memory_is_the_peak_of_this_process() -> None:
    if PeakMemory("cpu").before is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    before = utilization.peak_memory(CPU)
    block = torch.ones(96 * 2**20, dtype=torch.uint8)
    del block
    assert utilization.peak_memory(CPU) - before == pytest.approx(96 / 1024, rel=0.2)


def test_settings() -> None:
    for wrong in ("a/b", "a:b", "x" * 129):
        with pytest.raises(ConfigError, match=r"training\.wandb=.*must be the name of a project"):
            load(None, [f"training.wandb='{wrong}'"])
    for wrong in ("-1", "inf"):
        with pytest.raises(ConfigError, match=r"training\.peak_tflops=.*must be at least 0"):
            load(None, [f"training.peak_tflops={wrong}"])
    config = load(None, ["training.wandb=my project", "training.peak_tflops=2.5"])
    kept = settings_of(config, "judge")["training"]
    assert isinstance(kept, dict) and not {"wandb", "peak_tflops"} & kept.keys(), "a checkpoint does not depend on them"


@pytest.mark.parametrize(
    ("algorithm", "without"),
    [("rloo", 2), ("grpo", 2), ("ppo", 2), ("reinforce", 1), ("raft", 1)],
)
def test_states_at_which_nothing_is_learned_are_counted(algorithm: str, without: int) -> None:
    """State 0: all right. 1: all wrong. 2: they differ. 3: no verdict. With reinforce an action that is right is learned from anyway."""
    states = torch.arange(4).repeat_interleave(3)
    rewards = torch.tensor([0.7, 0.7, 0.7, 0, 0, 0, 1, 0, 0, 9, 9, 9])
    known = states < 3
    actions = Actions(rewards, known, states, torch.arange(12), torch.ones(12, dtype=torch.int64))
    sums, batch = StepSums(states=3, drawn=4), SimpleNamespace(sampled=[None] * 12, trained=None)
    sums.add_signal(batch, actions, advantages(actions, algorithm)[0])  # type: ignore[arg-type]
    assert sums.without_signal == without and sums.drawn_without_signal == without + 1
    batch.trained, sums.states = (states > 0).tolist(), 2
    sums.add_signal(batch, actions, advantages(actions, algorithm)[0])  # type: ignore[arg-type]
    assert sums.without_signal == 1 and sums.drawn_without_signal == without + 1, (
        "only the first of 1 and 2 was replaced"
    )
