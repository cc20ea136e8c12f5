"""Questions of a user's own: every format of file, columns, answers, scores, a corpus, instructions, worked examples, several tasks."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import unicodedata
from pathlib import Path

import pytest
from support.task_files import RIGHT, texts, write_lines

from swirl_fast.config import Config, ConfigError, SearchConfig, TasksConfig
from swirl_fast.rendering import instructions
from swirl_fast.tasks import load_task, offered_tools, parts_of
from swirl_fast.tasks.corpus import corpus_hash, passages_of, read_corpus
from swirl_fast.tasks.rows import question_id
from swirl_fast.tools.characters import same_text
from swirl_fast.tools.search import load_search
from swirl_fast.tools.tool import CALCULATOR

ROWS = [{"question": f"Question {i}?", "answer": f"answer {i}"} for i in range(10)]


def load(path: str | Path, **settings):
    return load_task(TasksConfig(kind="qa", path=str(path), **{"limit": 0, "eval_limit": 0, **settings}), 0)


def table(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def packed(path: Path, ending: str = ".gz") -> Path:
    target = path.with_name(path.name + ending)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    target.write_bytes(pack(path.read_bytes()))
    return target


def test_every_format_gives_the_same_questions(tmp_path: Path) -> None:
    rows = [{"question": f'Line one\nand "two", {i}?', "answer": f"é, {i}"} for i in range(10)]
    files = [
        Path(write_lines(tmp_path / "same.jsonl", rows)),
        table(tmp_path / "same.csv", rows),
        table(tmp_path / "same.tsv", rows, "\t"),
    ]
    (tmp_path / "same.json").write_text(json.dumps(rows), encoding="utf-8")
    files.append(tmp_path / "same.json")
    (tmp_path / "europe").mkdir()
    files.append(table(tmp_path / "europe" / "same.csv", rows, ";"))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "same.parquet")
    files.append(tmp_path / "same.parquet")
    misnamed = tmp_path / "packed" / "same.jsonl"
    misnamed.parent.mkdir()
    misnamed.write_bytes(gzip.compress(files[0].read_bytes()))
    more = [misnamed, *(packed(files[0], ending) for ending in (".bz2", ".xz"))]
    for file in [*files, *map(packed, files), *more]:
        task = load(file)
        assert task.name == "same" and len(task.questions("train")) == 9 and len(task.questions("eval")) == 1
        questions = [*task.questions("train"), *task.questions("eval")]
        assert [(q.text, q.answers) for q in questions] == [(row["question"], (row["answer"],)) for row in rows]
        assert questions == [*load(files[0]).questions("train"), *load(files[0]).questions("eval")]


def test_columns_ids_and_the_rest_of_a_row(tmp_path: Path) -> None:
    rows = [{"q": f"{i}?", "a": [i, f"number {i}"], "key": i, "level": "easy"} for i in range(4)]
    path = write_lines(tmp_path / "My units.jsonl", rows)
    task = load(path, fields={"question": "q", "answer": "a", "id": "key"}, limit=2)
    first = task.questions("train")[0]
    assert (first.id, first.task, first.answers) == ("My_units-0", "My_units", ("0", "number 0"))
    assert first.fields["level"] == "easy" and len(task.questions("train")) == 2
    assert (
        load(path, fields={"question": "q", "answer": "a"}, name="units").questions("train")[0].id.startswith("units-")
    )


def test_a_question_is_asked_once_and_not_both_trained_and_held_out(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", [*ROWS[:4], {**ROWS[0], "level": "easy"}, *ROWS[6:8]])
    held_out = write_lines(tmp_path / "eval.jsonl", ROWS[6:])
    task = load(train, eval_path=held_out)
    assert texts(task, "train") == [row["question"] for row in ROWS[:4]] and task.questions("train")[0].answers == (
        "answer 0",
    )
    assert texts(task, "eval") == [row["question"] for row in ROWS[6:]]
    assert task.notes == [
        "1 rows of train ask what an earlier one asks, and are left out",
        "2 rows of train ask what is held out, and are left out",
    ]


BOARDS = [{"question": "Who wins?", "answer": who, "board": f"{i}{who}"} for i in range(5) for who in ("X", "O")]


@pytest.mark.parametrize("ids", [False, True])
def test_one_text_that_is_asked_of_several_things_is_several_questions(tmp_path: Path, ids: bool) -> None:
    """Which only other columns tell apart; tools and score functions see them."""
    rows = [{**row, "id": i} for i, row in enumerate(BOARDS)] if ids else BOARDS
    path = write_lines(tmp_path / "a.jsonl", [*rows[:3], {**rows[0], **({"id": 99} if ids else {})}, *rows[3:]])
    task = load(path, eval_path=write_lines(tmp_path / "b.jsonl", rows[8:]), name="games")
    train = task.questions("train")
    assert [question.fields["board"] for question in train] == [row["board"] for row in BOARDS[:8]]
    assert len({question.id for question in [*train, *task.questions("eval")]}) == 10 and not task.held_out
    assert [note.partition(" ")[0] for note in task.notes] == ["1", "2"]
    back = load(write_lines(tmp_path / "c.jsonl", rows[::-1]), eval_path=str(tmp_path / "b.jsonl"), name="games")
    by_board = {question.fields["board"]: question.id for question in back.questions("train")}
    assert all(by_board[question.fields["board"]] == question.id for question in train), "in every order"


def test_columns_that_tell_nothing_apart_make_no_second_question(tmp_path: Path) -> None:
    """Such as the number of a row: the same question would be trained on and held out."""
    rows = [{"question": f"{i % 4}?", "answer": i % 4, "row": i} for i in range(8)]
    task = load(write_lines(tmp_path / "a.jsonl", rows), eval_path=write_lines(tmp_path / "b.jsonl", rows[7:]))
    assert texts(task, "train") == ["0?", "1?", "2?"]
    (tmp_path / "mine.py").write_text("def score(question, answer): return 1.0", encoding="utf-8")
    own = load(tmp_path / "a.jsonl", score=f"{tmp_path}/mine.py:score", eval_path=str(tmp_path / "b.jsonl"))
    assert len(own.questions("train")) == 7, "a score function sees all columns"


@pytest.mark.parametrize("more", [{}, {"board": "5"}])
def test_another_answer_to_the_same_question_names_both_rows(tmp_path: Path, more: dict[str, str]) -> None:
    rows = [
        *ROWS,
        {"question": "Who wins?", "answer": ["X", "x"], **more},
        {"question": "Who  wins?", "answer": "O", **more},
    ]
    path = write_lines(tmp_path / "a.jsonl", [*rows, *ROWS[:2]])
    with pytest.raises(
        ValueError, match=f"a.jsonl:{len(ROWS) + 2}: field 'answer' = 'O': .*a.jsonl:{len(ROWS) + 1} asks the same"
    ):
        load(path, eval_path=write_lines(tmp_path / "b.jsonl", ROWS[:2]))


def test_one_question_in_two_spellings_of_unicode_is_not_both_trained_and_held_out(tmp_path: Path) -> None:
    rows = [{"question": text, "answer": "x"} for text in ("Who is Beyoncé?", "Where is  Zürich?", "New?")]
    spelled = [
        {"question": unicodedata.normalize("NFD", row["question"]).replace("  ", " "), "answer": "x"}
        for row in rows[:2]
    ]
    train = write_lines(tmp_path / "train.jsonl", [*rows, *spelled])
    task = load(train, eval_path=write_lines(tmp_path / "eval.jsonl", spelled))
    assert [question.text for question in task.questions("train")] == ["New?"]
    assert len(task.questions("eval")) == 2
    assert question_id("qa", rows[0]["question"]) == question_id("qa", spelled[0]["question"])
    assert question_id("qa", "Plain  text?") == f"qa-{hashlib.sha256(b'Plain  text?').hexdigest()[:16]}"


def test_half_a_character_is_replaced_where_it_is_read(tmp_path: Path) -> None:
    rows = [{"question": f"Hi \ud83d there {i}", "answer": "\udc00", "extra": ["\ud800"]} for i in range(2)]
    for path in (write_lines(tmp_path / "a.jsonl", rows), tmp_path / "b.json"):
        (tmp_path / "b.json").write_text(json.dumps(rows), encoding="utf-8")
        question = load(path).questions("train")[0]
        assert (question.text, question.answers, question.fields["extra"]) == (
            "Hi \ufffd there 0",
            ("\ufffd",),
            ["\ufffd"],
        )
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"title": "\ud83d", "text": "a \udc00"}])
    assert read_corpus(str(corpus)) == [("\ufffd", "a \ufffd")]
    example = {"question": "\ud83d?", "actions": ["<answer>\ud83d</answer>"], "observations": []}
    found = load(
        tmp_path / "a.jsonl",
        worked_examples=str(write_lines(tmp_path / "x.jsonl", [example])),
        instructions="Be \ud83d. {tools}",
    )
    assert found.examples[0].question == "\ufffd?" and found.instructions == "Be \ufffd. {tools}"


@pytest.mark.parametrize(
    ("score", "gold", "answer", "exact", "reward"),
    [
        ("auto", 12, "12.0", 1, 1),
        ("auto", "1,200", "$1200", 1, 1),
        ("auto", "Boeing 747", "747", 0, 0),
        ("auto", "the 3rd", "3", 0, 0),
        ("auto", ["Paris", "City of Light"], "city of light.", 1, 1),
        ("auto", "2.5 km", "25 km", 0, 0),
        ("auto", [5.0, "five"], "50", 0, 0),
        ("auto", [5.0, "five"], "5", 1, 1),
        ("auto", "A", "a", 1, 1),
        ("exact", "C++", "C", 0, 0),
        ("exact", -5, "5", 0, 0),
        ("f1", 1.5, "15", 0, 0),
        ("exact", "12", "12.0", 0, 0),
        ("number", "1/2", "0.5", 1, 1),
        ("number", "5k", "5", 0, 0),
        ("auto", "1.5 million", "1500000", 1, 1),
        ("auto", "1.5 million", "1.5", 0, 0),
        ("f1", "red green", "green", 0, 2 / 3),
    ],
)
def test_scores(tmp_path: Path, score: str, gold: object, answer: str, exact: float, reward: float) -> None:
    task = load(
        write_lines(tmp_path / "a.jsonl", [{"question": f"{i}", "answer": gold} for i in range(2)]), score=score
    )
    found = task.score(task.questions("train")[0], answer)
    assert (found.exact_match, found.reward) == (exact, pytest.approx(reward))
    assert task.score(task.questions("train")[0], None).reward == 0


def test_a_score_function_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def close(question, answer):\n    return 1 - abs(int(answer) - question.fields['goal']) / 10\n"
        "def wrong(question, answer):\n    return {'a': 2.0, 'b': 'high', 'c': float('nan')}[answer]\n"
        "def one(answer): pass\n",
        encoding="utf-8",
    )
    path = write_lines(tmp_path / "a.jsonl", [{"question": f"{i}", "goal": 7} for i in range(2)])
    task = load(path, score=f"{tmp_path}/mine.py:close")
    question = task.questions("train")[0]
    assert (
        question.answers == ()
        and task.score(question, "7") == RIGHT
        and task.score(question, "4").reward == pytest.approx(0.7)
    )
    with pytest.raises(ValueError, match=r"mine.py:close: for question a-\w+ and the answer 'x' it raised ValueError"):
        task.score(question, "x")
    task = load(path, score=f"{tmp_path}/mine.py:wrong")
    for answer, shown in (("a", "2.0"), ("b", "'high'"), ("c", "nan")):
        with pytest.raises(ValueError, match=f"it gave {shown}; it must give a number in"):
            task.score(question, answer)
    with pytest.raises(ConfigError, match=r"mine.py:one: must be a function of \(question, answer\)"):
        load(path, score=f"{tmp_path}/mine.py:one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "q,answer\n1,2\n3,4\n",
            "bad.csv:1: there is no column 'question', only q, answer; say which .* tasks.fields={question: COLUMN}",
        ),
        ("question,a\n1,2\n3,4\n", "there is no column 'answer', only question, a"),
        ("question,answer\n1,2,3\n", "bad.csv:2: has 3 values, and there are 2 columns: question, answer"),
        ("question,question\n1,2\n", "bad.csv:1: two columns are called 'question'"),
        ('question,answer\n"1,2\n', "bad.csv:2: unexpected end of data"),
        ("question,answer\n1,2\n", "1 rows cannot be split"),
        ("question,answer\n", "has no rows"),
        ("question,answer\n1,\n2,3\n", "field 'answer' = '': must be a text, a number, or a list of those"),
        ("question,answer,id\n1,2,a/b\n3,4,c\n", "field 'id' = 'a/b': must be an id"),
        ("question,answer,id\n1,2,a\n3,4,a\n5,6,b\n", "field 'id' = 'a': an earlier row has the same id"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad.csv")


def test_files_and_settings_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="a.csv.gz: not readable as gzip"):
        load(tmp_path / "a.csv.gz")
    for begin, what in {b"(\xb5/\xfdx": "packed with zstd", b"PK\x03\x04x": "a zip archive or a spreadsheet"}.items():
        (tmp_path / "a.jsonl.x").write_bytes(begin)
        with pytest.raises(ValueError, match=f"a.jsonl.x: is {what}, which is not read: unpack it, or save it as CSV"):
            load(tmp_path / "a.jsonl.x")
    long = f'{{"question": "?", "answer": {"9" * 5000}}}'
    for text, place in ((f"[{long}]", ""), (long, ":1"), (f"{json.dumps(ROWS[0])}\n{long}", ":2"), ("[\n{]", ":2")):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"a.json{place}: not "):
            load(tmp_path / "a.json")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="a.parquet: not readable as Parquet"):
        load(tmp_path / "a.parquet")
    path = write_lines(tmp_path / "a.jsonl", [{"question": "?", "answer": True}, {"question": "!", "answer": "x"}])
    with pytest.raises(ValueError, match="field 'answer' = True: must be a text, a number, or a list"):
        load(path)
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match="tasks.fields.questoin: must be one of question, answer, id"):
        load(path, fields={"questoin": "q"})
    path = write_lines(
        tmp_path / "a.jsonl", [{"question": f"{i}", "answer": word} for i, word in enumerate(("3 clips", "red"))]
    )
    with pytest.raises(ValueError, match="a.jsonl:2: .* tasks.score=number needs one number, and 'red' is none"):
        load(path, score="number")


def test_a_corpus_of_ones_own(tmp_path: Path) -> None:
    rows = [
        {"title": "Alps", "text": "The Alps are  high."},
        {"text": "Nothing else."},
        {"title": "Alps", "text": "The Alps are high."},
    ]
    path = write_lines(tmp_path / "corpus.jsonl", rows)
    passages = [("Alps", "The Alps are high."), ("", "Nothing else.")]
    assert read_corpus(path) == passages
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "Alps.md").write_text(
        "The Alps\nare high.\n\n\nSecond.\n \t\nThird.\r\n  \r\n\r\nFourth.", encoding="utf-8"
    )
    (folder / "picture.png").write_bytes(b"\xff")
    texts = ("The Alps are high.", "Second.", "Third.", "Fourth.")
    assert read_corpus(str(folder)) == [("Alps", text) for text in texts]
    before = corpus_hash(str(folder))
    (folder / "deep" / "Alps.md").write_text("The Alps\nare low.", encoding="utf-8")
    assert corpus_hash(str(folder)) != before
    task = load(write_lines(tmp_path / "a.jsonl", ROWS), tools=["search"])
    found = passages_of(Config(search=SearchConfig(corpus=path)), task)
    assert found == passages and passages_of(Config(), task) == ()
    one = load_search(SearchConfig(cache=str(tmp_path / "cache")), passages[:1])
    assert one.call("how high are the Alps") == "Alps: The Alps are high.", "a corpus of one passage"
    with pytest.raises(ValueError, match="the task has none; set search.corpus, or use a task with paragraphs"):
        load_search(SearchConfig(cache=str(tmp_path / "cache")), ())
    for bad, message in {
        write_lines(
            tmp_path / "b.jsonl", [{"content": "x"}]
        ): "there is no column 'text', only content; a corpus has rows",
        write_lines(tmp_path / "c.jsonl", [{"text": " "}]): "field 'text'",
        str(tmp_path / "none"): "no such file or folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_corpus(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no .txt or .md file with text"):
        read_corpus(str(tmp_path / "empty"))


def test_instructions_and_worked_examples(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "prompt.txt").write_text("Be brief.\n{tools}\n", encoding="utf-8")
    assert load(path, instructions=str(tmp_path / "prompt.txt")).instructions == "Be brief.\n{tools}"
    assert load(path, instructions="Say <answer>x</answer>.").instructions == "Say <answer>x</answer>."
    with pytest.raises(
        ConfigError, match="tasks.instructions: the text says nothing of <math_exp>, <answer>, so .*{tools}"
    ):
        instructions([CALCULATOR], 3, load(path, instructions="Be brief.", tools=["calculator"]).instructions)
    example = {
        "question": "1+1?",
        "actions": ["<math_exp>1+1</math_exp>", "<answer>2</answer>"],
        "observations": ["1+1 -> 2.0"],
    }
    calculator = {"tools": ["calculator"]}
    task = load(path, worked_examples=write_lines(tmp_path / "e.jsonl", [example, example]), examples=1, **calculator)
    assert [one.question for one in task.examples] == ["1+1?"]
    for change, message in {
        "actions": ([], "must be a list of the model's turns, the last with"),
        "observations": ([], "must be a list of 1: one between each two of the 2 actions"),
    }.items():
        bad = write_lines(tmp_path / "bad.jsonl", [example | {change: message[0]}])
        with pytest.raises(ValueError, match=f"bad.jsonl:1: field '{change}'.*{message[1]}"):
            load(path, worked_examples=bad, **calculator)
    with pytest.raises(
        ValueError, match="e.jsonl:1: field 'actions'.*turn 1 is no call: There is no tool <math_exp> here"
    ):
        load(path, worked_examples=str(tmp_path / "e.jsonl"))
    with pytest.raises(ConfigError, match="is a folder; name a data file in it"):
        load(tmp_path)


OWN = """
class Task:
    name = "mine"
    tools = ("calculator",)

    def __init__(self, config, seed):
        self.count = config.options.get("count", 3)

    def questions(self, split):
        for i in range(self.count):
            yield {"question": f"{split} {i}?", "answer": i, "id": f"{split}{i}"}

