"""`swirl-fast dataset`: the rows against the store they are of, and as TRL's trainers take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import GOOD, HOSTILE, run_folder
from support.runs import attempt, overrides, start

from swirl_fast import open_run
from swirl_fast.config import ModelConfig
from swirl_fast.formats.tags import parse
from swirl_fast.models.load import load_tokenizer
from swirl_fast.outputs.text import clean
from swirl_fast.rendering import Renderer
from swirl_fast.stages import dataset as writing
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.verdict import Verdict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run of a real model up to its shards."""
    base = tmp_path_factory.mktemp("filtered")
    for stage in ("collect", "judge", "filter"):
        start([stage, *overrides(base, tiny_model, "filter.kind=process", "filter.when_empty=none")])
    return base / "r"


def rows(folder: Path, out: Path, kind: str, *more: str) -> list[dict[str, Any]]:
    done = attempt(["dataset", str(folder), "--as", kind, "--out", str(out), *more])
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["README.md", f"{kind}.jsonl"]
    return [json.loads(line) for line in (out / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]


def loaded(out: Path) -> Any:
    """As a user loads it, with the card's own settings."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets.load_dataset(str(out), split="train", cache_dir=str(out.parent / "cache"))


# ---- messages


def test_conversations_are_what_the_model_saw_to_the_token(filtered: Path, tmp_path: Path) -> None:
    found = rows(filtered, tmp_path / "out", "messages")
    with open_run(filtered) as run:
        renderer = Renderer(load_tokenizer(run.config.model))
        recorded = {one.trajectory.id: one.trajectory for one in run.trajectories()}
    assert {row["trajectory"] for row in found} == recorded.keys()
    for row in found:
        one, messages = recorded[row["trajectory"]], row["messages"]
        assert messages[0]["role"] == "system" and [m["role"] for m in messages[1::2]] == ["user"] * (
            len(messages) // 2
        )
        prompt = messages[: len(messages) - 2 * one.num_steps + 1]
        assert renderer.prompt(prompt) == one.tokens[: one.prompt_length].tolist()
        assert [m["content"] for m in messages[len(prompt) :: 2]] == [step.text for step in one.steps]
        for i in range(one.num_steps):
            ended = [renderer.stop_id] if one.tokens[one.steps[i].end - 1] != renderer.stop_id else []
            if not ended:  # a turn that was cut off has no end in the tokens
                assert renderer.prompt(messages[: len(prompt) + 2 * i])[-8:] == one.state(i)[-8:].tolist()


def test_only_those_that_the_filter_kept(filtered: Path, tmp_path: Path) -> None:
    kept = rows(filtered, tmp_path / "kept", "messages", "--kept", "--from-question")
    number = json.loads((filtered / "filter.json").read_text(encoding="utf-8"))["kept"]
    everything = rows(filtered, tmp_path / "all", "messages", "--all", "--from-question")
    assert len(kept) == number <= len(everything) == 18
    assert all(row in everything for row in kept) and everything[0]["messages"][0]["role"] == "user"
    assert f"- rows: {number}\n" in (tmp_path / "kept" / "README.md").read_text(encoding="utf-8")


def test_trl_trains_on_the_conversations(filtered: Path, tmp_path: Path, tiny_model: Path) -> None:
    trl = pytest.importorskip("trl")
    rows(filtered, tmp_path / "out", "messages")
    config = trl.SFTConfig(str(tmp_path / "sft"), report_to=[], use_cpu=True, max_steps=1)
    trainer = trl.SFTTrainer(str(tiny_model), config, train_dataset=loaded(tmp_path / "out"))
    assert len(trainer.train_dataset) == 18 and len(trainer.train_dataset[0]["input_ids"]) > 20


# ---- stepwise supervision


@pytest.mark.parametrize("kind", ["steps", "prm"])
def test_steps_have_their_verdicts_and_unknown_ones_none(folder: Path, tmp_path: Path, kind: str) -> None:
    found = rows(folder, tmp_path / "out", kind)
    with open_run(folder) as run:
        readings = [one for one in run.trajectories() if one.trajectory.finish]
    labels = {
        (row["trajectory"], row["first_step"] + i): label for row in found for i, label in enumerate(row["labels"])
    }
    texts = {
        (row["trajectory"], row["first_step"] + i): text for row in found for i, text in enumerate(row["completions"])
    }
    for one in readings:
        for i, (step, judgement) in enumerate(zip(one.trajectory.steps, one.judgements, strict=True)):
            key = (one.trajectory.id, i)
            if judgement is None or judgement.verdict is Verdict.UNKNOWN:
                assert key not in labels
                continue
            assert labels.pop(key) == (judgement.reward if kind == "prm" else judgement.verdict is GOOD.verdict)
            before = one.trajectory.steps[i - 1].observation if i else None
            clean = step.text.replace("\ud83d", "\ufffd")
            assert texts[key] == (clean if before is None else f"{before}\n{clean}")
    assert not labels
    whole = {}  # prompt and completions of every row continue what the rows before have
    for row in found:
        assert (
            row["prompt"].startswith(whole.get(row["trajectory"], f"{row['prompt'].splitlines()[0]}\n"))
            and row["completions"]
        )
        whole[row["trajectory"]] = row["prompt"] + "".join(f"{text}\n" for text in row["completions"])
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "- left out: 1 unfinished trajectories; 3 steps without a verdict" in readme
    assert HOSTILE.replace("\ud83d", "\ufffd") in "".join(row["completions"][-1] for row in found)


def test_a_label_lies_at_the_end_of_its_action(folder: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Tokenized as trainers of process reward models do: a separator after each completion, and the label on its last token."""
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model)))
    for row in rows(folder, tmp_path / "out", "steps"):
        tokens = tokenizer.encode(row["prompt"], add_special_tokens=False)
        read = []  # what the model has read where it is asked for a label
        for completion in row["completions"]:
            tokens += tokenizer.encode(f"{completion}\n", add_special_tokens=False)
            read.append(tokenizer.decode(tokens))
        with open_run(folder) as run:
            ((one, judgements),) = (
                (each.trajectory, each.judgements) for each in run.trajectories(ids=[row["trajectory"]])
            )
        for i, (text, label) in enumerate(zip(read, row["labels"], strict=True), row["first_step"]):
            later = [step.observation for step in one.steps[i:] if step.observation]
            assert text.startswith(f"{one.question}\n") and text.endswith(clean(f"{one.steps[i].text}\n"))
            assert not any(result in text for result in later) and label == (judgements[i] == GOOD)


