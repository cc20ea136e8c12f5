"""HotPotQA, MuSiQue, 2WikiMultihopQA, BeerQA and CofCA from small files in their official formats."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import DATA
from support.task_files import RIGHT, check_examples, texts, write_hub_folder, write_lines, write_list

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.config.schema import TASKS
from swirl_fast.formats.tags import parse
from swirl_fast.tasks import TEXT_ANSWERS, load_task
from swirl_fast.tasks.paragraph_qa import EXAMPLE_PASSAGES, EXAMPLES
from swirl_fast.tasks.scoring import ZERO
from swirl_fast.tools.search import Search
from swirl_fast.tools.tool import SEARCH


def load(kind: str, path: Path | str, eval_path: Path | str | None = None, limit: int = 0, eval_limit: int = 0):
    eval_path = str(eval_path) if eval_path else None
    return load_task(TasksConfig(kind=kind, path=str(path), eval_path=eval_path, limit=limit, eval_limit=eval_limit), 0)


def ids(task, split) -> list[str]:
    return [question.id for question in task.questions(split)]


# Rows of each data set about the same towns: question i asks who founded town i.


def hops(n: int, start: int = 0, **fields) -> list[dict]:
    """HotPotQA; also 2WikiMultihopQA and CofCA."""
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


def composed(n: int, start: int = 0, **fields) -> list[dict]:
    """MuSiQue."""
    return [
        {
            "id": f"id{i}",
            "paragraphs": [
                {"idx": j, "title": title, "paragraph_text": " ".join(sentences), "is_supporting": j == 0}
                for j, (title, sentences) in enumerate(row["context"])
            ],
            "question": row["question"],
            "question_decomposition": [{"id": 1, "question": "town >> founder", "answer": "x"}],
            "answer": row["answer"],
            "answer_aliases": [f"F. {i}", row["answer"]],
            "answerable": True,
            **fields,
        }
        for i, row in enumerate(hops(n, start), start)
    ]


def beers(n: int, start: int = 0, **fields) -> list[dict]:
    """The `data` of BeerQA."""
    return [
        {
            "id": row["_id"],
            "src": "squad",
            "answers": [row["answer"], f"F. {i}"],
            "question": row["question"],
            "context": [[title, " ".join(sentences)] for title, sentences in row["context"]],
            **fields,
        }
        for i, row in enumerate(hops(n, start), start)
    ]


def write_beerqa(path: Path, rows: list) -> Path:
    path.write_text(json.dumps({"version": "1.0", "split": "train", "data": rows}, indent=1))
    return path


# kind: (rows, how they are written)
FORMATS: dict[str, tuple[Callable[..., list[dict]], Callable[[Path, list], Path | str]]] = {
    "hotpotqa": (hops, write_list),
    "musique": (composed, write_lines),
    "2wikimultihopqa": (hops, write_list),
    "beerqa": (beers, write_beerqa),
    "cofca": (hops, write_list),
}
every_kind = pytest.mark.parametrize("kind", FORMATS)


def write(kind: str, path: Path, n: int, start: int = 0, **fields) -> Path | str:
    rows, to = FORMATS[kind]
    return to(path, rows(n, start, **fields))


# what all have in common


def test_every_kind_of_the_configuration_can_be_loaded(tmp_path: Path) -> None:
    generated, others = {"reasoning_gym", "two_step"}, {"qa", "gsm8k", "svamp"}
    assert set(TASKS) == generated | others | FORMATS.keys() and FORMATS.keys() == TEXT_ANSWERS
    gsm = write_lines(tmp_path / "gsm", [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)])
    for kind in sorted(set(TASKS) - {"qa", "svamp"}):  # svamp: test_word_problems.py
        task = load(kind, write(kind, tmp_path / kind, 3) if kind in FORMATS else gsm, limit=2, eval_limit=1)
        assert task.questions("train") and task.questions("eval") and task.tools and len(task.examples) >= 2


@every_kind
def test_questions_passages_and_splits(kind: str, tmp_path: Path) -> None:
    train, dev = write(kind, tmp_path / "train", 20), write(kind, tmp_path / "dev", 4, 18)
    task = load(kind, train, dev)
    assert (task.name, task.tools) == (kind, ("search",))
    assert texts(task, "train") == [f"Who founded town {i}?" for i in range(18)]  # 18 and 19 are held out
    assert texts(task, "eval") == [f"Who founded town {i}?" for i in range(18, 22)]
    assert len({*ids(task, "train"), *ids(task, "eval")}) == 22
    # the passages are those of every row of both files, once
    towns = [(f"Town {i}", f"Town {i} was founded. Its founder is Founder.") for i in range(22)]
    assert task.passages() == [towns[0], ("Shared", "In all rows."), *towns[1:]]
    limited = load(kind, train, dev, limit=3, eval_limit=2)
    assert limited.questions("train") == task.questions("train")[:3]
    assert limited.questions("eval") == task.questions("eval")[:2] and limited.passages() == task.passages()
    question = task.questions("train")[6]
    assert task.score(question, "the founder 6") == RIGHT
    assert task.score(question, "Founder").f1 == pytest.approx(2 / 3)
    assert task.score(question, None) == task.score(question, "\ud800" * 10**5) == ZERO


@every_kind
def test_the_tail_is_held_out_or_all_of_one_file(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path / "train", 20)
    task = load(kind, path)
    assert texts(task, "train") + texts(task, "eval") == [f"Who founded town {i}?" for i in range(20)]
    assert len(task.questions("eval")) == 2
    everything = load(kind, path, path)
    assert (len(everything.questions("train")), len(everything.questions("eval"))) == (0, 20)


@every_kind
def test_a_held_out_question_is_not_trained_on_under_another_id(kind: str, tmp_path: Path) -> None:
    rows, to = FORMATS[kind]
    held_out = [{**row, "id" if "id" in row else "_id": f"other{i}"} for i, row in enumerate(rows(2))]
    task = load(kind, write(kind, tmp_path / "train", 5), to(tmp_path / "dev", held_out))
    assert texts(task, "train") == [f"Who founded town {i}?" for i in range(2, 5)]


@every_kind
def test_one_row_a_line_is_read_too(kind: str, tmp_path: Path) -> None:
    task = load(kind, write_lines(tmp_path / "lines", FORMATS[kind][0](5)))
    assert len(texts(task, "train") + texts(task, "eval")) == 5


def test_examples_are_what_search_gives(tmp_path: Path) -> None:
    check_examples(EXAMPLES, SEARCH, Search(EXAMPLE_PASSAGES, 1, 1200, tmp_path / "cache"))
    for example in EXAMPLES:
        answer = parse(example.actions[-1], [SEARCH]).argument
        assert answer in ("yes", "no") or any(answer in seen for seen in example.observations)


CONTEXT = [
    ({"context": None}, "field 'context' = None: must be a list"),
    ({"context": []}, "field 'context' = .*: must be a list"),
    ({"context": "Town"}, "field 'context' = 'Town': "),
    ({"context": [["Title", [3]]]}, "field 'context' = .*: entry 0 must be"),
    ({"context": [["Title", ["text"]], ["Title"]]}, "field 'context' = .*: entry 1 must be"),
    ({"context": {"title": ["a"], "sentences": []}}, "field 'context' = .*: must have equally many"),
]
IDENTITY = [
    ({"ID": None}, "field 'ID' = None: must be text"),
    ({"ID": "id0"}, "field 'ID' = 'id0': an earlier row has the same id"),
]
TEXTS = [
    ({"question": ""}, "field 'question' = '': must be text"),
    ({"question": ["Who?"]}, r"field 'question' = \['Who\?'\]: must be text"),
    ({"answer": 5}, "field 'answer' = 5: must be text"),
]
SENTENCES = [
    ({"context": [["a", ["b"]], ["a", "text"]]}, r"'context' = .*: entry 1 must be \[title, \[sentence, …\]\]$")
]
MALFORMED = {
    "hotpotqa": [*IDENTITY, *TEXTS, *CONTEXT, *SENTENCES],
    "musique": [
        *IDENTITY,
        *TEXTS,
        ({"answer_aliases": "Founder"}, "field 'answer_aliases' = 'Founder': must be a list of texts"),
        ({"answer_aliases": [1]}, r"field 'answer_aliases' = \[1\]: must be a list of texts"),
        ({"answerable": "no"}, "field 'answerable' = 'no': must be true or false"),
        ({"paragraphs": []}, r"field 'paragraphs' = \[\]: must be a list of {title, paragraph_text}"),
        ({"paragraphs": {"title": []}}, "field 'paragraphs' = .*: must be a list of"),
        ({"paragraphs": [{"title": "a"}]}, "field 'paragraphs' = .*: entry 0 must have the texts `title` and"),
        ({"paragraphs": [{"title": None, "paragraph_text": "a"}]}, "field 'paragraphs' = .*: entry 0 must have"),
    ],
    "2wikimultihopqa": [
        *IDENTITY,
        *TEXTS,
        *CONTEXT,
        *SENTENCES,
        ({"context": "[["}, "'context' = .*: is text but not"),
    ],
    "beerqa": [
        *IDENTITY,
        *TEXTS[:2],
        ({"answers": "Founder"}, "field 'answers' = 'Founder': must be a list of texts"),
        ({"answers": [[]]}, "field 'answers' = .*: must be a list of texts"),
        ({"answers": [" "]}, r"field 'answers' = \[' '\]: must have an answer"),
        ({"context": [["a", "text"], ["a", ["b"]]]}, r"'context' = .*: entry 1 must be \[title, text\]$"),
        *CONTEXT[:4],
    ],
    "cofca": [*TEXTS, *CONTEXT],
}


@pytest.mark.parametrize(
    ("kind", "fields", "message"), [(kind, *case) for kind, cases in MALFORMED.items() for case in cases]
)
def test_a_malformed_row_is_named(kind: str, fields: dict, message: str, tmp_path: Path) -> None:
    rows, to = FORMATS[kind]
    all_rows = rows(30)
    id_field = "id" if "id" in all_rows[0] else "_id"
    all_rows[4].update({name.replace("ID", id_field): value for name, value in fields.items()})
    path = to(tmp_path / "train", all_rows)
    place = f"{path}:5: " if kind == "musique" else f"{path}, row 5 of 30: "
    with pytest.raises(ValueError, match=re.escape(place) + ".*" + message.replace("ID", id_field)):
        load(kind, path)


MISSING = {"musique": ("id", "question", "answer", "paragraphs"), "beerqa": ("id", "question", "answers", "context")}


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (kind, field)
        for kind in FORMATS
        for field in MISSING.get(kind, ("_id", "question", "answer", "context"))
        if (kind, field) != ("cofca", "_id")
    ],
)
def test_a_missing_field_is_named(kind: str, field: str, tmp_path: Path) -> None:
    rows, to = FORMATS[kind]
    all_rows = rows(9)
    del all_rows[0][field]
    path = to(tmp_path / "train", all_rows)
    with pytest.raises(ValueError, match=re.escape(str(path)) + f"(:1|, row 1 of 9): field '{field}': is missing"):
        load(kind, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"_id": "x",\n]', ":3: not valid JSON"),
        ('{"version": "1.0", "data": [1]}', ", row 1 of 1: must be a JSON object, not int"),
        ('{"version": "1.0", "data": [}', ":1: not a JSON object"),
        ('{"version": "1.0", "data": {}}', ": has no rows|cannot be split"),
        ('{"version": "1.0", "data": []}', ": has no rows"),
        ("", ": has no rows"),
    ],
)
def test_a_file_that_is_no_data_set_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path)) + message):
        load("beerqa", path)


# HotPotQA


def test_hotpotqa_leaves_easy_rows_out_of_training(tmp_path: Path) -> None:
    rows = [*hops(6, level="easy"), *hops(6, 6, level="medium"), *hops(8, 12, level="hard")]
    train = write_list(tmp_path / "train.json", rows)
    dev = write_list(tmp_path / "dev.json", [*hops(1, 15), *hops(3, 100, level="easy")])
    task = load("hotpotqa", train, dev, limit=3, eval_limit=2)
    assert ids(task, "train") == ["id6", "id7", "id8"]
    assert ids(task, "eval") == ["id15", "id100"]  # but not out of the held-out file
    assert {f"Town {i}" for i in [*range(20), *range(100, 103)]} < {title for title, _ in task.passages()}
    assert "id15" not in ids(load("hotpotqa", train, dev), "train")


def test_hotpotqa_holds_the_tail_out_before_it_drops_easy_rows(tmp_path: Path) -> None:
    task = load("hotpotqa", write_list(tmp_path / "train.json", [*hops(10, level="easy"), *hops(10, 10)]))
    assert ids(task, "train") == [f"id{i}" for i in range(10, 18)]
    assert ids(task, "eval") == ["id18", "id19"]
    path = write_list(tmp_path / "easy.json", hops(10, level="easy"))
    with pytest.raises(ConfigError, match=f"tasks.path={path}: all 9 train rows are left out: .* level 'easy'"):
        load("hotpotqa", path)


# MuSiQue


def test_musique_aliases_are_right_and_yes_is_a_word_like_others(tmp_path: Path) -> None:
    rows = composed(4)
    rows[0].update(answer="yes they did", answer_aliases=[])
    del rows[1]["answer_aliases"]
    task = load("musique", write_lines(tmp_path / "train.jsonl", rows))
    yes, plain, aliased = task.questions("train")
    assert aliased.answers == ("Founder 2", "F. 2") and plain.answers == ("Founder 1",)
    assert task.score(aliased, "f 2") == RIGHT and task.score(plain, "f 1") != RIGHT
    assert task.score(yes, "Yes").f1 == pytest.approx(1 / 2)  # as metrics/answer.py has it; HotPotQA's script says 0


def test_musique_full_asks_its_answerable_rows(tmp_path: Path) -> None:
    lacking = composed(5, answerable=False)
    for i, row in enumerate(lacking):
        row["paragraphs"][0].update(title=f"Other town {i}", paragraph_text=f"Not {i}.")
    path = write_lines(
        tmp_path / "full.jsonl", [row for pair in zip(composed(5), lacking, strict=True) for row in pair]
    )
    task = load("musique", path, path)
    assert ids(task, "eval") == [f"id{i}" for i in range(5)]
    titles = {title for title, _ in task.passages()}
    assert {f"Town {i}" for i in range(5)} | {f"Other town {i}" for i in range(5)} < titles
    none = write_lines(tmp_path / "none.jsonl", lacking)
    with pytest.raises(ConfigError, match=f"tasks.eval_path={none}: all 5 eval rows are left out: .* not answerable"):
        load("musique", path, none)


# 2WikiMultihopQA


def test_2wikimultihopqa_takes_the_aliases_beside_the_file(tmp_path: Path) -> None:
    rows = hops(12, type="compositional", evidences=[["Town", "founder", "Founder"]], evidences_id=[], answer_id="Q1")
    rows[1]["answer_id"], rows[2]["answer_id"] = None, "Q2"
    del rows[3]["answer_id"]
    path = write_list(tmp_path / "train.json", rows)
    assert load("2wikimultihopqa", path).questions("train")[0].answers == ("Founder 0",)
    aliases = tmp_path / "id_aliases.json"
    write_lines(aliases, [{"Q_id": "Q1", "aliases": ["The First"], "demonyms": ["Firstian", "Founder 0"]}])
    train = load("2wikimultihopqa", path).questions("train")
    assert train[0].answers == ("Founder 0", "The First", "Firstian")
    assert [question.answers for question in train[1:4]] == [(f"Founder {i}",) for i in range(1, 4)]
    write_lines(aliases, [{"Q_id": "Q1", "aliases": "First", "demonyms": []}])
    with pytest.raises(ValueError, match=re.escape(f"{aliases}:1: field 'aliases' = 'First': must be a list of texts")):
        load("2wikimultihopqa", path)


def test_2wikimultihopqa_context_as_json_text(tmp_path: Path) -> None:
    rows = [{**row, "context": json.dumps(row["context"])} for row in hops(3)]
    task = load("2wikimultihopqa", write_list(tmp_path / "train.json", rows))
    assert task.passages()[0] == ("Town 0", "Town 0 was founded. Its founder is Founder.")


# BeerQA


def test_beerqa_answers_are_all_right(tmp_path: Path) -> None:
    task = load("beerqa", write_beerqa(tmp_path / "train.json", beers(5)))
    question = task.questions("train")[3]
    assert question.answers == ("Founder 3", "F. 3")
    assert task.score(question, "F 3!") == task.score(question, "founder 3") == RIGHT


# CofCA


def test_cofca_ids_repeat_and_questions_are_asked_once(tmp_path: Path) -> None:
    rows = [{**row, "_id": "passage", "type": ["bridge", "2hop"]} for row in hops(4)]
    rows[3]["context"] = [["Town 3", "One text."]]
    path = write_list(tmp_path / "2hop.json", [*rows, {**rows[1], "answer": "Another"}])
    task = load("cofca", path, path)
    assert texts(task, "eval") == [f"Who founded town {i}?" for i in range(4)]
    assert len(set(ids(task, "eval"))) == 4 and task.questions("eval")[1].answers == ("Founder 1",)
    assert ("Town 3", "One text.") in task.passages()
    # an id depends on the question alone
    assert set(ids(load("cofca", path), "train")) == set(ids(task, "eval")[:1] + ids(task, "eval")[2:])


# Hugging Face


def hub_rows(rows: list[dict]) -> list[dict]:
    """The form in which `hotpotqa/hotpot_qa` and `framolfese/2WikiMultihopQA` have them."""
    return [
        {
            "id": row["_id"],
            "question": row["question"],
            "answer": row["answer"],
            "context": {
                "title": [title for title, _ in row["context"]],
                "sentences": [sentences for _, sentences in row["context"]],
            },
        }
        for row in rows
    ]


@pytest.mark.parametrize(
    ("kind", "configuration", "rows"),
    [
        ("hotpotqa", "distractor", hub_rows(hops(10))),
        ("2wikimultihopqa", "default", hub_rows(hops(10))),
        ("musique", "default", composed(10)),
        ("musique", "answerable", composed(10)),
    ],
)
def test_hugging_face_data_sets(
    kind: str, configuration: str, rows: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    name = f"someone/{kind}-{configuration}"
    write_hub_folder(tmp_path / name, configuration, train=rows, validation=rows[:2])
    if configuration == "answerable":
        name += ":answerable"
    task = load(kind, name, name)
    assert ids(task, "eval") == ["id0", "id1"]
    assert ids(task, "train") == [f"id{i}" for i in range(2, 10)]
    assert ("Town 3", "Town 3 was founded. Its founder is Founder.") in task.passages()


# the real files, where they are


@pytest.mark.parametrize(
    ("kind", "train", "dev", "counts", "passages"),
    [
        ("hotpotqa", "hotpotqa/train.json", "hotpotqa/dev.json", (84, 100), 1_900),
        ("musique", "musique/train.jsonl", "musique/dev.jsonl", (100, 100), 3_000),
        ("2wikimultihopqa", "2wiki/train.json", None, (450, 50), 3_000),
    ],
)
def test_real_files(kind: str, train: str, dev: str | None, counts: tuple[int, int], passages: int) -> None:
    if not (DATA / train).is_file() or not (DATA / (dev or train)).is_file():
        pytest.skip(f"{DATA / train} is not here")
    task = load(kind, DATA / train, DATA / dev if dev else None)
    assert (len(task.questions("train")), len(task.questions("eval"))) == counts
    assert len(task.passages()) == len(set(task.passages())) > passages
    for question in [*task.questions("train"), *task.questions("eval")]:
        assert all(task.score(question, answer) == RIGHT for answer in question.answers)
