"""The examples of kernels/README.md run, and what they compute is right."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paths import ROOT
from support.small_models import SHAPE, train_tokenizer

HEADINGS = (
    "Tree attention",
    "Linear log-probabilities",
    "The output head of a model",
    "In a TRL trainer",
    "In verl",
    "In OpenRLHF",
)
HEADINGS += ("In a loop of your own",)


def example(heading: str) -> dict[str, Any]:
    """Runs the section's Python and returns its names."""
    section = (
        (ROOT / "kernels" / "README.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    )
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, f"kernels/README.md: {heading}", "exec"), names)
    return names


def test_every_example_is_tested() -> None:
    assert (ROOT / "kernels" / "README.md").read_text(encoding="utf-8").count("```python") == len(HEADINGS)


def test_tree_attention_example() -> None:
    names = example("Tree attention")
    # the second answer reads the prompt and itself alone
    alone = [0, 1, 2, 5, 6]
    q, k, v = (names[x].detach()[:, alone] for x in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(names["out"].detach()[:, alone], expected, rtol=1e-5, atol=1e-5)
    assert all(names[x].grad.isfinite().all() for x in "qkv")


def test_linear_logprob_example() -> None:
    names = example("Linear log-probabilities")
    logits = (names["hidden"].detach() @ names["weight"].detach().T) / 0.8
    expected = logits.log_softmax(-1).gather(1, names["targets"][:, None])[:, 0]
    torch.testing.assert_close(names["logp"].detach(), expected, rtol=1e-5, atol=1e-4)
    assert names["hidden"].grad.norm() > 0 and names["weight"].grad.norm() > 0


@pytest.mark.filterwarnings("ignore")
def test_output_head_example() -> None:
    pytest.importorskip("transformers")
    names = example("The output head of a model")
    assert names["head"].softcap == 30.0
    with torch.no_grad():
        logits = names["model"](names["tokens"]).logits[:, :-1] / 0.8
    expected = logits.log_softmax(-1).gather(2, names["tokens"][:, 1:, None]).flatten()
    torch.testing.assert_close(names["logp"].detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_trl_example_trains_through_linear_logprob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it equals TRL's own run: test_integrations_trl.py."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig

    from swirl_kernels.integrations import trl as integration

    torch.use_deterministic_algorithms(False)  # the poisoned memory is for our kernels
    calls = []
    whole = integration.linear_logprob
    monkeypatch.setattr(integration, "linear_logprob", lambda *a, **k: calls.append(len(a[2])) or whole(*a, **k))
    tokenizer = train_tokenizer(["what is two and two", "say a word"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer)}))
    before = model.lm_head.weight.detach().clone()
    settings = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, num_generations=2,
        per_device_train_batch_size=2, max_completion_length=6, temperature=0.7, save_strategy="no",
    )  # fmt: skip
    trainer = example("In a TRL trainer")["train"](
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "what is two"}, {"prompt": "say a word"}]),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
    )
    assert calls and not torch.equal(trainer.model.lm_head.weight.cpu(), before)


def test_verl_example() -> None:
    """Against verl's formula written out: PPO with the dual clip at 3, mean over the tokens of the whole batch, two ranks."""
    names = example("In verl")
    torch.manual_seed(0)
    old = -torch.rand(3, 5, dtype=torch.float64)
    new = (old + 0.4 * torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(3, 5, dtype=torch.float64) * 2
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    ratio = (new - old).exp()
    worst = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    each = torch.where(advantages < 0, torch.minimum(-advantages * 3.0, worst), worst)
    expected = (each * mask).sum() / 21 * 2
    numbers = {"dp_size": 2, "batch_num_tokens": 21, "global_batch_size": 6, "loss_scale_factor": None}
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info=numbers
    )
    loss, metrics = names["compute_policy_loss"](
        old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask, loss_agg_mode="token-mean", config=config,
        rollout_is_weights=None,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(loss, new), torch.autograd.grad(expected, new), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}


def test_openrlhf_example() -> None:
    policy_loss = example("In OpenRLHF")["policy_loss"]
    torch.manual_seed(0)
    old, mask = -torch.rand(3, 5), torch.ones(3, 5)
    rollout = old + torch.tensor([[0.0], [2.0], [0.1]])  # the second's mean ratio is e^-2
    new = old.clone().requires_grad_()
    loss, *_, filtered = policy_loss(new, old, torch.ones(3, 5), mask, rollout)
    (gradient,) = torch.autograd.grad(loss, new)
    assert filtered == pytest.approx(1 / 3) and (gradient[1] == 0).all() and (gradient[[0, 2]] < 0).all()


def test_own_loop_example(capsys: pytest.CaptureFixture[str]) -> None:
    names = example("In a loop of your own")
    assert names["logp"].grad.norm() > 0 and names["loss"].isfinite()
    assert names["metrics"].tokens == 12 and "effective_samples" in capsys.readouterr().out


def test_the_package_needs_torch_and_triton_alone() -> None:
    """Imported and run with everything else of this environment hidden (numpy is torch's own optional need)."""
    program = """
import importlib.machinery, sys
MISSING = {"transformers", "swirl_fast", "trl", "omegaconf", "datasets", "accelerate", "xxhash", "tqdm"}
class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.split(".")[0] in MISSING else super().find_spec(name, *rest)
sys.meta_path[:] = [f for f in sys.meta_path if "swirl_fast" not in repr(f) and f is not importlib.machinery.PathFinder] + [Installed]
try:
    import swirl_fast
    sys.exit("swirl_fast is not hidden")
except ModuleNotFoundError:
    pass
import torch, swirl_kernels, swirl_kernels.integrations.verl, swirl_kernels.integrations.openrlhf, swirl_kernels.integrations.trl
hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
swirl_kernels.linear_logprob(hidden, weight, torch.tensor([1, 2, 3, 4])).sum().backward()
assert hidden.grad.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT / "kernels")
