"""Trajectories that people labelled, as the steps that a judge is asked about.

Search: AgentProcessBench (arXiv 2603.14465; github RUCBM/AgentProcessBench, data/AgentProcessBench/hotpotqa.jsonl). One step an
assistant message; its calls become one `<search_query>`, several joined by "; "; the observation is `query -> Title: text`, a passage a
line, as our search tool writes it. A label of +1 is GOOD, -1 BAD; a step labelled 0 (or not at all) is judged as part of its trajectory
and is left out of the agreement.

Calculator: GSM8K's example_model_solutions.jsonl (github openai/grade-school-math): solutions of four GPT-3 models with their calls as
`<<expression=value>>`. One step a call, with what our calculator answers, then the answer. Whether the answer is right is known, and
labels it. A call is not labelled by anybody: it is GOOD (probably right) in a right solution when the official solution has its value
too, BAD (probably wrong) in a wrong solution when the official solution does not have it, and else without a label.

Left out of what was published: a trajectory's system prompt, the tool's scores, the thoughts of the solutions between their calls.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from swirl_fast.formats.tags import parse
from swirl_fast.judges.labels import LabelledStep
from swirl_fast.tools.arithmetic import CalculationError, evaluate, render_value
from swirl_fast.tools.numerals import number_in
from swirl_fast.tools.search import NOTHING_FOUND
from swirl_fast.tools.tool import CALCULATOR, SEARCH, ToolSpec, observation
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Verdict

SEARCH_TASK, CALCULATOR_TASK = "agent_process_bench", "example_model_solutions"
_LABELS = {1: Verdict.GOOD, -1: Verdict.BAD}
_CALL = re.compile(r"<<([^<>=]*)=[^<>]*>>")


@dataclass(frozen=True)
class LabelledTrajectory:
    """right: whether its answer is, None where nobody said. steps: one of each turn, in order, some without a label."""

    question: str
    steps: tuple[LabelledStep, ...]
    right: bool | None

    @property
    def half(self) -> str:
        """tune or check: by the question, so that all trajectories of one question are in the same half."""
        return ("tune", "check")[hashlib.sha256(self.question.encode()).digest()[0] >= 128]


def read_search(path: str | Path) -> list[LabelledTrajectory]:
    """Raises ValueError with file:line and the remedy for a row that is none of AgentProcessBench's."""
    return [
        _search_trajectory(row, number, where)
        for number, where, row in _rows(path, ("question", "messages", "step_labels", "final_label"))
    ]


def read_calculator(path: str | Path) -> list[LabelledTrajectory]:
    """Raises ValueError with file:line and the remedy for a row that is none of example_model_solutions.jsonl."""
    found = []
    for number, where, row in _rows(path, ("question", "ground_truth")):
        solutions = [value for value in row.values() if isinstance(value, Mapping)]
        if not solutions or not all({"is_correct", "solution"} <= set(solution) for solution in solutions):
            raise ValueError(
                f"{where}: no solutions with is_correct and solution; use GSM8K's example_model_solutions.jsonl"
            )
        official = set(_values(row["ground_truth"]))
        found += [
            _solution(row["question"], solution["solution"], solution["is_correct"], official, number)
            for solution in solutions
        ]
    return found


def _rows(path: str | Path, keys: Sequence[str]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line, file:line, row). Raises ValueError for no file, no JSON object, and a missing key."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; where to get it stands at the top of benchmarks/judge_people/trajectories.py"
        )
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            if not isinstance(row, dict) or (missing := [key for key in keys if key not in row]):
                raise ValueError(
                    f"{where}: has no key {', '.join(missing if isinstance(row, dict) else keys)}; is it the other file?"
                )
            yield number, where, row