def test_trl_takes_the_steps(folder: Path, tmp_path: Path, tiny_model: Path) -> None:
    rows(folder, tmp_path / "out", "steps")
    data = loaded(tmp_path / "out")
    datasets = pytest.importorskip("datasets")
    assert data.features["labels"] == datasets.List(datasets.Value("bool"))
    assert data.features["completions"] == datasets.List(datasets.Value("string"))
    prm = pytest.importorskip("trl.experimental.prm", reason="this TRL has no PRMTrainer")
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    model = AutoModelForTokenClassification.from_pretrained(tiny_model, num_labels=2)
    config = prm.PRMConfig(str(tmp_path / "prm"), report_to=[], use_cpu=True)
    trainer = prm.PRMTrainer(
        model, config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(tiny_model)
    )
    assert len(trainer.train_dataset) == len(data)


# ---- pairs


def pairs(found: Sequence[dict[str, Any]], source: str) -> set[tuple[str, str]]:
    return {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found if row["source"] == source}


def test_pairs_are_good_and_bad_actions_of_one_state(folder: Path, tmp_path: Path) -> None:
    found = rows(folder, tmp_path / "out", "pairs")
    recorded = [row for row in found if row["source"] == "recorded"]
    assert pairs(found, "recorded") == {("<math_exp>1 + 1</math_exp>", "<math_exp>2 + 2</math_exp>")}
    assert len(recorded) == 3 and {row["state"] for row in recorded} == {0}
    (sampled,) = [row for row in found if row["source"] == "training"]  # two are GOOD, one is BAD, one UNKNOWN
    assert (
        parse(sampled["chosen"][0]["content"], [CALCULATOR]).kind == "answer"
        and "no " in sampled["rejected"][0]["content"]
    )
    assert (sampled["training_step"], sampled["state"], sampled["chosen_reward"], sampled["rejected_reward"]) == (
        2,
        1,
        1.0,
        0.0,
    )
    assert [m["content"] for m in sampled["prompt"]][-2:] == ["<math_exp>1 + 1</math_exp>", "call 0 -> 0.0"]
    assert found[0]["prompt"][0]["role"] == "system"
    bare = rows(folder, tmp_path / "bare", "pairs", "--from-question")
    assert [len(row["prompt"]) for row in bare] == [3, 1, 1, 1]


