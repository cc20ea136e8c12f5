import json
import os
import re
import sys
from pathlib import Path

import pytest

from swirl_fast.actions import parse
from swirl_fast.config import TASKS, ConfigError, TasksConfig
from swirl_fast.tasks import load_task
from swirl_fast.tasks.gsm8k import WORD_PROBLEMS
from swirl_fast.tasks.hotpotqa import EXAMPLE_PASSAGES
from swirl_fast.tasks.scoring import ZERO, number
from swirl_fast.tasks.task import Example, Score
from swirl_fast.tools.calculator import Calculator, numbers
from swirl_fast.tools.search import Search
from swirl_fast.tools.tool import Tool, observation

DATA = Path(os.environ.get("SWIRL_FAST_DATA", Path(__file__).parents[1] / "../shared/data"))
RIGHT = Score(1.0, 1.0, 1.0, 1.0)


def gym(dataset: str = "chain_sum", seed: int = 0, limit: int = 40, eval_limit: int = 20, **options):
    return load_task(TasksConfig(dataset=dataset, limit=limit, eval_limit=eval_limit, options=options), seed)


def texts(task, split) -> list[str]:
    return [question.text for question in task.questions(split)]


def check_examples(examples: tuple[Example, ...], tool: Tool) -> None:
    """Each is a conversation that could have happened: every call is well-formed and its observation is the tool's."""
    assert len(examples) >= 2
    assert len({example.question for example in examples}) == len(examples)
    for example in examples:
        actions = [parse(text, {tool.name}) for text in example.actions]
        assert [action.kind for action in actions] == ["tool"] * (len(actions) - 1) + ["answer"]
        assert len(example.observations) == len(actions) - 1
        for action, seen in zip(actions, example.observations, strict=False):
            assert seen == observation(action.argument, tool.call(action.argument))


# reasoning-gym


def test_chain_sum_is_what_the_generator_says() -> None:
    task = gym(min_terms=3, max_terms=4, min_digits=2, max_digits=3)
    assert (task.name, task.tools, task.passages()) == ("chain_sum", ("calculator",), ())
    assert (len(task.questions("train")), len(task.questions("eval"))) == (40, 20)
    for split in ("train", "eval"):
        for question in task.questions(split):
            assert question.text.startswith("State the final answer to the following arithmetic problem: ")
            terms = re.search(r"problem: (.*) =$", question.text)[1]
            assert len(numbers(terms)) in (3, 4)
            assert question.answers == (str(eval(terms)),)
            assert task.score(question, question.answers[0]) == RIGHT
            assert task.score(question, f"{question.answers[0]}.0") == RIGHT
            assert task.score(question, str(int(question.answers[0]) + 1)) == ZERO
            assert task.score(question, None) == task.score(question, "\ud800" * 10**5) == ZERO


def test_the_seed_decides() -> None:
    assert texts(gym(seed=1), "train") == texts(gym(seed=1), "train")
    assert texts(gym(seed=1), "train") != texts(gym(seed=2), "train")
    assert gym(seed=1).examples == gym(seed=2).examples  # the prompt stays the same
    # more questions are more of the same
    assert texts(gym(seed=1, limit=90), "train")[:40] == texts(gym(seed=1), "train")
    assert [q.id for q in gym(seed=1).questions("eval")] == [q.id for q in gym(seed=1, limit=90).questions("eval")]


def test_splits_are_disjoint_without_duplicates_even_across_seeds_in_a_small_space() -> None:
    # one digit, two terms: 200 questions in all
    tasks = [gym(seed=seed, limit=70, eval_limit=70, max_terms=2, max_digits=1) for seed in range(4)]
    for task in tasks:
        questions = [*task.questions("train"), *task.questions("eval")]
        assert len({question.text for question in questions}) == len({question.id for question in questions}) == 140
    train = {text for task in tasks for text in texts(task, "train")}
    held_out = {text for task in tasks for text in texts(task, "eval")}
    shown = {example.question for task in tasks for example in task.examples}
    assert not train & held_out and not train & shown and not held_out & shown