def _search_trajectory(row: Mapping[str, Any], line: int, where: str) -> LabelledTrajectory:
    """Raises ValueError for messages without roles or contents."""
    turns: list[tuple[str, str]] = []
    labels: list[int | None] = []
    kinds: list[str] = []
    try:
        for at, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                queries = [
                    query
                    for call in message.get("tool_calls") or ()
                    for query in _queries(call["function"]["arguments"])
                ]
                text = message.get("content") or ""
                turns.append(
                    (f"{text}\n<search_query>{'; '.join(queries)}</search_query>".lstrip() if queries else text, "")
                )
                labels.append(row["step_labels"].get(str(at)))
                kinds.append(_search_kind(turns[-1][0], len(queries), any(" -> " in seen for _, seen in turns[:-1])))
            elif turns and message["role"] != "system":
                turns[-1] = turns[-1][0], _answered(*turns[-1], message)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: messages are not as AgentProcessBench has them ({type(error).__name__} {error})"
        ) from None
    steps = _steps(
        SEARCH_TASK, SEARCH, row["question"], turns, [_LABELS.get(label or 0) for label in labels], kinds, "human", line
    )
    return LabelledTrajectory(row["question"], steps, {1: True, -1: False}.get(row["final_label"]))


def _search_kind(text: str, queries: int, searched: bool) -> str:
    if queries:
        return "one query" if queries == 1 else "several queries"
    if parse(text, (SEARCH,)).kind != "answer":
        return "turn without a tag"
    return "answer" if searched else "answer before any search"


def _queries(arguments: str) -> list[str]:
    """The queries of a call; arguments that are no JSON are one query as they are."""
    try:
        given = json.loads(arguments)
    except ValueError:
        return [arguments]
    listed = given.get("query_list") or given.get("query") or []
    return [str(query).strip() for query in ([listed] if isinstance(listed, str) else listed)]


def _answered(text: str, seen: str, message: Mapping[str, Any]) -> str:
    """The observation of a turn, with one more result (or what a user said): `query -> Title: text`, a passage a line."""
    shown = _passages(message["content"]) if message["role"] == "tool" else message["content"]
    if seen:
        return f"{seen}\n{shown}"
    action = parse(text, (SEARCH,))
    return observation(action.argument, shown) if action.kind == "tool" else shown


def _passages(content: str) -> str:
    """Of a tool's message; an error as the search tool would write it."""
    found = json.loads(content)
    if "result" not in found:
        return f"ERROR: {found.get('message') or found.get('error')}"
    shown = []
    for result in found["result"]:
        for passage in result:
            title, _, text = passage["document"]["contents"].replace('""', '"').partition("\n")
            shown.append(f"{title.strip(chr(34))}: {' '.join(text.split())}")
    return "\n".join(dict.fromkeys(shown)) or NOTHING_FOUND


def _solution(question: str, solution: str, right: bool, official: set[Fraction], line: int) -> LabelledTrajectory:
    turns, labels, kinds = [], [], []
    for expression in (found.strip() for found in _CALL.findall(solution)):
        (value,) = _values(f"<<{expression}=>>") or (None,)
        turns.append((f"<math_exp>{expression}</math_exp>", observation(expression, _calculated(expression))))
        labels.append(
            Verdict.GOOD
            if right and value in official
            else Verdict.BAD
            if not right and value not in official
            else None
        )
        operators = len(re.findall(r"(?<=[\d.)%])\s*[-+*/]", expression))
        kinds.append(("number only", "one operation", "several operations")[min(operators, 2)])
    _, marked, answer = solution.rpartition("A:")
    turns.append((f"<answer>{answer.strip()}</answer>" if marked else "", ""))
    labels.append(Verdict.GOOD if right else Verdict.BAD)
    kinds.append("answer" if number_in(answer) else "answer without a number")
    return LabelledTrajectory(
        question, _steps(CALCULATOR_TASK, CALCULATOR, question, turns, labels, kinds, "rule", line), right
    )


def _calculated(expression: str) -> str:
    try:
        return render_value(evaluate(expression))
    except CalculationError as error:
        return f"ERROR: {error}"


def _values(solution: str) -> list[Fraction]:
    """Of the calls that evaluate."""
    values = []
    for expression in _CALL.findall(solution):
        try:
            values.append(evaluate(expression.strip()))
        except CalculationError:
            continue
    return values


def _steps(
    task: str,
    tool: ToolSpec,
    question: str,
    turns: Sequence[tuple[str, str]],
    labels: Sequence[Verdict | None],
    kinds: Sequence[str],
    source: str,
    line: int,
) -> tuple[LabelledStep, ...]:
    return tuple(
        LabelledStep(StepView(task, question, tuple(turns[:at]), text), (tool,), labels[at], kinds[at], source, line)
        for at, (text, _) in enumerate(turns)
    )