def test_fresh_trajectories_share_their_first_state_only(tmp_path: Path) -> None:
    from support.run_folders import write_samples

    folder = run_folder(tmp_path, "algorithm.reward=outcome")
    with open_run(folder) as run:
        question = run.questions()[1]
    write_samples(folder, 3, question, state=0)
    path = folder / "samples" / "step_000003.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace(f"{question.id}/0", f"{question.id}/fresh"), encoding="utf-8"
    )
    found = rows(folder, tmp_path / "out", "pairs", "--from-question")
    (one,) = [row for row in found if row["source"] == "training"]
    assert one["prompt"] == [{"role": "user", "content": question.text}] and one["training_step"] == 3
    assert "4 sampled actions at states that" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_trl_takes_the_pairs(folder: Path, tmp_path: Path, tiny_model: Path) -> None:
    trl = pytest.importorskip("trl")
    found = rows(folder, tmp_path / "out", "pairs")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = trl.DPOConfig(str(tmp_path / "dpo"), report_to=[], use_cpu=True, max_length=None)
    trainer = trl.DPOTrainer(
        str(tiny_model), None, config, train_dataset=loaded(tmp_path / "out"), processing_class=tokenizer
    )
    assert len(trainer.train_dataset) == len(found)
    for row, tokens in zip(found, trainer.train_dataset, strict=True):
        assert tokenizer.decode(tokens["prompt_ids"]) == tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(tokens["chosen_ids"]).startswith(row["chosen"][0]["content"])


# ---- everything of a trajectory, and the folder


def test_a_plain_row_has_everything(folder: Path, tmp_path: Path) -> None:
    found = {row["id"]: row for row in rows(folder, tmp_path / "out", "jsonl")}
    with open_run(folder) as run:
        for one in run.trajectories(ids=run.store().ids(finished=True)):
            row = found.pop(one.trajectory.id)
            assert row["tokens"] == one.trajectory.tokens.tolist() and row["answers"] == list(one.gold)
            assert (row["answer"], row["right"], row["finish"]) == (
                one.trajectory.answer,
                one.matches,
                one.trajectory.finish,
            )
            for step, judgement, made in zip(one.trajectory.steps, one.judgements, row["steps"], strict=True):
                assert (made["start"], made["end"], made["logprobs"]) == (step.start, step.end, step.logprobs)
                assert (made["kind"], made["tool"], made["argument"]) == (
                    step.action.kind,
                    step.action.tool,
                    step.action.argument,
                )
                assert judgement is not None
                assert (made["verdict"], made["reward"], made["reason"]) == (
                    judgement.verdict.value, judgement.reward, judgement.reason,
                )  # fmt: skip
    assert not found and loaded(tmp_path / "out").num_rows == 6


def test_a_folder_that_is_there_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows(folder, out, "jsonl")
    again = attempt(["dataset", str(folder), "--as", "steps", "--out", str(out)])
    assert again.returncode == 2 and "holds a data set already; add --replace" in again.stderr
    assert (out / "jsonl.jsonl").is_file()
    rows(folder, out, "steps", "--replace")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    other = attempt(["dataset", str(folder), "--as", "steps", "--out", str(tmp_path / "mine"), "--replace"])
    assert other.returncode == 2 and "this command did not write it" in other.stderr
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_a_failure_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(writing.__globals__["rows"], "whole_row", fails)
    done = attempt(["dataset", str(folder), "--as", "jsonl", "--out", str(tmp_path / "out")])
    assert done.returncode == 1 and "no space left" in done.stderr and list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    from support.collected import collected

    collected(tmp_path / "runs")
    folder, out = tmp_path / "runs" / "r", tmp_path / "out"
    for arguments, said in (
        (["steps"], "none of the steps of 4 trajectories has a verdict; run judge first"),
        (["pairs", "--from-question"], "no state has both a GOOD and a BAD action"),
        (["messages"], "config.yaml is not there: the first stage of a run writes it. --from-question leaves them out"),
        (["messages", "--kept", "--from-question"], "shards is not there; run filter first, or leave --kept out"),
    ):
        done = attempt(["dataset", str(folder), "--as", *arguments, "--out", str(out)])
        assert done.returncode == 1 and said in done.stderr and not out.exists()
    assert attempt(["dataset", str(tmp_path), "--as", "jsonl", "--out", str(out)]).returncode == 1  # no run
