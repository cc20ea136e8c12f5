import json
import re
import sys
from pathlib import Path

import pytest
from support.paths import DATA
from support.task_files import RIGHT, check_examples, texts, write_hub_folder, write_lines

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.formats.tags import parse
from swirl_fast.tasks import load_task
from swirl_fast.tasks.gsm8k import WORD_PROBLEMS
from swirl_fast.tasks.scoring import ZERO, number, score_number
from swirl_fast.tasks.task import Question
from swirl_fast.tools.calculator import Calculator
from swirl_fast.tools.numerals import numbers
from swirl_fast.tools.tool import CALCULATOR


def gym(dataset: str = "chain_sum", seed: int = 0, limit: int = 40, eval_limit: int = 20, **options):
    return load_task(TasksConfig(dataset=dataset, limit=limit, eval_limit=eval_limit, options=options), seed)


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
        check_examples(task.examples, CALCULATOR, calculator)


def test_examples_of_arithmetic_compute_everything_at_once() -> None:
    task = gym(min_terms=3, max_terms=4)
    with Calculator() as calculator:
        check_examples(task.examples, CALCULATOR, calculator)
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
        ("chain_sum", {"terms": 2}, "tasks.options.terms=2: .* accepts min_terms, max_terms, .*allow_negation; "),
        (
            "gsm_symbolic",
            {"min_terms": 3},
            "gsm_symbolic has no such option; .*; tasks.options={} drops those of another",
        ),
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
        (
            '{"question": "a", "answer": "#### 5x"}',
            r":3: field 'answer' = '#### 5x': must end in `#### N` with one number N",
        ),
        ('{"question": "a", "answer": "#### 3-5"}', r":3: field 'answer' = '#### 3-5': must end in"),
        ("[" * 100_000, r":3: not a JSON object"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(problem) for problem in problems(30)]
    path.write_text("\n".join([*lines[:2], row, *lines[2:]]))
    with pytest.raises(ValueError, match=re.escape(str(path)) + message):
        gsm8k(str(path))


def score(question: Question, answer: str) -> float:
    return score_number(answer, question.answers).exact_match


def test_gold_answers_are_read_with_all_that_belongs_to_them(tmp_path: Path) -> None:
    rows = [{"question": f"{gold}?", "answer": f"#### {gold}"} for gold in ("5k", "1.5 million", "minus 5", "10_000")]
    questions = gsm8k(write_lines(tmp_path / "a.jsonl", rows), str(tmp_path / "a.jsonl")).questions("eval")
    for question, value in zip(questions, ("5000", "1,500,000", "-5", "10000"), strict=True):
        assert score(question, value) == 1 and score(question, question.answers[0]) == 1
        assert score(question, value.strip("-").rstrip("0,") or "0") == 0


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tasks.path: give a data file"):
        gsm8k(None)
    with pytest.raises(ConfigError, match="tasks.path=missing.jsonl: no such file"):
        gsm8k("missing.jsonl")
    with pytest.raises(ConfigError, match="tasks.eval_path=./missing: no such file"):
        gsm8k(write_lines(tmp_path / "a.jsonl", problems(3)), "./missing")
    with pytest.raises(ConfigError, match="has no rows"):
        gsm8k(write_lines(tmp_path / "empty.jsonl", []))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": problems(3), "test": problems(2)}))
    with pytest.raises(ConfigError, match="splits.json: its lists are called train, test; give the rows as a list"):
        gsm8k(str(splits))
    with pytest.raises(ConfigError, match="1 rows cannot be split"):
        gsm8k(write_lines(tmp_path / "one.jsonl", problems(1)))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(ValueError, match="latin.jsonl: not UTF-8 at byte 14"):
        gsm8k(str(tmp_path / "latin.jsonl"))
    with pytest.raises(
        ConfigError,
        match="tasks.kind=squad: must be one of reasoning_gym, two_step, qa, gsm8k, svamp, hotpotqa, musique",
    ):
        load_task(TasksConfig(kind="squad"), 0)


def test_word_problems_are_worked_correctly() -> None:
    with Calculator() as calculator:
        check_examples(WORD_PROBLEMS, CALCULATOR, calculator)
    for example in WORD_PROBLEMS:
        answer = parse(example.actions[-1], [CALCULATOR]).argument
        assert numbers(example.observations[-1])[-1] == number(answer)


# Hugging Face


def test_a_missing_datasets_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="tasks.path=openai/gsm8k: no such file; .*pip install datasets"):
        gsm8k("openai/gsm8k")


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