@pytest.mark.parametrize(
    "dataset",
    "basic_arithmetic decimal_arithmetic products gsm_symbolic leg_counting gcd simple_equations".split(),
)
def test_other_generators(dataset: str) -> None:
    task = gym(dataset, limit=30, eval_limit=30)
    for question in [*task.questions("train"), *task.questions("eval")]:
        assert task.score(question, question.answers[0]) == RIGHT
        assert task.score(question, str(number(question.answers[0]) + 17)) == ZERO
    with Calculator() as calculator:
        check_examples(task.examples, calculator)


def test_examples_of_arithmetic_compute_everything_at_once() -> None:
    task = gym(min_terms=3, max_terms=4)
    with Calculator() as calculator:
        check_examples(task.examples, calculator)
    for example in task.examples:
        (expression,) = re.findall(r"problem: (.*) =$", example.question)
        assert example.actions[0] == f"<math_exp>{expression}</math_exp>"
        assert example.actions[1] == f"<answer>{eval(expression)}</answer>"


def test_where_a_question_asks_for_rounding_its_own_scorer_decides() -> None:
    task = gym("power_function", limit=30)
    for question in task.questions("train"):
        assert "3 significant figures" in question.text
        exact = float(question.answers[0])
        assert task.score(question, f"{exact:.2e}") == RIGHT
        assert task.score(question, f"{exact * 1.1:.2e}") == ZERO
        for hostile in ("1e1999", "nan", "1e99999", "two", "-"):
            assert task.score(question, hostile) == ZERO


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("chain_sm", {}, "tasks.dataset=chain_sm: .* did you mean chain_sum"),
        ("!", {}, "tasks.dataset=!: .* no such dataset"),
        ("caesar_cipher", {}, "tasks.dataset=caesar_cipher: its answers are not all numbers"),
        ("base_conversion", {}, "tasks.dataset=base_conversion: its answers are not all numbers"),
        ("chain_sum", {"terms": 2}, "tasks.options.terms=2: .* accepts min_terms, max_terms, .*allow_negation$"),
        ("chain_sum", {"min_terms": 0}, "tasks.options=.*min_terms must be positive"),
        ("chain_sum", {"min_terms": "a"}, "tasks.options=.*refused by chain_sum"),
        ("chain_sum", {"max_digits": 2.5}, "tasks.options=.*2.5.*chain_sum"),
        ("chain_sum", {"seed": 3}, "tasks.options.seed=3: .*run.seed"),
        ("chain_sum", {"size": 3}, "tasks.options.size=3: .*tasks.limit"),
        (
            "chain_sum",
            {"max_terms": 2, "max_digits": 1, "min_terms": 2},
            "tasks.limit=400: chain_sum has only .* different",
        ),
    ],
)
def test_settings_that_cannot_work(dataset: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(TasksConfig(dataset=dataset, limit=400, eval_limit=20, options=options), 0)


def test_a_generator_has_no_end() -> None:
    with pytest.raises(ConfigError, match="tasks.limit=0"):
        gym(limit=0)
    with pytest.raises(ConfigError, match="tasks.eval_limit=0"):
        gym(eval_limit=0)


# GSM8K


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems(n: int, start: int = 0) -> list[dict]:
    return [
        {"question": f"What is {i} + 1000?", "answer": f"It is {i}+1000.\n#### {i + 1000:,}"}
        for i in range(start, start + n)
    ]


def gsm8k(path: str | None, eval_path: str | None = None, limit: int = 0, eval_limit: int = 0):
    return load_task(TasksConfig(kind="gsm8k", path=path, eval_path=eval_path, limit=limit, eval_limit=eval_limit), 0)


def test_gsm8k_holds_the_tail_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", problems(25))
    task = gsm8k(path)
    assert texts(task, "train") + texts(task, "eval") == [row["question"] for row in problems(25)]
    assert len(task.questions("eval")) == 2
    assert task.questions("train")[3].answers == ("1,003",)
    limited = gsm8k(path, limit=5, eval_limit=1)
    assert limited.questions("train") == task.questions("train")[:5]
    assert limited.questions("eval") == task.questions("eval")[:1]
    assert len(gsm8k(write_lines(tmp_path / "two.jsonl", problems(2))).questions("eval")) == 1
    assert (task.name, task.tools, task.passages()) == ("gsm8k", ("calculator",), ())
    question = task.questions("train")[3]
    assert task.score(question, "$1,003.00") == RIGHT
    assert task.score(question, "1004") == task.score(question, None) == ZERO


def test_gsm8k_evaluation_file(tmp_path: Path) -> None:
    train, test = (
        write_lines(tmp_path / "a.jsonl", problems(10)),
        write_lines(tmp_path / "b.jsonl", problems(4, start=8)),
    )
    task = gsm8k(train, test)
    assert texts(task, "eval") == [row["question"] for row in problems(4, start=8)]
    assert texts(task, "train") == [row["question"] for row in problems(8)]  # 8 and 9 are held out
    ids = [question.id for split in ("train", "eval") for question in task.questions(split)]
    assert len(set(ids)) == 12
    # an id depends on the question alone
    assert {q.id for q in gsm8k(test, train).questions("eval")} == set(ids[:8]) | {
        q.id for q in task.questions("eval")[:2]
    }


def test_gsm8k_drops_repeated_questions_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [json.dumps(row) for row in [*problems(9), *problems(3)]]
    path.write_text("\ufeff" + "\r\n\r\n".join(rows) + "\n\n", encoding="utf-8")
    task = gsm8k(str(path))
    assert len(texts(task, "train") + texts(task, "eval")) == 9
    assert texts(task, "eval") == ["What is 2 + 1000?"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r":3: not a JSON object"),
        ("[1]", r":3: must be a JSON object, not list"),
        ("3", r":3: must be a JSON object, not int"),
        ('{"answer": "#### 1"}', r":3: field 'question': is missing"),
        ('{"question": 5, "answer": "#### 1"}', r":3: field 'question' = 5: must be text"),
        ('{"question": " ", "answer": "#### 1"}', r":3: field 'question' = ' ': must be text"),
        ('{"question": "a"}', r":3: field 'answer': is missing"),
        ('{"question": "a", "answer": "12"}', r":3: field 'answer' = '12': must end in `#### N`"),
        ('{"question": "a", "answer": "#### many"}', r":3: field 'answer' = '#### many': must end in"),
        ("[" * 100_000, r":3: not a JSON object"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(problem) for problem in problems(30)]
    path.write_text("\n".join([*lines[:2], row, *lines[2:]]))
    with pytest.raises(ValueError, match=re.escape(str(path)) + message):
        gsm8k(str(path))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tasks.path: give a data file"):
        gsm8k(None)
    with pytest.raises(ConfigError, match="tasks.path=missing.jsonl: no such file"):
        gsm8k("missing.jsonl")
    with pytest.raises(ConfigError, match="tasks.eval_path=./missing: no such file"):
        gsm8k(write_lines(tmp_path / "a.jsonl", problems(3)), "./missing")
    with pytest.raises(ConfigError, match="has no rows"):
        gsm8k(write_lines(tmp_path / "empty.jsonl", []))
    with pytest.raises(ConfigError, match="1 rows cannot be split"):
        gsm8k(write_lines(tmp_path / "one.jsonl", problems(1)))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(ValueError, match="latin.jsonl: not UTF-8 at byte 14"):
        gsm8k(str(tmp_path / "latin.jsonl"))
    with pytest.raises(ConfigError, match="tasks.kind=cofca: must be one of reasoning_gym, gsm8k, hotpotqa"):
        load_task(TasksConfig(kind="cofca"), 0)


def test_every_kind_of_the_configuration_can_be_loaded(tmp_path: Path) -> None:
    gsm = write_lines(tmp_path / "gsm.jsonl", problems(3))
    hotpot = write_lines(tmp_path / "hotpot.jsonl", hops(3))
    for kind in TASKS:
        task = load_task(TasksConfig(kind=kind, path=hotpot if kind == "hotpotqa" else gsm), 0)
        assert task.questions("train") and task.questions("eval") and task.tools and len(task.examples) >= 2


def test_word_problems_are_worked_correctly() -> None:
    with Calculator() as calculator:
        check_examples(WORD_PROBLEMS, calculator)
    for example in WORD_PROBLEMS:
        answer = parse(example.actions[-1], {"calculator"}).argument
        assert numbers(example.observations[-1])[-1] == number(answer)


# HotPotQA


def hops(n: int, start: int = 0, **fields) -> list[dict]:
    return [
        {
            "_id": f"id{i}",
            "question": f"Who founded town {i}?",
            "answer": f"Founder {i}",
            "context": [
                [f"Town {i}", [f"Town {i} was founded.", " Its founder is Founder."]],
                ["Shared", ["In all rows."]],
            ],
            **fields,
        }
        for i in range(start, start + n)
    ]


def hotpotqa(path: Path | str, eval_path: Path | str | None = None, limit: int = 0, eval_limit: int = 0):
    eval_path = str(eval_path) if eval_path else None
    return load_task(
        TasksConfig(kind="hotpotqa", path=str(path), eval_path=eval_path, limit=limit, eval_limit=eval_limit), 0
    )


def write_list(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def test_hotpotqa(tmp_path: Path) -> None:
    rows = [*hops(6, level="easy"), *hops(6, 6, level="medium"), *hops(8, 12, level="hard")]
    train = write_list(tmp_path / "train.json", rows)
    dev = write_list(tmp_path / "dev.json", [*hops(1, 15), *hops(3, 100, level="easy")])
    task = hotpotqa(train, dev, limit=3, eval_limit=2)
    assert (task.name, task.tools) == ("hotpotqa", ("search",))
    assert [question.id for question in task.questions("train")] == ["id6", "id7", "id8"]  # easy ones are left out
    assert [question.id for question in task.questions("eval")] == ["id15", "id100"]  # but not of the held-out file
    assert "id15" not in [question.id for question in hotpotqa(train, dev).questions("train")]
    # the passages are those of every row of both files, once
    towns = [*range(20), *range(100, 103)]
    expected = [(f"Town {i}", f"Town {i} was founded. Its founder is Founder.") for i in towns]
    assert [passage for passage in task.passages() if passage[0] != "Shared"] == expected
    assert task.passages()[1] == ("Shared", "In all rows.") and len(task.passages()) == len(towns) + 1
    question = task.questions("train")[0]
    assert task.score(question, "the founder 6") == RIGHT
    assert task.score(question, "Founder").f1 == pytest.approx(2 / 3)
    assert task.score(question, None) == ZERO


def test_hotpotqa_holds_the_tail_out_before_it_drops_easy_rows(tmp_path: Path) -> None:
    task = hotpotqa(write_list(tmp_path / "train.json", [*hops(10, level="easy"), *hops(10, 10)]))
    assert [question.id for question in task.questions("train")] == [f"id{i}" for i in range(10, 18)]
    assert [question.id for question in task.questions("eval")] == ["id18", "id19"]
    with pytest.raises(ConfigError, match="all 9 training rows have the level 'easy'"):
        hotpotqa(write_list(tmp_path / "easy.json", hops(10, level="easy")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_id": None}, "field '_id' = None: must be text"),
        ({"_id": "id0"}, "field '_id' = 'id0': an earlier row has the same id"),
        ({"question": ""}, "field 'question' = ''"),
        ({"answer": 5}, "field 'answer' = 5: must be text"),
        ({"context": None}, "field 'context' = None: must be a list"),
        ({"context": []}, "field 'context' = .*: must be a list"),
        ({"context": [["a", ["b"]], ["Title", "text"]]}, r"field 'context' = .*: entry 1 must be \[title, \[sentence"),
        ({"context": [["Title", [3]]]}, "field 'context' = .*: entry 0 must be"),
        ({"context": {"title": ["a"], "sentences": []}}, "field 'context' = .*: must have equally many"),
    ],
)
def test_a_malformed_hotpotqa_row_is_named(tmp_path: Path, fields: dict, message: str) -> None:
    rows = hops(30)
    rows[4].update(fields)
    path = write_list(tmp_path / "train.json", rows)
    with pytest.raises(ValueError, match=re.escape(f"{path}, row 5 of 30: ") + message):
        hotpotqa(path)
    broken = tmp_path / "broken.json"
    broken.write_text('[\n{"_id": "x",\n]')
    with pytest.raises(ValueError, match=re.escape(f"{broken}:3: not valid JSON")):
        hotpotqa(broken)


def test_hotpotqa_examples_are_what_search_gives(tmp_path: Path) -> None:
    task = hotpotqa(write_list(tmp_path / "train.json", hops(3)))
    check_examples(task.examples, Search(EXAMPLE_PASSAGES, 1, 1200, tmp_path / "cache"))
    for example in task.examples:
        answer = parse(example.actions[-1], {"search"}).argument
        assert answer in ("yes", "no") or any(answer in seen for seen in example.observations)


# Hugging Face


def test_a_missing_datasets_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="tasks.path=openai/gsm8k: no such file; .*pip install datasets"):
        gsm8k("openai/gsm8k")


def write_hub_folder(folder: Path, configuration: str, **splits: list[dict]) -> None:
    folder.mkdir(parents=True)
    files = ""
    for split, rows in splits.items():
        write_lines(folder / f"{split}.jsonl", rows)
        files += f"  - split: {split}\n    path: {split}.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{files}---\n")


