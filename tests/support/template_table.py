"""The table of chat templates in docs/models.md: which are accepted, and how exact training is on trajectories that they write.

PYTHONPATH=.:kernels:tests python -m support.template_table    # rewrites the table in docs/models.md
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from support.chat_templates import END_TOKENS, native_templates, template_text, tokenizer_for
from support.paths import ROOT

from swirl_fast.comb.tree import Trunk, pack
from swirl_fast.config import TrainingConfig
from swirl_fast.engines.local.engine import LocalEngine
from swirl_fast.formats.tags import TAGS
from swirl_fast.models.policy import DeviceComb, Policy
from swirl_fast.rendering import Renderer
from swirl_fast.rendering.template import calling, result_of
from swirl_fast.rollouts.at_states import sample_actions
from swirl_fast.tools.tool import SEARCH
from swirl_fast.training.batch import to_trunks
from swirl_fast.trajectory import Finish, Step, Trajectory

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- chat templates: begin -->", "<!-- chat templates: end -->"


@dataclass(frozen=True)
class Row:
    """native: the syntax of calls, or why there is none. gap: largest |log-prob of the engine - of the trainer| of a sampled token.
    difference: largest difference of a gradient over the comb and over separate rows, relative to the largest gradient of its tensor."""

    name: str
    native: str
    thoughts: str
    gap: float
    difference: float


def renderer_of(name: str) -> Renderer:
    tokenizer = tokenizer_for(template_text(name))
    ends = next((tokens for family, tokens in END_TOKENS.items() if name.startswith(family)), ())
    return Renderer(tokenizer, name, [tokenizer.convert_tokens_to_ids(token) for token in ends])


def row_of(name: str) -> Row:
    """Raises ValueError for a template that is refused."""
    renderer = renderer_of(name)
    form, native = TAGS, ""
    try:
        form = renderer.native_format("tag")
        native = form.syntax.name + ("" if form.parallel else ", one call a turn")  # type: ignore[attr-defined]
    except ValueError as error:
        reason = str(error).split(f"the chat template of {name} ")[1].split(";")[0]
        native = f"no: it {reason}"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(renderer.tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=4096,
            initializer_range=0.3,
            pad_token_id=0,
        )  # fmt: skip
    ).eval()
    trajectory = _trajectory(renderer, form.native)
    training = TrainingConfig(group_size=3, max_action_tokens=6)
    engine = LocalEngine(copy.deepcopy(model), max_sequences=16, cache_tokens=8192)
    tools = {"t": [SEARCH]}
    sampled = sample_actions([trajectory], engine, renderer, tools, training, [1], form=form)
    trunks = to_trunks([trajectory], sampled, [True] * len(sampled))
    policy = Policy(model)
    comb = pack(trunks)
    logp_N = policy(DeviceComb.of(comb))
    rolled = np.concatenate([np.asarray(sampled[n].completion.logprobs) for n in comb.indices_A])
    gap = float((logp_N.detach() - torch.from_numpy(rolled)).abs().max())
    shared = _gradients(policy, [trunks])
    apart = _gradients(
        policy, [[Trunk(trunk.tokens[: state.length], (state,))] for trunk in trunks for state in trunk.states]
    )
    difference = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(shared, apart, strict=True)
    )
    opening = renderer.tokenizer.decode(renderer.prompt([{"role": "user", "content": "Q"}]))
    thoughts = "opened by the template" if opening.rstrip().endswith("<think>") else "kept"
    return Row(name, native, thoughts if "think" in template_text(name) else "-", gap, difference)


def _trajectory(renderer: Renderer, native: bool) -> Trajectory:
    """Two calls and an answer, as the template writes them."""
    prompt = renderer.prompt([{"role": "user", "content": "who wrote it?"}], [SEARCH] if native else ())
    trajectory = Trajectory("q/0", "q", "t", "who wrote it?", 0, len(prompt), np.asarray(prompt, np.int32))
    for i in range(3):
        turn = {"role": "assistant", "content": f"<search_query>name {i}</search_query>"}
        following = [{"role": "user", "content": f"name {i} -> found {i}"}]
        if native and i < 2:
            turn = calling([("search", {"query": f"name {i}"})])
            following = [result_of(0, "search", f"found {i}")]
        ids = renderer.written(turn)
        start = len(trajectory.tokens)
        trajectory.extend(ids)
        text = renderer.text(ids)
        trajectory.steps.append(Step(start, start + len(ids), text, TAGS.parse(text, [SEARCH]), [0.0] * len(ids), 0))
        if i < 2:
            trajectory.extend(renderer.following(turn, following, ids[-1]))
    trajectory.finish = Finish.STEP_LIMIT
    return trajectory


def _gradients(policy: Policy, rows: list[list[Trunk]]) -> list[torch.Tensor]:
    """Of the sum of all log-probs, each comb or row computed by itself."""
    policy.zero_grad()
    for trunks in rows:
        policy(DeviceComb.of(pack(trunks))).sum().backward()
    return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


def table() -> str:
    lines = [
        "| chat template | actions.format=native | thoughts | engine-trainer gap | comb-rows gradient difference |",
        "|---|---|---|---|---|",
    ]
    for name in native_templates():
        try:
            row = row_of(name)
            lines.append(f"| {name} | {row.native} | {row.thoughts} | {row.gap:.0e} | {row.difference:.0e} |")
        except ValueError as error:
            lines.append(f"| {name} | refused: {str(error).split(';')[0]} | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}", encoding="utf-8")