class Scored(Task):
    def __init__(self):
        self.count = 2

    def score(self, question, answer):
        return answer == "yes"

class Nameless(Task):
    name = ""

class Empty(Task):
    def questions(self, split):
        return []

class Double(Task):
    def questions(self, split):
        return [{"question": f"{split} {i}?", "answer": "x", "id": "same"} for i in range(2)]

class Wrong(Task):
    def questions(self, split):
        return ["text"]

class Raises(Task):
    def questions(self, split):
        yield {"question": "one?", "answer": 1}
        raise KeyError("row 2")

class NoAnswer(Task):
    def questions(self, split):
        return [{"question": "one?", "answer": None}]

class Functions(Task):
    tools = (print,)

class Beside(Task):
    tools = ("mine.py:tool", "search")

class Needy(Task):
    def __init__(self, one, two, three):
        pass

def function(): pass
"""


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")

    def own(name: str, **settings):
        return load_task(TasksConfig(kind=f"{tmp_path}/mine.py:{name}", **settings), 0)

    task = own("Task", options={"count": 4}, limit=3)
    assert (task.name, task.tools, task.passages(), len(task.questions("train"))) == ("mine", ("calculator",), (), 3)
    question = task.questions("eval")[1]
    assert (question.id, question.answers) == ("eval1", ("1",)) and task.score(question, "1.0") == RIGHT
    assert own("Beside").tools == (f"{tmp_path}/mine.py:tool", "search")
    assert own("Scored").score(question, "yes") == RIGHT and own("Task", tools=["search"]).tools == ("search",)
    for name, message in {
        "Nameless": "lacks name: a task has a name and questions",
        "Empty": "questions\\('eval'\\) gives none",
        "Double": "two eval questions have the id 'same'",
        "Wrong": "eval question 0: must be a Question or a table, not str",
        "Needy": "must be made with \\(config, seed\\), or without arguments",
        "function": "must be a class",
        "Raises": r"questions\('eval'\) fails: KeyError: 'row 2' \(mine.py, line",
        "NoAnswer": "eval question 0: its `answer` None must be a text, a number, or a list",
        "Functions": "tools must be a list of names",
    }.items():
        with pytest.raises(ConfigError, match=f"mine.py:{name}: .*{message}"):
            own(name)


def test_what_one_task_of_a_mixture_holds_out_none_trains_on(tmp_path: Path) -> None:
    """Also what tasks.eval_limit leaves out of the evaluation, and in another spelling of Unicode."""
    first = [{"question": f"{i} caf\u00e9s?", "answer": i} for i in range(10)]
    second = [{"question": f"{i} cafe\u0301s?", "answer": i} for i in range(2, 12)]
    files = [write_lines(tmp_path / name, rows) for name, rows in (("a.jsonl", first), ("b.jsonl", second))]
    held = write_lines(tmp_path / "held.jsonl", [{"question": f"{i}  caf\u00e9s?", "answer": i} for i in (4, 5)])
    mix = [{"kind": "qa", "path": files[0], "eval_path": held}, {"kind": "qa", "path": files[1]}]
    task = load_task(TasksConfig(mix=mix, eval_limit=2), 0)
    trained = {same_text(question.text) for question in task.questions("train")}
    assert [question.text for question in task.questions("eval")] == ["4  caf\u00e9s?", "11 cafe\u0301s?"]
    assert len(trained) == 9 and not trained & {f"{i} caf\u00e9s?" for i in (4, 5, 11)}


def test_a_mixture_has_questions_in_turns_by_weight(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    many = [{"question": f"{i}?", "answer": i} for i in range(40)]
    mix = [
        {"kind": "qa", "path": write_lines(tmp_path / "a.jsonl", many), "weight": 3.0, "tools": ["search"]},
        {"kind": f"{tmp_path}/mine.py:Task", "options": {"count": 20}},
    ]
    task = load_task(TasksConfig(mix=mix, limit=16, eval_limit=4, tools=["calculator"]), 0)
    assert task.name == "a+mine" and list(parts_of(task)) == ["a", "mine"]
    order = [question.task for question in task.questions("train")]
    assert order == ["a", "a", "mine", "a"] * 4 and len(task.questions("eval")) == 4
    assert {name: [spec.name for spec in specs] for name, specs in offered_tools(task).items()} == {
        "a": ["search"],
        "mine": ["calculator"],
    }
    last = task.questions("train")[2]
    assert task.score(last, last.answers[0]) == RIGHT
    with pytest.raises(ConfigError, match=r"tasks.mix\[1\]: two tasks are called a; give one of them another name"):
        load_task(TasksConfig(mix=[mix[0], mix[0]]), 0)
