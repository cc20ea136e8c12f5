"""TRL's own trainer with linear_logprob as its head, against TRL's own run."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from support.forks import ranks_of, run_all  # noqa: E402
from support.paths import SUPPORT  # noqa: E402
from support.runs import environment, free_port  # noqa: E402
from support.small_models import SHAPE  # noqa: E402
from support.trl_runs import FAMILIES, numbers, trainer  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM, Trainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from swirl_kernels.integrations.trl import add_linear_logprob_head, use_linear_logprob  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """Every training collects garbage, which among all that was imported takes longer than the training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def plain_memory() -> None:
    torch.use_deterministic_algorithms(False)  # the poisoned memory is for our kernels


EXACT_HEAD = {"bf16": True, "cast_lm_head_to_fp32": True}
# Plain steps: Adam's first one is of full size wherever a gradient is nothing but rounding.
ROUNDED_HEAD = {"bf16": True, "optim": "sgd", "learning_rate": 0.1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, settings", [
    *((family, {}) for family in FAMILIES),
    *((family, EXACT_HEAD) for family in FAMILIES),
    *((family, ROUNDED_HEAD) for family in FAMILIES),
])  # fmt: skip
def test_a_run_equals_trls_own(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """With the head inside the autocast TRL rounds every logit to 8 bits, ours all but the target's: equal to that rounding."""
    model = {"tie_word_embeddings": False} if "cast_lm_head_to_fp32" in settings else {}
    runs = [numbers(trainer(family, tmp_path / str(ours), ours, model=model, **settings)) for ours in (False, True)]
    assert abs(runs[0][1][0]) > 1e-3 and runs[0][1][2] > 1e-5  # the second step has a loss and a KL
    rel = 2**-7 if settings == ROUNDED_HEAD else 1e-4
    for theirs, ours in zip(*runs, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=rel, abs=rel / 10)
        assert ours[2] == pytest.approx(theirs[2], rel=2 * rel, abs=rel / 10)  # KL: a small difference of log-probs


def test_two_processes_equal_trls_own(tmp_path: Path) -> None:
    """Through DistributedDataParallel, every family."""
    script = [str(SUPPORT / "trl_runs.py"), str(tmp_path), *FAMILIES]
    done = run_all(script, ranks_of(2, environment(), free_port()), timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(lines) == 2 * len(FAMILIES)
    for theirs, ours in lines:
        assert [step[0] for step in ours] == pytest.approx([step[0] for step in theirs], rel=1e-4, abs=1e-5)
        assert [step[1] for step in ours] == pytest.approx([step[1] for step in theirs], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_batch_size_bounds_what_is_computed_at_once(tmp_path: Path) -> None:
    made = trainer("Cohere", tmp_path, True)
    rows = []
    made.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ids = torch.randint(3, 90, (5, 9))
    options = dict(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=4, compute_entropy=True)
    whole = made._get_per_token_logps_and_entropies(made.model, **options)
    parts = made._get_per_token_logps_and_entropies(made.model, **options, batch_size=2)
    assert rows == [5, 2, 2, 1]
    for a, b in zip(whole[:2], parts[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_another_trainer_is_refused() -> None:
    with pytest.raises(ValueError, match="Trainer is no GRPOTrainer or RLOOTrainer"):
        use_linear_logprob(Trainer.__new__(Trainer))


def test_shift_labels_items_and_the_experts_balance_are_those_of_trl() -> None:
    """The rest of the contract of TRL's head, on a mixture of experts, and on labels that score nothing."""
    outputs, gradients = [], []
    for add in (lambda m: add_fused_lm_head(m, 0.7, outputs=("log_probs", "entropy")), add_linear_logprob_head_at(0.7)):
        torch.manual_seed(0)
        config = MixtralConfig(**SHAPE, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
        model = MixtralForCausalLM(config)
        add(model)
        torch.manual_seed(1)
        ids = torch.randint(1, 97, (2, 8))
        labels = ids.masked_fill(torch.rand(2, 8) < 0.4, -100)
        calls: list[dict[str, Any]] = [
            {"labels": labels},
            {"labels": labels, "num_items_in_batch": 3, "attention_mask": (torch.arange(8) > 1).long().expand(2, 8)},
            {"shift_labels": labels},
            {"labels": torch.full_like(labels, -100)},
        ]
        outputs.append([model(input_ids=ids, fused_lm_head=True, **call) for call in calls])
        total = sum(out.loss + out.entropy.sum() for out in outputs[-1])
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
        assert model(input_ids=ids, labels=labels).logits.shape == (2, 8, 97)  # without the flag: its own forward
    for theirs, ours in zip(*outputs, strict=True):
        for name in ("loss", "log_probs", "entropy", "label_mask", "aux_loss"):
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def add_linear_logprob_head_at(temperature: float) -> Any:
    return lambda model: add_linear_logprob_head(model, temperature=temperature, entropy=True)
