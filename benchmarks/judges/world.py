"""A small made-up world for the search tool: companies, their founders, the towns these were born in.

All names are invented, so that nobody can answer from memory. Observations are what the real search tool finds; a draw whose query does
not find the passage that the case is about is drawn again, so that the label stays certain.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile
from typing import NamedTuple

from benchmarks.judges.steps import call
from swirl_fast.tools.search import Search
from swirl_fast.tools.tool import observation

SYLLABLES = (
    "ba",
    "dor",
    "fel",
    "gri",
    "hal",
    "jor",
    "kem",
    "lun",
    "mir",
    "nok",
    "ost",
    "pel",
    "rav",
    "sul",
    "tiv",
    "vor",
    "wen",
    "zar",
)
TRADES = ("clocks", "bicycles", "pianos", "tractors", "lenses", "kettles", "violins", "ladders")
KINDS = {"clocks": "Clockworks", "bicycles": "Cycles", "pianos": "Pianos", "tractors": "Motors"} | {
    "lenses": "Optics",
    "kettles": "Metalware",
    "violins": "Instruments",
    "ladders": "Timber",
}
NATIONS = ("Norwegian", "Peruvian", "Hungarian", "Kenyan", "Scottish")


class Company(NamedTuple):
    name: str
    year: int
    trade: str
    founder: str


class Person(NamedTuple):
    name: str
    born: int
    town: str
    nation: str


class Town(NamedTuple):
    name: str
    river: str
    people: int


class World(NamedTuple):
    companies: tuple[Company, ...]
    people: dict[str, Person]
    towns: dict[str, Town]
    search: Search


class Hops(NamedTuple):
    """A question of two hops. queries: one a hop, each finding the passage it needs. wrong: what the observations say as well, but
    is not asked for. answer: a span of the last observation."""

    question: str
    queries: tuple[str, str]
    wrong: tuple[str, ...]
    answer: str


@functools.cache
def world() -> World:
    rng = random.Random(11)
    names = [
        (a + b + c).capitalize()
        for a in SYLLABLES
        for b in SYLLABLES
        for c in ("", "ka", "stad", "mund", "en")
        if a != b
    ]
    rng.shuffle(names)
    take = iter(names)
    towns = [Town(next(take), next(take), 1000 * rng.randint(3, 90) + rng.randint(1, 999)) for _ in range(24)]
    people, companies = [], []
    for town in towns:
        person = Person(f"{next(take)} {next(take)}", rng.randint(1850, 1899), town.name, rng.choice(NATIONS))
        trade = rng.choice(TRADES)
        people.append(person)
        companies.append(Company(f"{next(take)} {KINDS[trade]}", rng.randint(1900, 1949), trade, person.name))
    passages = [(c.name, f"{c.name} was a maker of {c.trade} that {c.founder} founded in {c.year}.") for c in companies]
    passages += [(p.name, f"{p.name}, born in {p.town} in {p.born}, was a {p.nation} engineer.") for p in people]
    passages += [(t.name, f"{t.name} is a town of {t.people:,} inhabitants on the river {t.river}.") for t in towns]
    folder = tempfile.mkdtemp(prefix="swirl_fast_judge_steps_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    search = Search(passages, 1, 1200, folder)
    return World(tuple(companies), {p.name: p for p in people}, {t.name: t for t in towns}, search)


def turn(query: str) -> tuple[str, str]:
    """A query and what the search tool answers."""
    return call("search_query", query), observation(query, world().search.call(query))


def finds(query: str, title: str) -> bool:
    return world().search.call(query).startswith(f"{title}: ")


def draw_hops(rng: random.Random) -> Hops:
    """Both queries find the passage they are after."""
    w = world()
    while True:
        company = rng.choice(w.companies)
        person = w.people[company.founder]
        town = w.towns[person.town]
        about = rng.choice([f"{company.name} founder", f"who founded {company.name}", company.name])
        of_person = rng.choice([f"{person.name} born", f"where was {person.name} born", person.name])
        c, year, river = company.name, str(company.year), town.river
        hops = rng.choice(
            [
                Hops(f"In which town was the founder of {c} born?", (about, of_person), (person.name, year), town.name),
                Hops(
                    f"In which year was the founder of {c} born?",
                    (about, of_person),
                    (year, town.name),
                    str(person.born),
                ),
                Hops(
                    f"What was the nationality of the founder of {c}?",
                    (about, of_person),
                    (town.name, year),
                    person.nation,
                ),
                Hops(
                    f"Which river flows through the town where {person.name} was born?",
                    (of_person, rng.choice([f"{town.name} river", town.name])),
                    (town.name, f"{town.people:,}"),
                    river,
                ),
            ]
        )
        titles = (person.name, town.name) if hops.answer == river else (c, person.name)
        if all(map(finds, hops.queries, titles)):
            return hops


class Pair(NamedTuple):
    """A comparison of two companies: the question, a query for each side, the answer."""

    question: str
    queries: tuple[str, str]
    answer: str


def draw_pair(rng: random.Random, choice: bool) -> Pair:
    """Which of two companies is older (choice), or a question to be answered with yes or no."""
    while True:
        first, second = rng.sample(world().companies, 2)
        queries = first.name, f"{second.name} founded"
        if first.year == second.year or not (finds(queries[0], first.name) and finds(queries[1], second.name)):
            continue
        if choice:
            older = first.name if first.year < second.year else second.name
            return Pair(f"Which company was founded first, {first.name} or {second.name}?", queries, older)
        if rng.random() < 0.5:
            result = "yes" if first.year < second.year else "no"
            return Pair(f"Was {first.name} founded before {second.name}?", queries, result)
        result = "yes" if first.trade == second.trade else "no"
        return Pair(f"Did {first.name} and {second.name} make the same products?", queries, result)
