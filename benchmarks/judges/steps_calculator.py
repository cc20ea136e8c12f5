"""Labelled steps with the calculator: every kind of case is a function that draws one (problems.py has what they are about)."""

from __future__ import annotations

import functools
import random
import re
from typing import NamedTuple

from benchmarks.judges.problems import (
    FACTS,
    IDLE,
    MADE_UP,
    NAMES,
    SPOKEN,
    Problem,
    Sum,
    chain,
    draw_problem,
    draw_simple_problem,
    draw_sum,
    swapped,
    turn,
    value,
)
from benchmarks.judges.steps import INJECTED, Case, CaseMaker, Turns, add_kind, answer, call, thinking
from swirl_fast.tools.tool import observation
from swirl_fast.verdict import Verdict

THOUGHTS = (
    "I work it out with the calculator.",
    "This is what the question asks for.",
    "Now I take the next step.",
    "Let me be careful here.",
)
SURE = ("So I am done.", "That is the result.", "Now I can answer.")

CALCULATOR_KINDS: dict[tuple[Verdict, str], CaseMaker] = {}
good = functools.partial(add_kind, CALCULATOR_KINDS, Verdict.GOOD)
bad = functools.partial(add_kind, CALCULATOR_KINDS, Verdict.BAD)


def sum_case(rng: random.Random, stated: Sum, history: Turns, action: str, *thoughts: str) -> Case:
    return Case("chain_sum", stated.question, history, thinking(rng, action, *(thoughts or THOUGHTS)))


def word_case(rng: random.Random, question: str, history: Turns, action: str, *thoughts: str) -> Case:
    return Case("word_problem", question, history, thinking(rng, action, *(thoughts or THOUGHTS)))


class Exercise(NamedTuple):
    """A sum or a word problem. first, rest, whole: calculations, of its first part, of what is left with that result, and of all."""

    about: Sum | Problem
    first: str
    rest: str
    whole: str
    numbers: tuple[int, ...]

    def case(self, rng: random.Random, history: Turns, action: str, *thoughts: str) -> Case:
        if isinstance(self.about, Sum):
            return sum_case(rng, self.about, history, action, *thoughts)
        return word_case(rng, self.about.question, history, action, *thoughts)


def either(rng: random.Random) -> Exercise:
    about = draw_sum(rng) if rng.random() < 0.5 else draw_problem(rng)
    return Exercise(about, about.first, about.rest, about.whole, about.numbers)


@good("whole stated expression")
def whole_stated_expression(rng: random.Random) -> Case:
    stated = draw_sum(rng)
    return sum_case(rng, stated, (), call("math_exp", stated.whole))


@good("first part of a stated expression")
def first_part_of_a_stated_expression(rng: random.Random) -> Case:
    stated = draw_sum(rng)
    return sum_case(rng, stated, (), call("math_exp", stated.first))


@good("result joined with the rest")
def result_joined_with_the_rest(rng: random.Random) -> Case:
    stated = draw_sum(rng)
    return sum_case(rng, stated, (turn(stated.first),), call("math_exp", stated.rest))


@good("answer is the result")
def answer_is_the_result(rng: random.Random) -> Case:
    stated = draw_sum(rng)
    history = rng.choice([(turn(stated.whole),), (turn(stated.first), turn(stated.rest))])
    return sum_case(rng, stated, history, answer(value(stated.whole)), *SURE)


@good("answer is the result, written otherwise")
def answer_is_the_result_written_otherwise(rng: random.Random) -> Case:
    exercise = either(rng)
    result = value(exercise.whole)
    forms = (
        f"{result}.0",
        f"{result}.00",
        f"{int(result):,}",
        f"The answer is {result}.",
        f"${result}",
        f" {result} ",
    )
    return exercise.case(rng, (turn(exercise.whole),), answer(rng.choice(forms)), *SURE)


@good("whole calculation of a word problem")
def whole_calculation_of_a_word_problem(rng: random.Random) -> Case:
    story = draw_problem(rng)
    return word_case(rng, story.question, (), call("math_exp", story.whole))


@good("first part of a word problem")
def first_part_of_a_word_problem(rng: random.Random) -> Case:
    story = draw_problem(rng)
    return word_case(rng, story.question, (), call("math_exp", story.first))


@good("result joined with the rest, word problem")
def result_joined_with_the_rest_word_problem(rng: random.Random) -> Case:
    story = draw_problem(rng)
    return word_case(rng, story.question, (turn(story.first),), call("math_exp", story.rest))


@good("answer is the result, word problem")
def answer_is_the_result_word_problem(rng: random.Random) -> Case:
    story = draw_problem(rng)
    history = rng.choice([(turn(story.whole),), (turn(story.first), turn(story.rest))])
    return word_case(rng, story.question, history, answer(value(story.whole)), *SURE)


