"""GRPO runs of TRL on tiny random models, with its own head or with ours: imported, or in the processes of one group.

    python -m torch.distributed.run --nproc-per-node N tests/support/trl_runs.py FOLDER FAMILY …

Every rank prints a line of JSON a family: the numbers of TRL's own run, and of ours.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from support.small_models import SHAPE, train_tokenizer
from trl import GRPOConfig, GRPOTrainer

from swirl_kernels.integrations.trl import use_linear_logprob

PLAIN = {k: v for k, v in SHAPE.items() if k != "head_dim"}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Phi": PLAIN,
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 0.2},
}


@functools.cache
def _tokenizer() -> Any:
    return train_tokenizer(["what is two and two", "say a word"])


def trainer(
    family: str, folder: Path, ours: bool, *, model: dict[str, Any] | None = None, **settings: Any
) -> GRPOTrainer:
    """Two updates a batch and a KL term, so that ratios and gradients are not those of the first step alone."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{**SHAPE, **FAMILIES[family], **(model or {}), "vocab_size": len(tokenizer)}
    )
    policy = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in policy.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    policy.save_pretrained(folder / "model")  # the reference model is read from there
    defaults: dict[str, Any] = dict(
        output_dir=str(folder / "run"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        max_steps=2, num_iterations=2, num_generations=4, per_device_train_batch_size=4, max_completion_length=6, beta=0.1,
        learning_rate=1e-3, temperature=0.7, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    made = GRPOTrainer(
        model=str(folder / "model"),
        args=GRPOConfig(**(defaults | settings)),
        train_dataset=Dataset.from_list([{"prompt": "what is two"}, {"prompt": "say a word"}] * 4),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
    )
    if ours:
        use_linear_logprob(made)
    return made


def numbers(run: GRPOTrainer) -> list[tuple[float, float, float]]:
    """loss, gradient norm, KL of every step."""
    run.train()
    return [(x["loss"], x["grad_norm"], x["kl"]) for x in run.state.log_history if "grad_norm" in x]


if __name__ == "__main__":
    gc.freeze()  # every training collects garbage
    rank = os.environ["RANK"]
    for family in sys.argv[2:]:
        runs = [numbers(trainer(family, Path(sys.argv[1]) / f"{family}-{ours}-{rank}", ours)) for ours in (False, True)]
        print(json.dumps(runs))
    assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"])
    torch.distributed.destroy_process_group()