def test_hugging_face_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write_hub_folder(tmp_path / "someone/gsm8k", "main", train=problems(20), test=problems(3, 100))
    write_hub_folder(tmp_path / "someone/other", "socratic", train=problems(20), test=problems(3, 100))
    task = gsm8k("someone/gsm8k")
    assert (len(task.questions("train")), len(task.questions("eval"))) == (18, 2)
    assert texts(gsm8k("someone/gsm8k", "someone/gsm8k"), "eval") == [row["question"] for row in problems(3, 100)]
    assert len(gsm8k("someone/other:socratic").questions("train")) == 18
    with pytest.raises(ConfigError, match="tasks.path=someone/other: .*not loadable"):
        gsm8k("someone/other")
    rows = [
        {"id": row["_id"], "question": row["question"], "answer": row["answer"], "level": "hard",
         "context": {"title": [name for name, _ in row["context"]], "sentences": [text for _, text in row["context"]]}}
        for row in hops(10)
    ]  # fmt: skip
    write_hub_folder(tmp_path / "someone/hotpot_qa", "distractor", train=rows, validation=rows[:2])
    task = hotpotqa("someone/hotpot_qa", "someone/hotpot_qa")
    assert [question.id for question in task.questions("eval")] == ["id0", "id1"]
    assert [question.id for question in task.questions("train")] == [f"id{i}" for i in range(2, 10)]
    assert ("Town 3", "Town 3 was founded. Its founder is Founder.") in task.passages()


# the real files, where they are


def test_real_gsm8k() -> None:
    path = DATA / "gsm8k/train.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    task = gsm8k(str(path))
    assert (len(task.questions("train")), len(task.questions("eval"))) == (6726, 747)
    for split in ("train", "eval"):
        for question in task.questions(split):
            assert task.score(question, question.answers[0]) == RIGHT
    assert not {example.question for example in task.examples} & set(texts(task, "train") + texts(task, "eval"))


def test_real_hotpotqa() -> None:
    train, dev = DATA / "hotpotqa/train.json", DATA / "hotpotqa/dev.json"
    if not train.is_file() or not dev.is_file():
        pytest.skip(f"{train} is not here")
    rows = json.loads(train.read_text())
    task = hotpotqa(train, dev)
    assert len(task.questions("train")) == sum(row["level"] != "easy" for row in rows) < 100
    assert len(task.questions("eval")) == 100
    titles = {title for file in (train, dev) for row in json.loads(file.read_text()) for title, _ in row["context"]}
    assert {title for title, _ in task.passages()} == titles
    assert all(task.score(question, question.answers[0]) == RIGHT for question in task.questions("eval"))