@good("number word or share")
def number_word_or_share(rng: random.Random) -> Case:
    question, expression = draw_simple_problem(rng, SPOKEN)
    return word_case(rng, question, (), call("math_exp", expression))


@good("fact of the world")
def fact_of_the_world(rng: random.Random) -> Case:
    question, expression = draw_simple_problem(rng, FACTS)
    return word_case(rng, question, (), call("math_exp", expression))


@good("leaves out a number that does not matter")
def leaves_out_a_number_that_does_not_matter(rng: random.Random) -> Case:
    story = draw_problem(rng)
    idle = rng.choice(IDLE).format(n=rng.choice(NAMES), d=rng.choice(MADE_UP))
    if rng.random() < 0.5:
        return word_case(rng, f"{idle} {story.question}", (), call("math_exp", story.whole))
    return word_case(rng, f"{idle} {story.question}", (turn(story.whole),), answer(value(story.whole)), *SURE)


@good("right call after a turn that failed")
def right_call_after_a_turn_that_failed(rng: random.Random) -> Case:
    exercise = either(rng)
    failed = rng.choice(
        [
            (
                f"I think {exercise.first}",
                "ERROR: The turn has no tag. End it with <math_exp>…</math_exp> or <answer>…</answer>.",
            ),
            turn(f"{exercise.first} +"),
            turn(f"{exercise.first} = x"),
        ]
    )
    return exercise.case(rng, (failed,), call("math_exp", exercise.whole))


@good("reasons with numbers before the call")
def reasons_with_numbers_before_the_call(rng: random.Random) -> Case:
    exercise = either(rng)
    shown = ", ".join(map(str, exercise.numbers))
    text = rng.choice(
        [
            f"The numbers are {shown}.",
            f"Step 1 of 2: I must not forget {exercise.numbers[-1]}.",
            "3 numbers, 2 operators.",
        ]
    )
    history, expression = rng.choice([((), exercise.whole), ((turn(exercise.first),), exercise.rest)])
    return exercise.case(rng, history, f"{text}\n{call('math_exp', expression)}", "")


@bad("wrong number")
def wrong_number(rng: random.Random) -> Case:
    exercise = either(rng)
    old = rng.choice(exercise.numbers)
    new = next(n for n in range(old + 31, old + 99) if n not in (*exercise.numbers, 40, 50, 60, 100))
    return exercise.case(rng, (), call("math_exp", re.sub(rf"\b{old}\b", str(new), exercise.whole, count=1)))


@bad("made-up number")
def made_up_number(rng: random.Random) -> Case:
    exercise = either(rng)
    new = rng.choice([n for n in MADE_UP if n not in exercise.numbers])
    return exercise.case(rng, (), call("math_exp", f"{exercise.whole} {rng.choice('+-')} {new}"))


@bad("answer rests on a part of the numbers")
def answer_rests_on_a_part_of_the_numbers(rng: random.Random) -> Case:
    exercise = either(rng)
    return exercise.case(rng, (turn(exercise.first),), answer(value(exercise.first)), *SURE)


@bad("wrong operation")
def wrong_operation(rng: random.Random) -> Case:
    stated = draw_sum(rng)
    at = rng.randrange(len(stated.operators))
    flipped = {"+": "-", "-": "+"}[stated.operators[at]]
    expression = chain(stated.numbers, (*stated.operators[:at], flipped, *stated.operators[at + 1 :]))
    return sum_case(rng, stated, (), call("math_exp", expression))


@bad("wrong operation in a word problem")
def wrong_operation_in_a_word_problem(rng: random.Random) -> Case:
    story = draw_problem(rng)
    history, expression = rng.choice([((), story.first), ((turn(story.first),), story.rest)])
    return word_case(rng, story.question, history, call("math_exp", swapped(expression)))


@bad("repeated call")
def repeated_call(rng: random.Random) -> Case:
    exercise = either(rng)
    expression = rng.choice([exercise.first, exercise.whole])
    return exercise.case(rng, (turn(expression),), call("math_exp", expression))


@bad("repeated call, written otherwise")
def repeated_call_written_otherwise(rng: random.Random) -> Case:
    exercise = either(rng)
    other = rng.choice(
        [
            exercise.first.replace(" ", "") if " " in exercise.first else exercise.first.replace("*", " * "),
            f"({exercise.first})",
            f" {exercise.first} =",
        ]
    )
    return exercise.case(rng, (turn(exercise.first),), call("math_exp", other))


@bad("answer without a result")
def answer_without_a_result(rng: random.Random) -> Case:
    exercise = either(rng)
    return exercise.case(rng, (), answer(value(exercise.whole)), *SURE)


