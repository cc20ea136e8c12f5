"""A user's own Python and data in a folder of its own, and a small model that has been taught to call the tool in it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from support.paths import ROOT
from support.small_models import SHAPE, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

HERMES = ROOT / "configs" / "chat_templates" / "hermes.jinja"
MINE = '''
from typing import Literal


def convert(n: float, to: Literal["m", "ft"]) -> float:
    """Turns feet into metres, and metres into feet.

    Args:
        n: the length
        to: the unit that is wanted
    """
    return n * 3 if to == "ft" else n / 3


def reward(step):
    if step.action.kind == "answer":
        return 1.0 if any(seen.endswith(f" {step.action.argument}") for _, seen in step.history) else 0.0
    return 1.0 if f"{step.action.arguments['n']:g} " in step.question else 0.3


def strict(step):
    return step.action.kind == "tool"


class Counting:
    """Its results depend on what one question's calls did before."""

    name = "convert"
    description = "Converts, and counts."
    parameters = {"type": "object", "properties": {"n": {"type": "number"}, "to": {"enum": ["m", "ft"]}},
                  "required": ["n", "to"]}

    def begin(self, question):
        self.calls, self.question = 0, question

    def call(self, n, to):
        self.calls += 1
        return f"call {self.calls} for {self.question.fields['q']}"

    def end(self):
        del self.calls


class Broken(Counting):
    def begin(self, question):
        pass

    def call(self, n, to):
        raise KeyError("no such unit")

    def end(self):
        pass
'''

YAML = """\
run: {{name: r}}
model.path: {model}
tasks:
  kind: qa
  path: data.jsonl
  fields: {{question: q, answer: a}}
  tools: [mine.py:convert]
  limit: 6
  eval_limit: 4
  max_steps: 3
judge.kind: mine.py:reward
collect: {{trajectories_per_question: 3, max_action_tokens: 32, temperature: 0.5, batch: 8}}
filter.kind: none
training:
  steps: 2
  trajectories_per_step: 4
  group_size: 4
  max_action_tokens: 32
  temperature: 0.7
  learning_rate: 1e-3
  checkpoint_every: 1
  token_budget: 2048
"""


def rows(count: int) -> list[dict[str, str]]:
    return [{"q": f"What is {3 * i} ft in m?", "a": f"{i:.1f}"} for i in range(1, count + 1)]


def own_folder(folder: Path, model: Path) -> Path:
    """mine.py, data.jsonl and mine.yaml. Returns the last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(40)), encoding="utf-8")
    assert len(YAML.splitlines()) <= 25
    (folder / "mine.yaml").write_text(YAML.format(model=model), encoding="utf-8")
    return folder / "mine.yaml"


def teach_calls(folder: Path, native: bool = False) -> Path:
    """A small model, taught for some seconds to call `convert`, once or natively also twice in a turn; some of its calls and answers are
    wrong. Returns its folder."""
    from swirl_fast.formats.tags import TAGS
    from swirl_fast.rendering import Renderer, conversation
    from swirl_fast.rendering.template import calling, result_of
    from swirl_fast.tools import describe_tools

    yaml = own_folder(folder / "mine", folder)
    tools = describe_tools([f"{yaml.parent}/mine.py:convert"])
    torch.manual_seed(0)
    draw = random.Random(0)
    calls = [f'<convert>{{"n": {i}, "to": "m"}}</convert> <answer>{i}</answer>' for i in range(100)]
    prompts = [m["content"] for row in rows(3) for m in conversation(row["q"], tools, 3, ())]
    tokenizer = train_tokenizer([*calls, *prompts, *[HERMES.read_text(), json.dumps(tools[0].schema)] * native])
    if native:
        tokenizer.chat_template = HERMES.read_text(encoding="utf-8")
    renderer = Renderer(tokenizer)
    form = renderer.native_format("tag") if native else TAGS
    messages = [conversation(row["q"], tools, 3, (), form=form) for row in rows(40)]
    taught = []
    for row, one in zip(rows(40), messages, strict=True):
        value = row["q"].split()[2]
        made = [
            {"n": int(draw.choice([value, value, "3"])), "to": "m"} for _ in range(draw.choice([1, 2]) if native else 1)
        ]
        turn = calling([("convert", arguments) for arguments in made])
        following = [result_of(i, "convert", row["a"]) for i in range(len(made))]
        if not native:
            call = json.dumps(made[0])
            turn = {"role": "assistant", "content": f"<convert>{call}</convert>"}
            following = [{"role": "user", "content": f"{call} -> {row['a']}"}]
        written = renderer.written(turn)
        step = [(written, True), (renderer.following(turn, following, written[-1]), False)]
        answer = f"<answer>{draw.choice([row['a'], row['a'], '7'])}</answer>"
        last = (renderer.written({"role": "assistant", "content": answer}), True)
        parts = [(renderer.prompt(one, tools if native else ()), False), *step * draw.choice([1, 2]), last]
        tokens = [token for part, _ in parts for token in part]
        taught.append((tokens, [t if own else -100 for part, own in parts for t in part]))
    shape = {
        **SHAPE,
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 1024,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(180 if native else 100):
        batch = [[torch.tensor(one) for one in pair] for pair in draw.sample(taught, 6)]
        tokens = torch.nn.utils.rnn.pad_sequence([one for one, _ in batch], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence([one for _, one in batch], batch_first=True, padding_value=-100)
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"