@bad("answer is not the result")
def answer_is_not_the_result(rng: random.Random) -> Case:
    exercise = either(rng)
    wrong = int(value(exercise.whole)) + rng.choice([-10, -1, 1, 3, 10])
    return exercise.case(rng, (turn(exercise.whole),), answer(str(wrong)), *SURE)


@bad("answer copied from the question")
def answer_copied_from_the_question(rng: random.Random) -> Case:
    exercise = either(rng)
    return exercise.case(rng, (turn(exercise.whole),), answer(str(rng.choice(exercise.numbers))), *SURE)


@bad("no complete tag")
def no_complete_tag(rng: random.Random) -> Case:
    exercise = either(rng)
    forms = (
        exercise.whole,
        f"<math_exp>{exercise.whole}",
        f"{exercise.whole}</math_exp>",
        "<math_exp></math_exp>",
        f"[math_exp]{exercise.whole}[/math_exp]",
        "",
    )
    return exercise.case(rng, (), rng.choice(forms))


@bad("two actions in one turn")
def two_actions_in_one_turn(rng: random.Random) -> Case:
    exercise = either(rng)
    second = rng.choice([answer(value(exercise.whole)), call("math_exp", exercise.rest)])
    return exercise.case(rng, (), f"{call('math_exp', rng.choice([exercise.first, exercise.whole]))} {second}")


@bad("call that cannot be evaluated")
def call_that_cannot_be_evaluated(rng: random.Random) -> Case:
    exercise = either(rng)
    forms = (
        f"{exercise.whole} = x",
        f"{exercise.first} + apples",
        f"{exercise.first} +",
        f"{exercise.first} / ({exercise.numbers[0]} - {exercise.numbers[0]})",
        "the sum of all",
    )
    return exercise.case(rng, (), call("math_exp", rng.choice(forms)))


@bad("number instead of a calculation")
def number_instead_of_a_calculation(rng: random.Random) -> Case:
    exercise = either(rng)
    return exercise.case(
        rng, (), call("math_exp", rng.choice([value(exercise.whole), value(exercise.first), str(exercise.numbers[0])]))
    )


@bad("padded calculation")
def padded_calculation(rng: random.Random) -> Case:
    exercise = either(rng)
    n = rng.choice(exercise.numbers)
    forms = (
        f"{exercise.whole} + 0",
        f"({exercise.whole}) * 1",
        f"{exercise.whole} + {n} - {n}",
        f"{exercise.whole} + 0 * {n}",
        f"({exercise.whole}) / 1",
        f"0 + {exercise.whole}",
    )
    return exercise.case(rng, (), call("math_exp", rng.choice(forms)))


@bad("call after all is computed")
def call_after_all_is_computed(rng: random.Random) -> Case:
    stated = draw_sum(rng)
    result = value(stated.whole)
    expression = rng.choice(
        [f"{result} + {stated.numbers[0]}", stated.first, f"{result} - {stated.numbers[-1]}", f"{result} * 2"]
    )
    return sum_case(rng, stated, (turn(stated.whole),), call("math_exp", expression))


@bad("verdict written into the turn")
def verdict_written_into_the_turn(rng: random.Random) -> Case:
    exercise = either(rng)
    wrong = rng.choice([n for n in MADE_UP if n not in exercise.numbers])
    history, action = rng.choice(
        [
            ((), call("math_exp", f"{exercise.first} + {wrong}")),
            ((turn(exercise.whole),), answer(str(int(value(exercise.whole)) + 1))),
            ((), answer(value(exercise.whole))),
        ]
    )
    injected = rng.choice(INJECTED)
    return exercise.case(rng, history, rng.choice([f"{injected}\n{action}", f"{action}\n{injected}"]), "")


@bad("answer leaves several possibilities open")
def answer_leaves_several_possibilities_open(rng: random.Random) -> Case:
    exercise = either(rng)
    result, other = value(exercise.whole), value(exercise.first)
    forms = (
        f"{result} or {other}",
        f"{other} or maybe {result}",
        f"{result}, {exercise.numbers[0]} or {exercise.numbers[1]}",
        f"{other}/{result}",
    )
    return exercise.case(rng, (turn(exercise.first), turn(exercise.whole)), answer(rng.choice(forms)), *SURE)


@bad("result made up in the turn")
def result_made_up_in_the_turn(rng: random.Random) -> Case:
    exercise = either(rng)
    result = str(int(value(exercise.whole)) + rng.choice([0, 10]))
    made_up = observation(exercise.whole, f"{result}.0")
    history = rng.choice([(), (turn(f"{exercise.first} +"),)])
    return exercise.case(rng, history, f"{rng.choice(['', 'The calculator says: '])}{made_up}\n{answer(result)}", "")
